"""What ``dtrain run`` adds to bare mpirun: seconds from start to end, and what showing the ranks' output costs them.

``make bench-launch``, or ``.venv/bin/python benchmarks/bench_launch.py --json
benchmarks/results/launch_<hardware>_<yyyymm>.json``; the tables go to standard output and, as ``.md``, beside the JSON.

Part ``overhead``: two ranks that do one allreduce and end (launch_script.py), under mpirun and under ``dtrain run -n 2``.
``start`` is from the command to the script's first line on the last rank, ``end`` from the last line of the last rank until the
command is done. Sides alternate; figures are medians over rounds, differences are also taken round by round.

Part ``logs``: 8 ranks print 10,000 lines a second each, under ``dtrain run``, which shows all of them (on a pipe that is read
into a file), and under mpirun, each rank to a file of its own. ``slowest`` is the slowest rank from its first line to its last.
All lines have to be there, whole and in each rank's order, on the console and in the ranks' files: else this ends with an error.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_tensorflow import MPIRUN, environment, machine, publish, read, row

HERE = Path(__file__).resolve().parent
BIN = Path(sys.executable).parent
SCRIPT = str(HERE / "launch_script.py")
RANKS, LINES_PER_S, LIMIT_S = 8, 10_000, 300
LINE = re.compile(r"(?:\[[^\]:]+:(\d+)\] )?rank (\d+) line (\d{7}) loss 0\.123456 accuracy .* of a log is")

Measure = Callable[[Path], dict[str, Any]]


def mpirun(ranks: int) -> list[str]:
    root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    flags = [str(ranks) if word == "2" else word for word in MPIRUN]
    return [str(BIN / "mpirun"), *root, *flags, sys.executable]


def dtrain(ranks: int) -> list[str]:
    return [sys.executable, "-m", "dtrain.cli", "run", "-n", str(ranks)]


def measure(start: list[str], arguments: list[str], folder: Path) -> dict[str, Any]:
    """Run the script once, its output to a file, and take the times."""
    # Python as a user has it: its bytecode is kept, and its output is buffered by lines or blocks.
    variables = {name: value for name, value in environment().items() if not name.startswith("PYTHON")}
    if "dtrain.cli" in start:
        variables["PYTHONPATH"] = str(HERE.parent)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.time()
    with open(folder / "console.log", "wb") as console:
        command = [*start, SCRIPT, *arguments]
        process = subprocess.Popen(command, cwd=folder, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert process.stdout is not None
        while chunk := process.stdout.read1(1 << 20):
            console.write(chunk)
        code = process.wait(LIMIT_S)
    ended = time.time()
    if code != 0:
        sys.exit(f"{' '.join(command)}\nended with code {code}\n{(folder / 'console.log').read_text()[-4000:]}")
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    ranks = [read(path) for path in sorted(folder.glob("rank-*.json"))]
    return {
        "total_s": ended - began,
        "start_s": max(rank["first"] for rank in ranks) - began,
        "end_s": ended - max(rank["last"] for rank in ranks),
        "slowest_s": max(rank["last"] - rank["first"] for rank in ranks),
        "ranks_cpu_s": sum(rank.get("cpu_s", 0.0) for rank in ranks),
        "cpu_s": now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime,
        "load": os.getloadavg()[0],
    }


def overhead_sides() -> dict[str, Measure]:
    return {
        "mpirun": lambda folder: measure(mpirun(2), ["join", str(folder)], folder),
        "dtrain": lambda folder: measure(dtrain(2), ["join", str(folder)], folder),
    }


def log_sides(seconds: int) -> dict[str, Measure]:
    def arguments(folder: Path, where: str) -> list[str]:
        return ["talk", str(folder), str(LINES_PER_S), str(seconds), where]

    def to_files(folder: Path) -> dict[str, Any]:
        return measure(mpirun(RANKS), arguments(folder, "file"), folder)

    def shown(folder: Path) -> dict[str, Any]:
        found = measure(dtrain(RANKS), arguments(folder, "console"), folder)
        check([folder / "console.log"], LINES_PER_S * seconds)
        check(sorted(folder.glob("workspace/runs/*/ranks/*/output.log")), LINES_PER_S * seconds)
        return found

    return {"mpirun, to files": to_files, "dtrain, shown": shown}


def check(files: list[Path], count: int) -> None:
    """Every rank's lines 0 to ``count`` - 1 have to be there, whole and in order."""
    expected = dict.fromkeys(range(RANKS), 0)
    for path in files:
        for line in path.read_text().splitlines():
            if line.startswith("dtrain: "):
                continue
            match = LINE.fullmatch(line)
            if match is None:
                sys.exit(f"{path}: a torn line: {line!r}")
            rank, number = int(match[2]), int(match[3])
            if number != expected[rank] or (match[1] is not None and int(match[1]) != rank):
                sys.exit(f"{path}: line {expected[rank]} of rank {rank} should come, and {line!r} does")
            expected[rank] += 1
    if set(expected.values()) != {count}:
        sys.exit(f"{files[0]} and beside it: lines of each rank {expected}, {count} were printed")


def alternate(sides: dict[str, Measure], rounds: int, about: str) -> dict[str, list[dict[str, Any]]]:
    """Measure each side in turn, after one start of each that is not counted: it leaves files in memory, and bytecode."""
    records: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for number in range(-1, rounds):
        for name, side in sides.items():
            with tempfile.TemporaryDirectory() as folder:
                found = side(Path(folder))
            if number >= 0:
                records[name].append(found)
            told = {key: round(value, 2) for key, value in found.items()}
            print(f"{about}, round {number + 1}: {name} {told}", file=sys.stderr, flush=True)
    return records


def table(records: dict[str, list[dict[str, Any]]], keys: tuple[str, ...]) -> list[str]:
    """Medians with their ranges, a line a side; then the second side less the first: of medians, and the median of rounds'."""
    lines = [row("side", *keys), row(*["---"] * (len(keys) + 1))]
    values = {name: {key: [record[key] for record in each] for key in keys} for name, each in records.items()}
    for name, of_side in values.items():
        cells = [f"{statistics.median(each):.3f} ({min(each):.3f} to {max(each):.3f})" for each in of_side.values()]
        lines.append(row(name, *cells))
    first, second = values.values()
    medians = [statistics.median(second[key]) - statistics.median(first[key]) for key in keys]
    by_round = [statistics.median(b - a for a, b in zip(first[key], second[key], strict=True)) for key in keys]
    lines.append(row("difference of medians", *(f"{value:+.3f}" for value in medians)))
    return [*lines, row("median of rounds' differences", *(f"{value:+.3f}" for value in by_round))]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="starts of each side in part overhead; logs takes a third")
    parser.add_argument("--seconds", type=int, default=5, help="of printing, in part logs")
    parser.add_argument("--part", choices=["overhead", "logs", "all"], default="all")
    parser.add_argument("--json", type=Path, help="where the raw figures go")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    here = machine()
    record: dict[str, Any] = {"machine": here, "load_before": os.getloadavg(), "parts": {}}
    lines = [f"{here['processor']}, {here['cores']} cores, {here['system']}; {here['versions']}", ""]
    if args.part in ("overhead", "all"):
        records = record["parts"]["overhead"] = alternate(overhead_sides(), args.rounds, "overhead")
        about = f"### overhead: 2 ranks, one allreduce, {args.rounds} rounds; seconds, lowest to highest"
        lines += [about, "", *table(records, ("total_s", "start_s", "end_s", "cpu_s")), ""]
    if args.part in ("logs", "all"):
        rounds = max(1, args.rounds // 3)
        records = record["parts"]["logs"] = alternate(log_sides(args.seconds), rounds, "logs")
        first, second = ([each["slowest_s"] for each in side] for side in records.values())
        ratio = statistics.median(second) / statistics.median(first)
        about = (
            f"### logs: {RANKS} ranks x {LINES_PER_S:,} lines/s for {args.seconds} s, {rounds} rounds; every line there and whole"
        )
        lines += [about, "", *table(records, ("slowest_s", "total_s", "cpu_s", "ranks_cpu_s"))]
        lines += ["", f"Seconds of the slowest rank, dtrain / mpirun: {ratio:.3f}.", ""]
    publish(record, lines, args.json)


if __name__ == "__main__":
    main()
