"""What users are promised of training with dtrain.tensorflow, seen through real processes."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import orjson
import pytest

from dtrain.layout import Workspace
from tests.contract.tensorflow_ranks import HERE, KERAS, assert_close, dtrain_run, run_command, run_python, weights

SCRIPT = str(HERE / "tensorflow_script.py")

pytestmark = [pytest.mark.needs("horovod", "tensorflow", "mpi"), pytest.mark.timeout(300)]

# As in test_horovod_scripts: sums of float32 in another order, 6e-8 with SGD. Adam divides each gradient by its own size, so
# where one is nearly nothing its rounding counts; 9e-8 was seen after the Trainer's 20 steps. Averaging wrongly gives over 1e-3.
TOLERANCES = {
    "fit": 1e-5,
    "tape": 1e-6,
    "own_loop": 1e-6,
    "train_step": 1e-5,
    "passes": 1e-5,
    "other_names": 1e-6,
    "trainer": 1e-5,
}


@pytest.mark.parametrize("keras", KERAS)
def test_same_weights_on_all_ranks_and_as_one_process(tmp_path: Path, keras: str) -> None:
    # The Trainer comes last: it alone saves checkpoints here.
    for ranks in (1, 2):
        extra = ["refused", "registered", "warmup", "statistics"] if ranks == 2 else []
        done = dtrain_run(tmp_path, ranks, SCRIPT, str(tmp_path), *extra, *TOLERANCES, **KERAS[keras])
        assert done.returncode == 0, done.stdout + done.stderr
    for case, tolerance in TOLERANCES.items():
        alone, first, second = (weights(tmp_path, case, *which) for which in ((1, 0), (2, 0), (2, 1)))
        assert_close(first, second, 0, f"{case}, rank 0 and rank 1")
        assert_close(alone, first, tolerance, f"{case}, one process and two")
    assert_close(weights(tmp_path, "statistics", 2, 0), weights(tmp_path, "statistics", 2, 1), 0, "running statistics")
    run = Workspace(tmp_path / "workspace").find_run("latest")
    for rank in (0, 1):
        rows = [orjson.loads(line) for line in run.metrics_file(rank).read_text().splitlines()]
        # 30 steps of the fits before it: ten of the warm-up, and five of each of four.
        assert [(row["step"], row["epoch"]) for row in rows[-4:]] == [(35, 1), (40, 2), (45, 3), (50, 4)]
        assert {"loss", "mae", "val_loss", "val_mae"} <= rows[-1].keys()
    load = (
        "import sys, numpy as np, tensorflow as tf\n"
        "model = tf.keras.models.load_model(sys.argv[1])\n"
        "np.savez(sys.argv[2], **{str(i): w for i, w in enumerate(model.get_weights())})\n"
        "assert 'horovod' not in sys.modules and type(model.optimizer).__mro__[1].__name__ != '_Averaging'\n"
    )
    done = run_python(tmp_path, "-c", load, str(run.outputs / "model.keras"), str(tmp_path / "loaded-2-0.npz"), **KERAS[keras])
    assert done.returncode == 0, done.stderr
    assert_close(weights(tmp_path, "loaded", 2, 0), weights(tmp_path, "trainer", 2, 0), 0, "loaded")


CASES = [*((keras, "resumed_fit") for keras in KERAS), *((next(iter(KERAS)), case) for case in ("two_fits", "trainer"))]


@pytest.mark.parametrize(("keras", "case"), CASES)
def test_killed_and_resumed_is_bit_for_bit_as_never_killed(tmp_path: Path, keras: str, case: str) -> None:
    folders = [tmp_path / "straight", tmp_path / "resumed"]
    for folder in folders:
        folder.mkdir()
    done = dtrain_run(tmp_path, 2, SCRIPT, str(folders[0]), case, **KERAS[keras])
    assert done.returncode == 0, done.stdout + done.stderr

    done = dtrain_run(tmp_path, 2, SCRIPT, str(folders[1]), case, DIE_IN_EPOCH="2", **KERAS[keras])
    assert done.returncode == 137, done.stdout + done.stderr
    assert "first to fail was rank 1" in done.stderr  # though the other waits in an allreduce
    assert "killed by SIGKILL" in done.stderr
    killed = Workspace(tmp_path / "workspace").find_run("latest")
    # Each epoch has five steps. A second fit's third epoch comes after the first fit's two, and three checkpoints are kept.
    saved = [10, 15, 20] if case == "two_fits" else [5, 10]
    assert sorted(int(path.parent.name[5:]) for path in killed.checkpoints.glob("*/manifest.json")) == saved

    done = dtrain_run(tmp_path, 2, "--resume", "latest", SCRIPT, str(folders[1]), case, **KERAS[keras])
    assert done.returncode == 0, done.stdout + done.stderr
    for rank in (0, 1):
        assert_close(weights(folders[0], case, 2, rank), weights(folders[1], case, 2, rank), 0, f"rank {rank}")
    resumed = Workspace(tmp_path / "workspace").find_run("latest")
    rows = [orjson.loads(line) for line in resumed.metrics_file(0).read_text().splitlines()]
    # The first fit, whose optimizer is in no checkpoint any more, is done again.
    assert [row["step"] for row in rows] == ([5, 10, 25] if case == "two_fits" else [15, 20])
    assert done.stdout.count("of the script's fit number 2: number 1 is done again") == (case == "two_fits")
    assert done.stdout.count(f"resumed from step {saved[-1]} (") == 1


@pytest.mark.parametrize(
    ("keras", "case", "words"),
    [
        *((keras, "apart", "CommunicationError: after step 1 the weights of rank 1 differ from those of") for keras in KERAS),
        (next(iter(KERAS)), "shapes", "array 0 is (6, 2) float32 on rank 0, (6, 3) float32 on rank 1"),
    ],
)
def test_ranks_out_of_step_are_named(tmp_path: Path, keras: str, case: str, words: str) -> None:
    done = dtrain_run(tmp_path, 2, SCRIPT, str(tmp_path), case, **KERAS[keras])
    assert done.returncode == 1
    assert words in done.stderr, done.stdout + done.stderr


EXAMPLE = str(HERE.parents[1] / "examples" / "tensorflow_digits.py")
MPIRUN = "--allow-run-as-root --bind-to none --map-by slot:OVERSUBSCRIBE --mca mpi_yield_when_idle 1"
WAYS = {
    "alone": [],
    "mpirun": ["mpirun", *MPIRUN.split(), "-np", "2"],
    # horovodrun's own flags for mpirun are of an older Open MPI.
    "horovodrun": ["horovodrun", "-np", "2", "--binding-args=--bind-to none --map-by slot:OVERSUBSCRIBE"],
}


@pytest.mark.parametrize("way", ["dtrain", "mpirun", "horovodrun", "alone"])
def test_the_example_runs_by_every_way_of_starting(tmp_path: Path, way: str) -> None:
    size = 1 if way == "alone" else 2
    if way == "dtrain":
        done = dtrain_run(tmp_path, 2, "--source", str(Path(EXAMPLE).parent), EXAMPLE)
    else:
        done = run_command(tmp_path, *WAYS[way], sys.executable, EXAMPLE)
    assert done.returncode == 0, done.stdout + done.stderr
    run = Workspace(tmp_path / "workspace").find_run("latest")
    assert (run.outputs / "model.keras").is_file()
    last = [orjson.loads(run.metrics_file(rank).read_text().splitlines()[-1]) for rank in range(size)]
    assert np.mean([row["val_accuracy"] for row in last]) > 0.95
    assert len(list(run.outputs.glob("metrics/*.jsonl"))) == size
