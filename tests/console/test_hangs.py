"""Jobs that live and do nothing any more: found, shown, ended."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest

from dtrain.files import read_json
from dtrain.status import read_process

from .conftest import Project

WAITS = """
import time
import numpy as np
import dtrain

def load(step):
    if run.rank == 1 and step == 2:
        time.sleep(100)

run = dtrain.init()
for step in range(4):
    load(step)
    run.comm.allreduce_mean_([np.zeros(3)])
    print("step", step)
"""


@pytest.mark.needs("mpi")
def test_who_waits_and_who_does_not_come(project: Project) -> None:
    done = project.dtrain("run", "-n", "2", "--hang-timeout", "4", project.script(WAITS))
    assert done.returncode == 123, done.stderr
    cause = "no progress for 4 s (--hang-timeout): rank 1 did not come (train.py:8 in load), and rank 0 waited in allreduce_mean_"
    assert done.stderr.rstrip().endswith(cause)
    assert re.search(r"rank 0 waits in allreduce_mean_ for \d s: train.py:13 in <module>", done.stderr)
    assert project.json("show", "latest")["cause"] == cause
    assert 'train.py", line 8 in load' in project.latest.rank(1).stack.read_text()
    assert 'train.py", line 13 in <module>' in project.latest.rank(0).stack.read_text()


@pytest.mark.needs("mpi")
def test_ranks_that_do_the_same_are_told_in_a_line(project: Project) -> None:
    done = project.dtrain("run", "-n", "3", "--hang-timeout", "4", project.script(WAITS))
    assert done.returncode == 123, done.stderr
    assert re.search(r"  rank 0, rank 2 wait in allreduce_mean_ for \d s: train.py:13 in <module>\n", done.stderr)
    assert re.search(r"  rank 1 is in no collective that dtrain knows: train.py:8 in load\n", done.stderr)


@pytest.mark.needs("mpi")
def test_who_left_the_others_waiting_is_named(project: Project) -> None:
    for module, code, words in (
        (
            "from mpi4py import MPI",
            1,
            ": left with exit code 0 while others still needed it; then mpirun ended with code 1",
        ),
        ("import time", 123, "rank 0 was at train.py:6 in <module>; rank 1 had left before with exit code 0"),
    ):
        script = f"import os, time\n{module}\nif os.environ['OMPI_COMM_WORLD_RANK'] == '1':\n    os._exit(0)\n\ntime.sleep(20)\n"
        done = project.dtrain("run", "-n", "2", "--hang-timeout", "4", project.script(script))
        assert done.returncode == code, done.stderr
        assert words in done.stderr


EVALUATES_ALONE = """
import time
import dtrain
run = dtrain.init()
run.comm.barrier()
run.log("loss", 1)
if run.rank == 2:
    from mpi4py import MPI
    MPI.Finalize()
for n in range(LINES if run.rank == 0 else 0):
    print("evaluates", n, flush=True)
    time.sleep(0.5)
time.sleep(60 if run.rank == 0 and LINES == 1 else 0)
"""


@pytest.mark.needs("mpi")
def test_a_rank_that_is_done_waits_for_the_others_and_does_not_hang(project: Project) -> None:
    done = project.dtrain("run", "-n", "3", "--hang-timeout", "4", project.script(EVALUATES_ALONE.replace("LINES", "12")))
    assert done.returncode == 0, done.stderr
    done = project.dtrain("run", "-n", "2", "--hang-timeout", "4", project.script(EVALUATES_ALONE.replace("LINES", "1")))
    assert done.returncode == 123, done.stderr
    assert "rank 0 did not come (train.py:13 in <module>), and rank 1 waited in MPI_Finalize (script is over)" in done.stderr
    assert re.search(r"rank 1 waits in MPI_Finalize for \d s: its script is over\n", done.stderr)


@pytest.mark.needs("mpi")
def test_a_stopped_rank_among_others_is_the_one_that_is_named(project: Project) -> None:
    stops = (
        "import os, signal, time\nfrom mpi4py import MPI\nMPI.COMM_WORLD.barrier()\n"
        "if MPI.COMM_WORLD.rank == 1:\n    os.kill(os.getpid(), signal.SIGSTOP)\n\ntime.sleep(60)\n"
    )
    done = project.dtrain("run", "-n", "3", "--hang-timeout", "4", project.script(stops))
    assert done.returncode == 123, done.stderr
    last = done.stderr.rstrip().splitlines()[-1]
    assert re.search(r"rank 1: process \d+ is stopped .*; rank 0, rank 2 were at train.py:7 in <module>", last), last


SILENT = "import time\ntime.sleep(4)\n"
KNOWN = f"import dtrain\nrun = dtrain.init()\nrun.log('loss', 1)\n{SILENT}"
TALKS = "import time\nfor n in range(8):\n    print(n, end=' ', flush=True)\n    time.sleep(0.5)\n"
LOGS = "import dtrain, time\nrun = dtrain.init()\nfor n in range(8):\n    run.log('n', n)\n    time.sleep(0.5)\n"
# Native code that lets no Python run.
DEAF = "import ctypes, dtrain\nrun = dtrain.init()\nrun.log('loss', 1)\nctypes.PyDLL(None).sleep(20)\n"
# Its process goes on, but with none of the handlers that it had.
ANEW = f"import os, sys\nif len(sys.argv) == 1:\n    os.execv(sys.executable, [sys.executable, __file__, 'again'])\n{SILENT}"


@pytest.mark.parametrize(
    ("script", "options", "code", "words"),
    [
        (SILENT, ("--hang-timeout", "1.5"), 123, "rank 0 was at train.py:2 in <module>"),
        (SILENT, ("--hang-timeout", "1.5", "--on-hang", "auto"), 0, "the job goes on"),
        (f"import dtrain\nrun = dtrain.init()\n{SILENT}", ("--hang-timeout", "1.5", "--on-hang", "auto"), 0, "the job goes on"),
        (KNOWN, ("--hang-timeout", "1.5", "--on-hang", "auto"), 123, "rank 0 was at train.py:5 in <module>"),
        (KNOWN, ("--hang-timeout", "1.5", "--on-hang", "report"), 0, "the job goes on"),
        (TALKS, ("--hang-timeout", "2"), 0, "completed"),
        (LOGS, ("--hang-timeout", "2"), 0, "completed"),
        (SILENT, ("--hang-timeout", "0"), 0, "completed"),
        (ANEW, ("--hang-timeout", "1.5", "--on-hang", "report"), 0, "cannot be asked"),
        (DEAF, ("--hang-timeout", "1.5"), 123, "rank 0 was at train.py:4 in <module>"),
    ],
)
def test_what_counts_as_progress(project: Project, script: str, options: tuple[str, ...], code: int, words: str) -> None:
    done = project.dtrain("run", *options, project.script(script))
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert ("no progress" in done.stderr) == (words != "completed")


PLAIN = """
import sys, threading, time
from mpi4py import MPI

comm = MPI.COMM_WORLD
comm.Split(comm.rank).Barrier()
mode = sys.argv[1]
if mode == "each receives":
    comm.recv(source=1 - comm.rank)
elif mode == "one completes":
    (MPI.Request.Waitall if comm.rank else MPI.Request.Wait)(*([[comm.irecv()]] if comm.rank else [comm.irecv()]))
elif mode == "one computes" and comm.rank:
    until = time.monotonic() + 8
    while time.monotonic() < until:
        pass
elif mode == "calls":
    for _ in range(120):
        comm.Barrier()
        time.sleep(0.05)

def talk():
    for n in range(16):
        print("at work", n, flush=True)
        time.sleep(0.5)

def talk_and_send():
    talk()
    comm.send(1, 0)
    comm.send(1, 1)

if mode == "a thread sends":
    if comm.rank:
        threading.Thread(target=talk_and_send).start()
    comm.recv(source=1)
elif mode == "one leaves":
    talk() if comm.rank == 0 else comm.recv(source=0)
elif mode != "one computes, then waits":
    comm.Barrier()
elif comm.rank:
    time.sleep(8)
    comm.recv(source=0)
else:
    comm.Reduce(MPI.IN_PLACE, [bytearray(8), MPI.BYTE])
"""


@pytest.mark.needs("mpi")
@pytest.mark.parametrize(
    ("mode", "code", "words"),
    [
        ("each receives", 123, "(--hang-timeout): rank 0, rank 1 waited in recv"),
        ("one completes", 123, "(--hang-timeout): rank 0 waited in Wait; rank 1 waited in Waitall"),
        ("one computes", 0, "dtrain:   rank 0 waits in Barrier for "),
        ("one computes, then waits", 123, "(--hang-timeout): rank 0 waited in Reduce; rank 1 waited in recv"),
        ("one leaves", 123, "(--hang-timeout): rank 0 on HOST had left (its script is over) while rank 1 waited in recv"),
        ("a thread sends", 0, "no progress of rank 0 for 4 s"),
        ("calls", 0, "completed"),
    ],
)
def test_scripts_that_know_mpi_alone(project: Project, mode: str, code: int, words: str) -> None:
    """Left alone, one is ended only when nobody is left who could do anything: a rank may compute in silence."""
    done = project.dtrain("run", "-n", "2", "--hang-timeout", "4", "--on-hang", "auto", project.script(PLAIN), mode)
    assert done.returncode == code, done.stderr
    assert words.replace("HOST", os.uname().nodename) in done.stderr
    assert ("no progress" in done.stderr) == (mode != "calls")
    assert ("the job goes on" in done.stderr) == (
        mode in ("one computes", "one computes, then waits", "one leaves", "a thread sends")
    )


WAITS_IN = """
import sys
from mpi4py import MPI

comm = MPI.COMM_WORLD
if comm.rank:
    comm.recv(source=0)
else:
    eval(sys.argv[1])
"""


@pytest.mark.needs("mpi")
@pytest.mark.parametrize(
    ("call", "name"),
    [
        ("MPI.Finalize()", "Finalize"),
        ("comm.Split(0)", "Split"),
        ("MPI.Request.Waitany([comm.irecv(source=1)])", "Waitany"),
    ],
)
def test_calls_of_mpi4py_that_wait_are_named(project: Project, call: str, name: str) -> None:
    done = project.dtrain("run", "-n", "2", "--hang-timeout", "3", project.script(WAITS_IN), call)
    assert done.returncode == 123, done.stderr
    assert done.stderr.rstrip().endswith(f"(--hang-timeout): rank 0 waited in {name}; rank 1 waited in recv")


METHODS = """
from mpi4py import MPI
from dtrain._mpi_calls import BLOCKING

methods = [getattr(getattr(MPI, kind), name) for kind, names in BLOCKING.items() for name in names.split()]
print("noted:", {hasattr(method, "__wrapped__") for method in [MPI.Finalize, *methods]})
"""


@pytest.mark.needs("mpi")
@pytest.mark.parametrize("limit_s", [0, 60])
def test_without_a_limit_mpi4py_is_left_as_it_is(project: Project, limit_s: int) -> None:
    done = project.dtrain("run", "-n", "2", "--hang-timeout", str(limit_s), project.script(METHODS))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"noted: {{{limit_s > 0}}}") == 2


@pytest.mark.needs("mpi")
def test_a_rank_that_leaves_after_mpi_finalize_did_not_leave_early(project: Project) -> None:
    done = project.dtrain("run", "-n", "2", project.script("import os\nfrom mpi4py import MPI\nMPI.Finalize()\nos._exit(0)\n"))
    assert done.returncode == 0, done.stderr
    assert not any(read_json(project.latest.rank(rank).done)["early"] for rank in range(2))


INTERRUPTED = """
import signal
from mpi4py import MPI
from dtrain.progress import PROGRESS

class Timeout(Exception):
    pass

def interrupt(*_):
    raise Timeout

signal.signal(signal.SIGALRM, interrupt)
for _ in range(300):
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.001)
        while True:
            MPI.COMM_SELF.allreduce(1)
    except Timeout:
        pass
    assert (PROGRESS.waits, PROGRESS.read().collective) == (False, "")
before = PROGRESS.read().calls
MPI.COMM_WORLD.Barrier()
assert PROGRESS.read().calls == before + 2
"""


@pytest.mark.needs("mpi")
def test_a_call_that_a_signals_handler_leaves_is_left(project: Project) -> None:
    done = project.dtrain("run", "-n", "2", project.script(INTERRUPTED))
    assert done.returncode == 0, done.stderr


def test_a_stopped_rank_is_named_as_one(project: Project, wait_until: Callable[..., None]) -> None:
    job = project.start("run", "--hang-timeout", "2", project.script("import time\nprint('here', flush=True)\ntime.sleep(60)\n"))
    wait_until(lambda: any(path.read_text() for path in project.folder.glob("workspace/runs/*/ranks/00000/output.log")))
    record = read_process(project.latest, 0)
    assert record is not None
    process = record.find()
    assert process is not None
    process.send_signal(signal.SIGSTOP)
    _, err = job.communicate(timeout=30)
    assert job.returncode == 123, err
    assert f"process {record.pid} is stopped (by SIGSTOP, or a debugger), and cannot answer" in err


def test_stacks_of_a_running_job(project: Project, wait_until: Callable[..., None]) -> None:
    job = project.start("run", project.script("import time\ndef wait():\n    time.sleep(8)\nprint('here', flush=True)\nwait()\n"))
    wait_until(lambda: any(path.read_text() for path in project.folder.glob("workspace/runs/*/ranks/00000/output.log")))
    for _ in range(2):  # each answer is only what came for this question
        shown = project.dtrain("stacks", "latest")
        assert shown.returncode == 0, shown.stderr
        assert shown.stdout.startswith("--- rank 0\n")
        assert shown.stdout.count('train.py", line 3 in wait') == 1
    (answer,) = project.json("stacks", "latest")
    assert (answer["rank"], answer["collective"]) == (0, "")
    assert "has ranks 0 to 0" in project.dtrain("stacks", "latest", "--rank", "1").stderr
    job.communicate(timeout=30)
    assert job.returncode == 0
    assert "(has ended)" in project.dtrain("stacks", "latest").stdout


def test_a_rank_that_was_started_by_hand_is_not_asked(project: Project, wait_until: Callable[..., None]) -> None:
    """It could not answer: the signal would end it."""
    script = project.script("import dtrain, time\nrun = dtrain.init()\ntime.sleep(6)\n")
    job = subprocess.Popen([sys.executable, script], cwd=project.folder, env=project.environ(), start_new_session=True)
    wait_until(lambda: any(project.folder.glob("workspace/runs/*/ranks/00000/process.json")))
    shown = project.dtrain("stacks", "latest")
    assert shown.returncode == 0, shown.stderr
    assert "was not started by `dtrain run`" in shown.stdout
    assert job.wait(timeout=30) == 0


def test_nohup_outlives_the_terminal(project: Project, wait_until: Callable[..., None]) -> None:
    script = project.script("import time\nprint('here', flush=True)\ntime.sleep(2)\n")
    argv = ["nohup", sys.executable, "-m", "dtrain.cli", "run", script]
    job = subprocess.Popen(argv, cwd=project.folder, env=project.environ(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    wait_until(lambda: any(path.read_text() for path in project.folder.glob("workspace/runs/*/ranks/00000/output.log")))
    job.send_signal(signal.SIGHUP)
    _, err = job.communicate(timeout=30)
    assert job.returncode == 0, err


@pytest.mark.parametrize(
    ("options", "words"),
    [(("--hang-timeout", "-1"), "--hang-timeout=-1 is not a number"), (("--on-hang", "kill"), "there are auto, end, report")],
)
def test_options_that_cannot_be(project: Project, options: tuple[str, ...], words: str) -> None:
    done = project.dtrain("run", *options, project.script(""))
    assert done.returncode == 2
    assert words in done.stderr


@pytest.mark.needs("mpi")
def test_a_stopped_rank_with_its_guard_is_lost(project: Project, wait_until: Callable[..., None]) -> None:
    job = project.start(
        "run", "-n", "2", "--heartbeat-timeout", "5", project.script("import time\nopen('outputs/begun', 'a')\ntime.sleep(60)\n")
    )
    wait_until(lambda: any(project.folder.glob("workspace/runs/*/ranks/00001/heartbeat.json")))
    record = read_process(project.latest, 1)
    assert record is not None
    script = record.find()
    assert script is not None
    for process in (script.parent(), script):
        process.suspend()
    _, words = job.communicate(timeout=60)
    assert job.returncode == 255, words
    assert "lost: gives no sign of life since" in words
    assert "is stopped" in words
