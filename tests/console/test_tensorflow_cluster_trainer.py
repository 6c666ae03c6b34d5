"""dtrain.tensorflow.Trainer in TensorFlow's own clusters: the script that trains on ranks trains there too."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest

from dtrain.metrics import read_rows

from .conftest import ROOT, Project

pytestmark = [pytest.mark.needs("tensorflow"), pytest.mark.timeout(400)]

EXAMPLE = str(ROOT / "examples" / "tensorflow_digits.py")
STEPS = 1437 // 64
PARAMETER_SERVER = ("run", "--launcher", "parameter_server", "--workers", "2", "--servers", "1", "--chief")


@pytest.fixture
def project(project: Project) -> Project:
    if importlib.util.find_spec("tf_keras") is not None:
        project.env["TF_USE_LEGACY_KERAS"] = "1"
    return project


def python(project: Project, code: str, *args: str, **env: str) -> str:
    argv = [sys.executable, "-c", code, *args]
    environ = {**project.environ(), **env}
    done = subprocess.run(argv, cwd=project.folder, env=environ, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


LOAD = f"""
import sys
from pathlib import Path
import numpy as np
import tensorflow as tf
model = tf.keras.models.load_model(sys.argv[1])
sys.path.insert(0, {str(ROOT / "examples")!r})
from tensorflow_digits import load_digits
_, (x, y) = load_digits()
from dtrain.checkpoint import Checkpointer
from dtrain.comm.local import LocalCommunicator
saved = Checkpointer(Path(sys.argv[2]), LocalCommunicator()).restore()
of_checkpoint = [tensor for name, tensor in saved.shared.items() if name.startswith("model/")]
assert all(np.array_equal(a, b) for a, b in zip(model.get_weights(), of_checkpoint, strict=True))
print(saved.step, saved.meta["epochs"], *model.evaluate(x, y, batch_size=64, verbose=0))
"""


@pytest.mark.needs("sklearn")
def test_parameter_servers_with_an_evaluator_and_a_resume_without(project: Project) -> None:
    first = project.dtrain(*PARAMETER_SERVER, "--evaluator", EXAMPLE, "--epochs", "5", timeout=200)
    assert first.returncode == 0, first.stdout + first.stderr
    run = project.latest
    chief, evaluator = read_rows(run.metrics_file(0, "chief 0")), read_rows(run.metrics_file(4, "evaluator 0"))
    assert [(row["step"], row["epoch"]) for row in chief] == [(epoch * STEPS, epoch) for epoch in range(1, 6)]
    assert not any("val_loss" in row for row in chief)
    assert [row["epoch"] for row in evaluator] == sorted({row["epoch"] for row in evaluator})
    assert (evaluator[-1]["step"], evaluator[-1]["epoch"]) == (5 * STEPS, 5)
    assert evaluator[-1]["val_accuracy"] > 0.9
    assert "evaluator0] epoch 5/5  val_loss" in first.stdout

    again = project.dtrain(*PARAMETER_SERVER, "--resume", "latest", EXAMPLE, "--epochs", "8", timeout=200)
    assert again.returncode == 0, again.stdout + again.stderr
    run = project.latest
    chief = read_rows(run.metrics_file(0, "chief 0"))
    assert [(row["step"], row["epoch"]) for row in chief] == [(epoch * STEPS, epoch) for epoch in (6, 7, 8)]
    assert chief[0]["loss"] < 0.3, "training began anew"
    assert chief[-1]["val_accuracy"] > 0.93

    # What was trained on the servers is a plain model, in any other process.
    assert project.dtrain("register", "latest", "--name", "digits", "--path", "outputs/model.keras").returncode == 0
    assert project.dtrain("pull", "digits:1", "pulled").returncode == 0
    model = next((project.folder / "pulled").rglob("model.keras"))
    step, epochs, loss, accuracy = python(project, LOAD, str(model), str(run.checkpoints)).split()
    assert (int(step), int(epochs)) == (8 * STEPS, 8)
    assert (float(loss), float(accuracy)) == pytest.approx((chief[-1]["val_loss"], chief[-1]["val_accuracy"]), rel=1e-5)


@pytest.mark.needs("sklearn")
def test_workers_without_servers_train_as_one_process(project: Project) -> None:
    done = project.dtrain("run", "--launcher", "multi_worker", "-n", "2", EXAMPLE, "--epochs", "2", timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    run = project.latest
    leader, other = (read_rows(run.metrics_file(rank, f"worker {rank}")) for rank in (0, 1))
    assert [row["step"] for row in leader] == [row["step"] for row in other] == [STEPS, 2 * STEPS]
    assert [row["loss"] for row in leader] == [row["loss"] for row in other]
    again = project.dtrain(
        "run", "--launcher", "multi_worker", "-n", "2", "--resume", "latest", EXAMPLE, "--epochs", "3", timeout=200
    )
    assert again.returncode == 0, again.stdout + again.stderr
    (resumed,) = read_rows(project.latest.metrics_file(0, "worker 0"))

    subprocess.run([sys.executable, EXAMPLE, "--epochs", "3"], cwd=project.folder, env=project.environ(), check=True)
    *_, third = alone = read_rows(project.latest.metrics_file(0))
    for name in ("loss", "val_loss"):
        assert [row[name] for row in leader] == pytest.approx([row[name] for row in alone[:2]], rel=1e-3)
        assert resumed[name] == pytest.approx(third[name], rel=1e-3)


REFUSALS = """
import numpy as np, tensorflow as tf
import dtrain, dtrain.tensorflow
run = dtrain.init()
x, y = np.zeros((8, 3), np.float32), np.zeros((8, 1), np.float32)
def trainer(**options):
    try:
        dtrain.tensorflow.Trainer(None, (x, y), run=run, **{"epochs": 1, "batch_size": 4, **options})
    except dtrain.errors.UsageError as error:
        print(error)
trainer(compression="fp16")
trainer(warmup_epochs=2)
trainer(check_every=7)
trainer()
trainer(test=(x, y), checkpoint_every="never")
trainer(test=(x, y))
"""


def test_what_has_no_effect_in_a_cluster_is_refused(project: Project) -> None:
    cluster = {"chief": ["127.0.0.1:1"], "worker": ["127.0.0.1:2"], "ps": ["127.0.0.1:3"]}
    config = json.dumps({"cluster": cluster, "task": {"type": "evaluator", "index": 0}})
    told = python(project, REFUSALS, TF_CONFIG=config).splitlines()
    assert [line.split()[0] for line in told[:3]] == ["compression='fp16'", "warmup_epochs=2", "check_every=7"]
    assert all("has no effect in a TensorFlow cluster" in line for line in told[:3])
    assert "give the Trainer test data" in told[3]
    assert "checkpoint_every='never' leaves nothing" in told[4]
    assert "dtrain run --launcher parameter_server --chief --evaluator" in told[5]
