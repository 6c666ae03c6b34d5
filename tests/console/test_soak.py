"""Fifty launches in a row, each with a fault that chance chooses: every verdict is right, and nothing is left of any.

``DTRAIN_SOAK_SEED`` and ``DTRAIN_SOAK_LAUNCHES`` choose others; the seed of this one is always the same.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import pytest

from dtrain.status import read_status

from .conftest import Project

SCRIPT = """
import os, signal, sys, time
import dtrain
run = dtrain.init()
victim, step = map(int, sys.argv[1:3])
def fail():
    {how}
for each in range(12):
    if (run.rank, each) == (victim, step):
        fail()
    run.comm.allgather_obj(each)
    run.log("value", each, step=each)
    print("step", each, flush=True)
    time.sleep(0.01)
"""


@dataclass(frozen=True)
class Fault:
    """``how`` a rank fails by itself, or what is done from outside; then the exit code, and what the console says of it."""

    exit_code: int
    said: str = ""
    how: str = "pass"
    outside: Callable[[subprocess.Popen[str]], None] | None = None
    ranks: tuple[int, ...] = (1, 2, 3)
    options: tuple[str, ...] = ()


def kill_mpirun(job: subprocess.Popen[str]) -> None:
    next(each for each in psutil.Process(job.pid).children() if each.name() in ("mpirun", "prterun", "mpiexec.hydra")).kill()


FAULTS = {
    "none": Fault(0),
    "raises": Fault(1, "ValueError: bad batch", "raise ValueError('bad batch')"),
    "exits": Fault(3, "called sys.exit(3)", "sys.exit(3)"),
    "exits at once": Fault(5, "exited with code 5", "os._exit(5)"),
    "killed": Fault(137, "killed by SIGKILL", "os.kill(os.getpid(), signal.SIGKILL)"),
    "killed with its guard": Fault(
        137, "killed together with the process that watched it", "os.kill(os.getppid(), signal.SIGKILL); time.sleep(60)"
    ),
    "crashes": Fault(139, "Segmentation fault", "import ctypes; ctypes.string_at(0)"),
    "waits for ever": Fault(123, "no progress for 2 s (--hang-timeout)", "time.sleep(60)", options=("--hang-timeout", "2")),
    "leaves early": Fault(123, "no progress for 2 s", "sys.exit(0)", ranks=(2, 3), options=("--hang-timeout", "2")),
    "too slow": Fault(124, "time limit of 2 s reached", "time.sleep(60)", options=("--timeout", "2")),
    "SIGTERM": Fault(143, "canceled", "time.sleep(60)", outside=lambda job: job.send_signal(signal.SIGTERM)),
    "Ctrl-C": Fault(130, "canceled", "time.sleep(60)", outside=lambda job: job.send_signal(signal.SIGINT)),
    "mpirun killed": Fault(137, "mpirun was killed by SIGKILL", "time.sleep(60)", outside=kill_mpirun, ranks=(2, 3)),
}
ENDS = {0: "completed", 130: "canceled", 143: "canceled"}


@pytest.mark.needs("mpi")
@pytest.mark.timeout(600)
def test_many_launches_with_random_faults(project: Project) -> None:
    chance = random.Random(int(os.environ.get("DTRAIN_SOAK_SEED", "20261121")))
    for number in range(int(os.environ.get("DTRAIN_SOAK_LAUNCHES", "50"))):
        name = chance.choice(sorted(FAULTS))
        fault = FAULTS[name]
        size = chance.choice(fault.ranks)
        victim, step = chance.randrange(size), chance.randrange(1, 12)
        what = f"launch {number}: {name}, rank {victim} of {size} in step {step}"
        script = project.script(SCRIPT.format(how=fault.how))
        job = project.start("run", "-n", str(size), "--grace", "3", *fault.options, script, str(victim), str(step))
        if fault.outside is not None:
            assert job.stdout is not None
            reached = any(f":{victim}] step {step - 1}" in line for line in job.stdout)
            assert reached, f"{what}\n{job.communicate(timeout=60)}"
            fault.outside(job)
        out, err = job.communicate(timeout=60)
        assert job.returncode == fault.exit_code, f"{what}\n{out}{err}"
        assert fault.said in err, f"{what}\n{err}"
        status = read_status(project.latest)
        assert (status.state, status.exit_code) == (ENDS.get(fault.exit_code, "failed"), fault.exit_code), f"{what}\n{status}"
        if status.failure is not None:
            assert status.failure.rank == victim, f"{what}\n{status}"
        assert not project.processes(), what
