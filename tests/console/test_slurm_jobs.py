"""Runs that were submitted to Slurm, where its numbers mean other jobs by now, or this host asks another cluster.

Slurm's commands are those of tests/fakes/bin: no Slurm forgets its jobs when it is told to.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from typing import Any

import pytest

from dtrain.files import write_json
from dtrain.launch.sbatch import SlurmJob
from dtrain.layout import RunLayout, Workspace
from dtrain.processes import ProcessRecord
from dtrain.spec import JobSpec
from dtrain.status import RunStatus, State, write_record

from .conftest import ROOT, Project

ELSEWHERE = ProcessRecord(host="node-elsewhere", pid=5, started=1.0)


@pytest.fixture
def submitted(project: Project) -> RunLayout:
    """The folder of a run that is job 7 of cluster `here`; nothing is recorded of what became of it."""
    run = Workspace(project.folder / "workspace").create_run("train")
    run.make_folders(1)
    spec = JobSpec(target=str(project.folder / project.script("")), launcher="slurm")
    write_json(run.spec, spec.to_json())
    job = SlurmJob(job_id="7", cluster_name="here", folder=str(run.code))
    write_json(run.slurm_job, dataclasses.asdict(job))
    path = f"{ROOT / 'tests' / 'fakes' / 'bin'}{os.pathsep}{os.environ['PATH']}"
    project.env.update(PATH=path, CLUSTER="here", JOB="", CANCELED=str(project.folder / "canceled"))
    return run


def record(run: RunLayout, state: State, **more: Any) -> None:
    write_record(run.status, RunStatus(state=state, size=1, started=time.time() - 60, **more))


def canceled(project: Project) -> str:
    path = project.folder / "canceled"
    return path.read_text() if path.exists() else ""


@pytest.mark.parametrize("state", ["failed", "canceled"])
@pytest.mark.parametrize("now", ["PENDING", "RUNNING"])
def test_a_job_that_has_the_number_of_an_earlier_one_is_left_alone(
    project: Project, submitted: RunLayout, state: State, now: str
) -> None:
    record(submitted, state, ended=time.time(), exit_code=1, cause="a failure of last month")
    project.env["JOB"] = f"7|{now}|p|n/a|Resources|/home/another/folder"
    (row,) = project.json("runs")
    assert (row["state"], row["cause"]) == (state, "a failure of last month")
    stopped = project.dtrain("stop", submitted.id, timeout=20)
    assert f"has ended before ({state})" in stopped.stderr
    assert canceled(project) == ""


def test_a_job_of_ones_own_is_canceled(project: Project, submitted: RunLayout) -> None:
    record(submitted, "queued")
    project.env["JOB"] = f"7|PENDING|p|n/a|Resources|{submitted.code}"
    assert project.json("runs")[0]["cause"] == "waits in Slurm's queue: Resources"
    stopping = project.start("stop", submitted.id)
    assert stopping.stderr is not None
    assert "Slurm job 7 is canceled" in stopping.stderr.readline()
    stopping.kill()
    assert canceled(project) == "7\n"


@pytest.mark.parametrize(("cluster", "state"), [("here", "failed"), ("another", "running"), ("", "running")])
def test_only_the_cluster_that_took_a_job_can_have_forgotten_it(
    project: Project, submitted: RunLayout, cluster: str, state: str
) -> None:
    """The login nodes of two clusters see the same home; the run goes on, for all that is recorded."""
    record(submitted, "running", supervisor=ELSEWHERE)
    project.env["CLUSTER"] = cluster
    (row,) = project.json("runs")
    assert row["state"] == state
    assert ("Slurm no longer knows it" in row["cause"]) == (state == "failed")
    stopped = project.dtrain("stop", submitted.id, timeout=20)
    if state == "running":
        assert stopped.returncode == 127
        assert "cannot be canceled: Slurm does not answer for it here" in stopped.stderr
        assert "on a host of the cluster here that it was submitted to" in stopped.stderr
    else:
        assert "has ended before (failed)" in stopped.stderr


def test_the_end_of_a_job_that_was_canceled_in_the_queue_is_recorded(project: Project, submitted: RunLayout) -> None:
    record(submitted, "queued")
    project.env["JOB"] = f"7|CANCELLED|p|n/a|None|{submitted.code}"
    shown = project.json("show", submitted.id)
    assert (shown["state"], shown["exit_code"]) == ("canceled", 143)
    assert shown["duration_s"] == project.json("show", submitted.id)["duration_s"]
    followed, plain = (project.dtrain("logs", *more, submitted.id, timeout=20) for more in (["-f"], []))
    assert (followed.returncode, followed.stderr) == (plain.returncode, plain.stderr)
    assert "it was canceled before its ranks began: Slurm ended job 7: it was canceled (scancel)" in plain.stderr


def test_who_follows_a_run_is_told_of_an_end_that_another_look_has_recorded(project: Project, submitted: RunLayout) -> None:
    record(submitted, "queued")
    project.env["JOB"] = f"7|NODE_FAIL|p|n/a|None|{submitted.code}"
    assert project.json("runs")[0]["state"] == "failed"
    code = (
        "import sys; from pathlib import Path; from dtrain.layout import RunLayout; from dtrain.launch.sbatch import SlurmJob\n"
        "from dtrain.launch.console import Console; from dtrain.launch.follow import follow_job\n"
        "run = RunLayout(Path(sys.argv[1])); follow_job(run, SlurmJob.of(run), Console())"
    )
    followed = project.run([sys.executable, "-c", code, str(submitted.root)], timeout=20)
    assert followed.stderr.endswith("dtrain: Slurm ended job 7: one of its nodes failed\n")
    assert f"dtrain: run {submitted.id} failed after " in followed.stderr
