"""Jobs that wait in Slurm's queue: for the first time, again, and for ever."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from dtrain.status import read_status
from tests.console.conftest import Project

from .conftest import SlurmProject
from .test_slurm import ONE_EACH, SAVES, at_work

pytestmark = pytest.mark.needs("slurm", "mpi")


def state(slurm: SlurmProject) -> str:
    return slurm.slurm("squeue", "--noheader", "--states=all", f"--jobs={slurm.job}", "--format=%T").strip()


def test_a_run_that_waits_again_is_queued_and_is_stopped(slurm: SlurmProject, wait_until: Callable[..., None]) -> None:
    """Slurm took its nodes for another job, which has them until the end of the test."""
    assert slurm.dtrain(*ONE_EACH, "--detach", slurm.script(SAVES)).returncode == 0
    other, other_job = slurm.latest, slurm.job
    assert slurm.dtrain(*ONE_EACH, "--detach", slurm.script(SAVES)).returncode == 0
    wait_until(lambda: at_work(slurm))
    slurm.slurm("sbatch", "--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 100")
    wait_until(lambda: state(slurm) == "PENDING", 40)
    row = slurm.json("runs")[-1]
    assert (row["state"], row["exit_code"], row["duration_s"]) == ("queued", None, None)
    assert row["cause"].startswith("waits in Slurm's queue")
    assert row["cause"].endswith("; attempt 0: Slurm ended the job: preemption")
    shown = slurm.dtrain("show", "latest").stdout
    assert "state    queued\n" in shown
    assert "attempt  0 ended: Slurm ended the job: preemption\n" in shown
    assert "cause    waits in Slurm's queue" in shown
    following = slurm.start("logs", "--follow", "latest")
    assert following.stderr is not None
    assert any("waits in Slurm's queue: " in line for line in iter(following.stderr.readline, ""))
    done = slurm.dtrain("stop", "latest")
    assert f"Slurm job {slurm.job} is canceled" in done.stderr
    assert done.stdout == f"{slurm.latest.id}  canceled  Slurm ended job {slurm.job}: it was canceled (scancel)\n"
    assert state(slurm) == "CANCELLED"
    assert "it was canceled (scancel)" in following.communicate(timeout=20)[1]
    status = read_status(slurm.latest)
    assert (status.state, status.exit_code, status.earlier) == ("canceled", 143, ["Slurm ended the job: preemption"])
    assert "has ended before (canceled)" in slurm.dtrain("stop", "latest").stderr
    cancel = (
        f"import pathlib, dtrain.layout as l, dtrain.azureml.state as s; s.cancel(l.RunLayout(pathlib.Path({str(other.root)!r})))"
    )
    slurm.run([*slurm.on_node1, sys.executable, "-c", cancel])
    assert slurm.slurm("squeue", "--noheader", "--states=all", f"--jobs={other_job}", "--format=%T").strip() == "CANCELLED"


def test_a_run_whose_job_was_killed_is_not_shown_as_running(slurm: SlurmProject, wait_until: Callable[..., None]) -> None:
    """Canceled while it waited, and killed with its dtrain: nobody of dtrain's was there to record it."""
    assert slurm.dtrain(*ONE_EACH, "--detach", "--sbatch-arg=--begin=now+1hour", slurm.script(SAVES)).returncode == 0
    none = f"dtrain: run {slurm.latest.id} has no output"
    assert f"{none} yet: it waits in Slurm's queue: BeginTime; `dtrain logs -f" in slurm.dtrain("logs", "latest").stderr
    slurm.slurm("scancel", slurm.job)
    ended = f"{none}: it was canceled before its ranks began: Slurm ended job {slurm.job}: it was canceled (scancel)"
    assert ended in slurm.dtrain("logs", "latest").stderr
    assert ended in slurm.dtrain("logs", "-f", "latest", timeout=20).stderr
    assert read_status(slurm.latest).state == "canceled"
    assert slurm.json("runs")[-1]["state"] == "canceled"
    assert slurm.dtrain(*ONE_EACH, "--detach", slurm.script(SAVES)).returncode == 0
    wait_until(lambda: at_work(slurm))
    assert slurm.json("show", "latest")["state"] == "running"
    slurm.slurm("scancel", "--signal=KILL", "--full", slurm.job)
    wait_until(lambda: state(slurm) not in ("RUNNING", "COMPLETING"))
    shown = slurm.json("show", "latest")
    assert (shown["state"], shown["exit_code"]) == ("canceled", 143), shown


GOES_ON = """
import os, signal, time
import numpy as np
import dtrain
run = dtrain.init()
restored = run.checkpoints.restore()
first = restored.step if restored is not None else 0
run.checkpoints.save(first + 1, {"w": np.zeros(2)})
if first == 0:
    time.sleep(60)
"""


@pytest.mark.timeout(300)
def test_a_job_script_of_the_users_own_that_slurm_starts_again_goes_on(
    slurm: SlurmProject, wait_until: Callable[..., None]
) -> None:
    command = " ".join(Project.argv(slurm, "run", "--grace", "1", slurm.script(GOES_ON), "--name", "x"))
    job = slurm.slurm("sbatch", "--parsable", "--requeue", f"--chdir={slurm.folder}", f"--wrap={command}").strip()
    wait_until(lambda: list(slurm.folder.glob("workspace/runs/*/outputs/checkpoints/step-*")), 60)
    first = slurm.latest
    slurm.slurm("scontrol", "requeue", job)
    slurm.slurm("scontrol", "update", f"JobId={job}", "StartTime=now")  # where that is too early, it starts after two minutes
    wait_until(lambda: slurm.latest != first and read_status(slurm.latest).state == "completed", 200)
    assert [run["checkpoints"] for run in (slurm.json("show", first.id), slurm.json("show", "latest"))] == [[1], [2]]
    words = (slurm.folder / f"slurm-{job}.out").read_text()
    assert f"dtrain: Slurm has started job {job} again; this run goes on from run {first.id}" in words


CANNOT = {
    "100 nodes of 3": (("--nodes", "100"), "PartitionConfig: the partition has not so many nodes or CPUs; lower --nodes or -n"),
    "too long": (
        ("--sbatch-arg=--partition=short", "--sbatch-arg=--time=30"),
        "PartitionTimeLimit: the partition gives no job so much time; lower --sbatch-arg=--time=TIME",
    ),
    "too many nodes of a partition": (
        ("--nodes", "2", "--sbatch-arg=--partition=short"),
        "PartitionNodeLimit: the partition gives no job so many nodes, or so few; change --nodes",
    ),
}


@pytest.fixture
def short_partition(slurm: SlurmProject) -> SlurmProject:
    slurm.slurm("scontrol", "create", "PartitionName=short", "Nodes=ALL", "MaxTime=5", "MaxNodes=1", "State=UP")
    return slurm


def test_what_slurm_will_never_start_is_ended_with_the_reason(short_partition: SlurmProject) -> None:
    slurm = short_partition
    jobs = {name: slurm.start("run", "--launcher", "slurm", *args, slurm.script("")) for name, (args, _) in CANNOT.items()}
    waits = slurm.start("run", "--launcher", "slurm", "--sbatch-arg=--hold", slurm.script(""))
    for name, (_, reason) in CANNOT.items():
        _, words = jobs[name].communicate(timeout=40)
        assert jobs[name].returncode == 127, words
        assert f"and it is canceled: {reason}, or name another partition (--sbatch-arg=--partition=NAME" in words
        assert words.count(f"waits in Slurm's queue: {reason.partition(':')[0]}") == 1, words
    assert waits.poll() is None
    assert sorted(row["state"] for row in slurm.json("runs")) == ["failed", "failed", "failed", "queued"]
    assert slurm.slurm("squeue", "-h", "-o", "%r").split() == ["JobHeldUser"]
    slurm.slurm("scancel", "--user=root")
    slurm.slurm("scontrol", "delete", "PartitionName=short")
    _, words = waits.communicate(timeout=20)
    assert "waits in Slurm's queue: JobHeldUser" in words
    assert waits.returncode == 143
