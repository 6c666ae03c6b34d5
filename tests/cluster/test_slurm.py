"""Launcher `slurm` on a Slurm of three nodes: submitted, and within an allocation."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator

import psutil
import pytest

from dtrain.layout import RunLayout, Workspace
from dtrain.status import read_process, read_status

from .conftest import SlurmProject

pytestmark = pytest.mark.needs("slurm", "mpi")

SUBMIT = ("run", "--launcher", "slurm", "--nodes", "2", "--tasks-per-node", "2")
TELLS = """
import os, sys
import dtrain
run = dtrain.init()
assert run.comm.allgather_obj(run.rank) == list(range(run.size))
print(f"{run.rank} of {run.size}, {run.local_rank} of {run.local_size} here, {sys.argv[1:]} {os.environ.get('MARK')}", flush=True)
"""
LINES = {f"[node{n}:{rank}] {rank} of 4, {rank % 2} of 2 here" for rank, n in enumerate((1, 1, 2, 2))}


def told(output: str) -> set[str]:
    return {line.partition(", [")[0] for line in output.splitlines()}


@pytest.mark.parametrize("start", ["auto", "mpirun"])
def test_a_submitted_job_is_followed_to_its_end(slurm: SlurmProject, start: str) -> None:
    done = slurm.dtrain(*SUBMIT, "--slurm-start", start, "--env", "MARK=set", slurm.script(TELLS), "a b", "it's")
    assert done.returncode == 0, done.stderr
    assert told(done.stdout) == LINES
    assert "['a b', \"it's\"] set" in done.stdout
    assert f"ranks are started by {'srun with PMIx' if start == 'auto' else 'mpirun of Open MPI'}" in done.stderr
    assert f"dtrain: submitted as Slurm job {slurm.job}" in done.stderr
    assert f"dtrain: run {slurm.latest.id} completed in" in done.stderr
    assert read_status(slurm.latest).state == "completed"
    for node in ("node1", "node2", "node3"):
        assert not slurm.hosts("exec", node, "find", "/tmp", "-maxdepth", "1", "-name", f"dtrain-{slurm.latest.id}*")


def test_the_first_failure_and_its_exit_code_come_back(slurm: SlurmProject) -> None:
    script = slurm.script(TELLS + "print(os.environ['KEY'])\nif run.rank == 3:\n    sys.exit(7)\nrun.comm.barrier()\n")
    done = slurm.dtrain(*SUBMIT, "--env", "KEY=of-nobody-elses", "--secret", "KEY", "--show", "3", script)
    assert done.returncode == 7, done.stderr
    assert {line[:8] for line in done.stdout.splitlines()} == {"[node2:3"}
    assert "[node2:3] ***" in done.stdout.splitlines()
    written = [path.read_bytes() for path in slurm.latest.root.rglob("*") if path.is_file()]
    assert not any(b"of-nobody-elses" in text for text in written)
    assert "first to fail was rank 3 on node2: called sys.exit(7)" in done.stderr
    assert done.stderr.count("first to fail") == 1


def test_a_rank_that_is_killed_with_its_guard_is_named(slurm: SlurmProject) -> None:
    """It leaves no record, and the other one is ended by Open MPI, which lost its connection to it; or by Slurm, which says so
    before or after it says that this one was killed."""
    script = TELLS + "if run.rank == 1:\n    os.kill(os.getppid(), 9)\nrun.comm.barrier()\n"
    done = slurm.dtrain(*ONE_EACH, slurm.script(script))
    assert done.returncode == 137, done.stderr
    first = "first to fail was rank 1 on node2: vanished without a record"
    assert first in done.stderr or "rank 0 on node1, rank 1 on node2: each vanished without a record" in done.stderr, done.stderr


def test_a_rank_that_leaves_early_is_the_first(slurm: SlurmProject) -> None:
    """Open MPI ends the other one, or has Slurm kill it before it leaves a record: which is the faster is open."""
    done = slurm.dtrain(*ONE_EACH, slurm.script(TELLS + "if run.rank == 1:\n    os._exit(0)\nrun.comm.barrier()\n"))
    assert done.returncode == 1, done.stderr
    left = "first to fail was rank 1 on node2: left with exit code 0 while others still needed it; then rank 0 on node1: "
    assert left in done.stderr, done.stderr


@pytest.mark.parametrize(("start", "title"), [("mpirun", "mpirun"), ("pmix", "srun")])
def test_an_allocation_is_used_from_within(slurm: SlurmProject, start: str, title: str) -> None:
    slurm.within = ("salloc", "--quiet", "--nodes=2", "--ntasks-per-node=2")
    done = slurm.dtrain("run", "--slurm-start", start, slurm.script(TELLS))
    assert done.returncode == 0, done.stderr
    assert told(done.stdout) == LINES
    assert "4 ranks · launcher slurm" in done.stderr
    assert not slurm.latest.slurm_job.exists()


@pytest.mark.needs("mpich")
def test_an_allocation_is_used_by_mpich_over_pmi2(slurm: SlurmProject) -> None:
    slurm.within = ("salloc", "--quiet", "--nodes=2", "--ntasks-per-node=2")
    python = os.environ["DTRAIN_TEST_MPICH_PYTHON"]
    argv = [python if word == sys.executable else word for word in slurm.argv("run", slurm.script(TELLS))]
    done = slurm.run(argv)
    assert done.returncode == 0, done.stderr
    assert told(done.stdout) == LINES


def test_programs_that_are_each_a_world_of_one_are_found_out(slurm: SlurmProject) -> None:
    slurm.within = ("salloc", "--quiet", "--nodes=2", "--ntasks-per-node=1")
    done = slurm.dtrain("run", "--slurm-start", "pmi2", slurm.script("import mpi4py.MPI\nprint('trains alone')\n"))
    assert done.returncode == 1
    assert done.stdout == "" or "trains alone" not in done.stdout
    assert "srun started 2 ranks, but Open MPI" in done.stderr
    assert "sees a world of 1" in done.stderr
    assert "--slurm-start" in done.stderr


SAVES = """
import os, signal, sys, time
import numpy as np
import dtrain
run = dtrain.init()
told = []
def note(number, _):
    told.append(number)
    os.write(1, f"told {number}\\n".encode())
signal.signal(signal.SIGTERM, note)
signal.signal(signal.SIGUSR1, note)
restored = run.checkpoints.restore()
first = restored.step if restored is not None else 0
print(f"begins after {first}", flush=True)
for step in range(first + 1, 100_000):
    time.sleep(0.05)
    heard = run.comm.allgather_obj((bool(told), os.path.exists("outputs/enough")))
    if any(hears for hears, _ in heard) or step == 3:
        run.checkpoints.save(step, {"x": np.zeros(1)})
        print("saved", flush=True)
    if any(hears or enough for hears, enough in heard):
        sys.exit(0)
"""
ONE_EACH = ("run", "--launcher", "slurm", "--nodes", "2", "--tasks-per-node", "1")


def output(slurm: SlurmProject, rank: int, attempt: int = 0) -> str:
    runs = Workspace(slurm.folder / "workspace").list_runs()
    path = RunLayout(runs[-1].root, attempt).rank(rank).output_log if runs else None
    return path.read_text() if path is not None and path.exists() else ""


def at_work(slurm: SlurmProject, attempt: int = 0) -> bool:
    """Both ranks have saved, or begun after what was saved."""
    return all(re.search(r"saved|after [1-9]", output(slurm, rank, attempt)) for rank in (0, 1))


def test_a_waiting_job_is_left_alone_come_back_to_and_stopped(slurm: SlurmProject, wait_until: Callable[..., None]) -> None:
    job = slurm.start(*ONE_EACH, "--sbatch-arg=--begin=now+1hour", slurm.script(SAVES))
    assert job.stderr is not None
    assert any("waits in Slurm's queue: BeginTime" in line for line in iter(job.stderr.readline, ""))
    assert slurm.json("runs")[0]["state"] == "queued"
    slurm.find(job, "dtrain.cli").send_signal(signal.SIGINT)
    _, words = job.communicate(timeout=20)
    assert job.returncode == 130
    assert f"follow it with `dtrain logs -f {slurm.latest.id}`, end it with `dtrain stop {slurm.latest.id}`" in words
    for number in (signal.SIGTERM, None):
        following = slurm.start("logs", "--follow", "latest")
        assert following.stderr is not None
        assert any("waits in Slurm's queue: BeginTime" in line for line in iter(following.stderr.readline, ""))
        if number is not None:
            slurm.find(following, "dtrain.cli").send_signal(number)
            assert "goes on; follow it with" in following.communicate(timeout=20)[1]
    done = slurm.dtrain("stop", "latest")
    assert done.returncode == 0, done.stderr
    assert "canceled" in done.stdout
    _, words = following.communicate(timeout=20)
    assert "it was canceled (scancel)" in words
    assert (read_status(slurm.latest).state, read_status(slurm.latest).exit_code) == ("canceled", 143)


def test_a_detached_job_is_stopped_and_its_ranks_have_their_grace_time(
    slurm: SlurmProject, wait_until: Callable[..., None]
) -> None:
    done = slurm.dtrain(*ONE_EACH, "--detach", slurm.script(SAVES))
    assert (done.returncode, done.stdout) == (0, "")
    assert f"`dtrain stop {slurm.latest.id}`" in done.stderr
    wait_until(lambda: at_work(slurm))
    assert "train.py" in slurm.dtrain("stacks", "latest", "--rank", "1").stdout  # of a rank on another host
    done = slurm.dtrain("stop", "latest")
    assert done.returncode == 0, done.stderr
    status = read_status(slurm.latest)
    assert (status.state, status.exit_code) == ("canceled", 143)
    assert status.cause == f"Slurm ended job {slurm.job}: it was canceled (scancel)"
    for rank in (0, 1):
        assert output(slurm, rank).count("told 15") == 1
        assert output(slurm, rank).count("saved") == 2


@pytest.mark.parametrize("start", ["pmix", "mpirun"])
def test_sigusr1_to_the_batch_script_reaches_every_rank_once(
    slurm: SlurmProject, start: str, wait_until: Callable[..., None]
) -> None:
    """What sbatch's --signal=B:USR1@60 does a minute before the time limit."""
    job = slurm.start(*ONE_EACH, "--slurm-start", start, slurm.script(SAVES))
    wait_until(lambda: at_work(slurm))
    slurm.slurm("scancel", "--batch", "--signal=USR1", slurm.job)
    _, words = job.communicate(timeout=40)
    assert job.returncode == 0, words
    for rank in (0, 1):
        assert output(slurm, rank).count("told 10") == 1
        assert output(slurm, rank).count("saved") == 2


def test_a_preempted_job_saves_and_goes_on_in_the_same_run(slurm: SlurmProject, wait_until: Callable[..., None]) -> None:
    """SIGTERM, KillWait, and the job back into the queue."""
    job = slurm.start(*ONE_EACH, slurm.script(SAVES))
    wait_until(lambda: at_work(slurm))
    slurm.slurm("sbatch", "--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    wait_until(lambda: at_work(slurm, attempt=1), 60)
    (slurm.latest.outputs / "enough").touch()
    _, words = job.communicate(timeout=40)
    assert job.returncode == 0, words
    saved = {}
    for rank in (0, 1):
        assert output(slurm, rank).count("told 15") in (1, 2)  # slurmd says it twice of a preemption, and of the time limit
        assert output(slurm, rank).count("saved") == 2
        saved[rank] = re.findall(r"begins after (\d+)", output(slurm, rank, attempt=1))
    assert int(saved[0][0]) > 3
    assert saved[0] == saved[1]
    assert "dtrain: attempt 0 was canceled with exit code 143: Slurm ended the job: preemption" in words
    assert f"starting the job again from the checkpoint of step {saved[0][0]} (Slurm started its job again)" in words
    assert len(slurm.json("runs")) == 1
    assert read_status(slurm.latest).earlier == ["Slurm ended the job: preemption"]


def test_a_job_goes_on_elsewhere_when_a_node_is_cut_off(
    slurm: SlurmProject, cut: Callable[[str], None], wait_until: Callable[..., None]
) -> None:
    blocker = slurm.slurm(
        "sbatch", "--parsable", "--nodelist=node1", "--exclusive", "--output=/dev/null", "--wrap=sleep 300"
    ).strip()
    job = slurm.start(*ONE_EACH, "--grace", "1", slurm.script(SAVES))  # which ranks that wait for lost ones do not use
    wait_until(lambda: at_work(slurm))
    assert [read_process(slurm.latest, rank).host for rank in (0, 1)] == ["node2", "node3"]  # type: ignore[union-attr]
    slurm.slurm("scancel", blocker)
    cut("node3")
    wait_until(lambda: at_work(slurm, attempt=1), 90)
    (slurm.latest.outputs / "enough").touch()
    _, words = job.communicate(timeout=40)
    assert job.returncode == 0, words
    assert [read_process(slurm.latest, rank).host for rank in (0, 1)] == ["node1", "node2"]  # type: ignore[union-attr]
    assert "begins after 3" in output(slurm, 0, attempt=1)
    assert read_status(slurm.latest).earlier == ["Slurm ended the job: node failure"]
    # Nobody reaches what is left on node3, which sees by the run folder that its attempt is over; Slurm would end it much later.
    wait_until(lambda: not slurm.processes())
    slurm.hosts("heal", "node3")
    slurm.hosts("exec", "node3", "sh", "-c", "kill -HUP $(cat /run/slurmd.pid)")  # register at once


def test_a_killed_dtrain_of_the_job_is_told(slurm: SlurmProject, wait_until: Callable[..., None]) -> None:
    job = slurm.start(*ONE_EACH, slurm.script(SAVES))
    wait_until(lambda: at_work(slurm))
    of_the_job = ["dtrain.launch.batch", str(slurm.latest.root)]
    next(p for p in psutil.process_iter(["cmdline"]) if (p.info["cmdline"] or [])[-2:] == of_the_job).kill()
    _, words = job.communicate(timeout=40)
    assert job.returncode == 1, words
    assert f"Slurm job {slurm.job} ended before the run did (FAILED); its last words are in" in words
    assert read_status(slurm.latest).state == "failed"


@pytest.fixture
def patient_slurm(slurm: SlurmProject) -> Iterator[SlurmProject]:
    """One that waits for a lost node for long, as most do."""
    file = slurm.hosts.state / "slurm" / "slurm.conf"
    usual = file.read_text()
    file.write_text(usual.replace("SlurmdTimeout=5", "SlurmdTimeout=300"))
    slurm.slurm("scontrol", "reconfigure")
    yield slurm
    slurm.hosts("heal", "node2")
    file.write_text(usual)
    slurm.slurm("scontrol", "reconfigure")


def test_a_lost_node_keeps_nobody_waiting(patient_slurm: SlurmProject, wait_until: Callable[..., None]) -> None:
    """The run is over when dtrain has ended it; Slurm goes on to complete the job."""
    slurm = patient_slurm
    job = slurm.start(*ONE_EACH, "--heartbeat-timeout", "5", slurm.script(SAVES))
    wait_until(lambda: at_work(slurm))
    lost = [p for p in slurm.processes() if p.environ().get("SLURM_PROCID") == "1"]
    slurm.hosts("cut", "node2")
    for process in lost:  # its beats would come by the file system, which is not cut off here
        process.send_signal(signal.SIGSTOP)
    _, words = job.communicate(timeout=40)
    assert job.returncode == 255, words
    assert "first to fail was rank 1 on node2: lost: gives no sign of life since" in words
    for process in lost:
        with contextlib.suppress(psutil.NoSuchProcess):  # a script goes with its guard
            process.kill()


def test_a_hang_shows_the_stacks_of_all_nodes(slurm: SlurmProject) -> None:
    script = slurm.script(
        "import time\nimport dtrain\nrun = dtrain.init()\ndef load():\n    time.sleep(60)\n"
        "run.comm.barrier()\nif run.rank == 1:\n    load()\nrun.comm.barrier()\n"
    )
    done = slurm.dtrain(*ONE_EACH, "--hang-timeout", "2", "--grace", "1", script)
    assert done.returncode == 123, done.stderr
    assert "rank 1 did not come (train.py:5 in load), and rank 0 waited in barrier" in done.stderr


def test_what_cannot_be_is_refused(slurm: SlurmProject) -> None:
    script = slurm.script("print('ran')")
    done = slurm.dtrain("run", "--launcher", "slurm", "--sbatch-arg=--partition=none", script)
    assert (done.returncode, done.stdout) == (127, "")
    assert "dtrain: sbatch refused the job: sbatch: error: invalid partition" in done.stderr
    assert not slurm.json("runs")
    slurm.within = ("salloc", "--quiet", "--nodes=2")
    done = slurm.dtrain("run", "--detach", script)
    assert (done.returncode, done.stdout) == (2, "")
    assert "nothing is submitted here" in done.stderr
    done = slurm.dtrain("run", "-H", "node1,10.77.0.3,node3", script)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("dtrain: hosts 10.77.0.3, node3: not in Slurm job ")
    assert ", which has node1, node2, and within the job mpirun takes no others; name those" in done.stderr
    slurm.within = ("srun", "--quiet", "--nodes=2")
    done = slurm.dtrain("run", script)
    assert (done.returncode, done.stdout) == (2, "")
    assert "srun started this 2 times; start `dtrain run` once" in done.stderr


ALONE = """
import os, signal, sys, time
def end(number, _):
    os.write(1, b"told\\n")
    time.sleep(1)
    os.write(1, b"kept\\n")
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
print("saved", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("start", ["pmix", "mpirun"])
def test_ranks_of_an_allocation_have_their_grace_time(slurm: SlurmProject, start: str, wait_until: Callable[..., None]) -> None:
    slurm.within = ("salloc", "--quiet", "--nodes=2", "--ntasks-per-node=1")
    job = slurm.start("run", "--slurm-start", start, slurm.script(ALONE))
    wait_until(lambda: at_work(slurm))
    slurm.find(job, "dtrain.cli").send_signal(signal.SIGTERM)
    _, words = job.communicate(timeout=40)
    assert job.returncode == 143, words
    assert [output(slurm, rank) for rank in (0, 1)] == ["saved\ntold\nkept\n"] * 2
