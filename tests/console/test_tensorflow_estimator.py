"""``tf.estimator.train_and_evaluate`` under `dtrain run`, where TensorFlow still has it: the lane of TensorFlow 2.15."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
from collections.abc import Callable

import pytest

from dtrain.metrics import read_metrics
from dtrain.status import read_process

from .conftest import ROOT, Project

pytestmark = [
    pytest.mark.needs("tensorflow", "sklearn"),
    pytest.mark.timeout(400),
    pytest.mark.skipif(importlib.util.find_spec("tensorflow_estimator") is None, reason="this lane has no Estimator any more"),
]

RUN = ("run", "--launcher", "parameter_server", "--workers", "2", "--servers", "1")
EXAMPLE = str(ROOT / "examples" / "tensorflow_estimator_digits.py")


def test_chief_workers_and_evaluator_end_well_also_when_a_worker_is_killed(
    project: Project, wait_until: Callable[..., None]
) -> None:
    tasks = ["chief 0", "worker 0", "worker 1", "ps 0", "evaluator 0"]
    job = project.start(*RUN, "--chief", "--evaluator", EXAMPLE, "--steps", "2000")
    # The chief's first checkpoint, of step 0: the worker may be importing still, or training.
    wait_until(lambda: any(project.folder.glob("workspace/runs/*/outputs/estimator/model.ckpt-*.index")), timeout=120)
    record = read_process(project.latest, tasks.index("worker 1"))
    assert record is not None
    os.kill(record.pid, signal.SIGKILL)
    out, err = job.communicate(timeout=180)
    assert job.returncode == 0, out + err
    assert "worker 1 was killed by SIGKILL; it is started again on 127.0.0.1:" in err
    for task in ("chief 0", "evaluator 0"):
        assert re.search(rf":{task.replace(' ', '')}\] {task} is done", out), out
    data = project.json("show", "latest")
    assert (data["state"], data["restarts"], data["tasks"]) == ("completed", 1, tasks)
    evaluations = read_metrics(project.latest).rows[tasks.index("evaluator 0")]
    assert evaluations[-1]["accuracy"] > 0.9
    assert 2000 <= evaluations[-1]["step"] < 2010  # the workers may be in a step when the chief sees the last one
    assert list(project.latest.outputs.glob("estimator/export/model/*/saved_model.pb"))


def test_a_master_evaluates_by_itself(project: Project) -> None:
    done = project.dtrain(*RUN, "--tf-config", "master", EXAMPLE, "--steps", "400", timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r":master0\] step 40\d  loss .* validation 0\.[89]", done.stdout), done.stdout
    assert "master0] master 0 is done" in done.stdout
    data = project.json("show", "latest")
    assert (data["state"], data["tasks"]) == ("completed", ["master 0", "worker 0", "worker 1", "ps 0"])
    assert data["ranks"][0]["metrics"]["accuracy"] > 0.8


def test_who_leads_must_be_said(project: Project) -> None:
    """A cluster of Azure ML's shape, which worker 0 leads, is none for an Estimator: TensorFlow says so, and nobody waits."""
    done = project.dtrain(*RUN, EXAMPLE, timeout=120)
    assert done.returncode == 1
    assert 'it must have one "chief" node' in done.stderr
