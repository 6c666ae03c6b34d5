"""Processes that end with others."""

from __future__ import annotations

import subprocess
import sys
import time

import psutil
import pytest

GUARD = """
import os, signal, subprocess, time
from dtrain.processes import end_group_with_me
child = subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL, preexec_fn=lambda: os.setpgid(0, 0))
leave_alone = end_group_with_me(child.pid)
print(child.pid, flush=True)
if {leaves}:
    leave_alone()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("leaves", [False, True])
def test_a_killed_process_takes_the_group_with_it(leaves: bool) -> None:
    done = subprocess.run([sys.executable, "-c", GUARD.format(leaves=leaves)], stdout=subprocess.PIPE, text=True, check=False)
    child = psutil.Process(int(done.stdout))
    try:
        deadline = time.monotonic() + (1 if leaves else 20)
        while child.is_running() and child.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
            time.sleep(0.05)
        assert (child.is_running() and child.status() != psutil.STATUS_ZOMBIE) == leaves
    finally:
        if leaves:
            child.kill()
