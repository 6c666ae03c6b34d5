"""A rank's guard, and the agent of its host, told what to do as a supervisor on another host does."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import psutil
import pytest

from dtrain import env
from dtrain.launch.run_processes import signal_guard
from dtrain.layout import RunLayout
from dtrain.processes import END_SCRIPT
from dtrain.status import failure_from_line, read_process

from .conftest import Project

BEGUN = "open('outputs/begun', 'w').close()\n"
# Its process goes on, but with none of the handlers that it had.
ANEW = f"import os, sys, time\nif len(sys.argv) == 1:\n    os.execv(sys.executable, [sys.executable, __file__, 'again'])\n{BEGUN}"


@dataclass
class Rank:
    """The one rank of a run without a supervisor."""

    run: RunLayout
    guard: subprocess.Popen[bytes]

    def begun(self) -> bool:
        return (self.run.outputs / "begun").exists()

    @property
    def script(self) -> psutil.Process:
        record = read_process(self.run, 0)
        process = record.find() if record is not None else None
        assert process is not None
        return process

    def order(self, word: str) -> None:
        with open(self.run.rank(0).orders, "a") as orders:
            orders.write(f"{word}\n")

    def agent(self, attempt: int = 0) -> subprocess.Popen[bytes]:
        """An agent of dtrain's for this rank, which ends it when its standard input ends."""
        argv = [sys.executable, "-m", "dtrain.launch.agent", str(self.run.root), str(attempt), "", "", "0"]
        return subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)


@pytest.fixture
def start(project: Project) -> Iterator[Callable[[str], Rank]]:
    """Starts a script as a rank that takes orders."""
    started = []

    def start(script: str) -> Rank:
        run = RunLayout(project.folder / "workspace" / "runs" / "one", 0)
        run.make_folders(1)
        (run.code / "train.py").write_text(script)
        variables = {
            **env.launch_variables(run, size=1, vocabulary="dtrain", resume_from=None),
            **env.rank_variables(0, 0, 1),
            **env.supervised_variables(0),
            **env.order_variables(),
        }
        argv = [sys.executable, "-m", "dtrain._rank_main", "train.py"]
        guard = subprocess.Popen(argv, cwd=run.code, env={**project.environ(), **variables}, stderr=subprocess.PIPE)
        started.append(guard)
        return Rank(run, guard)

    yield start
    for guard in started:
        guard.kill()
        guard.communicate()


@pytest.mark.parametrize("by", ["orders", "agent"])
def test_a_script_that_executed_another_program_outlives_the_question_for_its_stacks(
    start: Callable[[str], Rank], wait_until: Callable[..., None], by: str
) -> None:
    rank = start(ANEW + "time.sleep(3)\n")
    wait_until(rank.begun)
    if by == "orders":
        rank.order("stacks")
        assert rank.guard.wait(timeout=30) == 0
    else:
        with rank.agent() as agent:
            assert agent.stdin is not None
            agent.stdin.write(b"stacks 0\n")
            agent.stdin.flush()
            assert rank.guard.wait(timeout=30) == 0


@pytest.fixture
def adopts() -> Iterator[None]:
    """Orphans of what the test starts become children of the test's own process, as they do of init, slurmstepd or systemd."""
    set_child_subreaper = 36  # linux/prctl.h
    assert ctypes.CDLL(None).prctl(set_child_subreaper, 1) == 0
    yield
    ctypes.CDLL(None).prctl(set_child_subreaper, 0)


@pytest.mark.usefixtures("adopts")
def test_what_is_meant_for_a_guard_that_is_gone_reaches_nobody(
    start: Callable[[str], Rank], wait_until: Callable[..., None]
) -> None:
    """A script may outlive its guard: in uninterruptible sleep, say, or having told the kernel that it wants to."""
    rank = start(f"import ctypes, time\nctypes.CDLL(None).prctl(1, 0)\n{BEGUN}time.sleep(60)\n")
    wait_until(rank.begun)
    script = rank.script
    for waits in psutil.Process(rank.guard.pid).children():  # for the guard's end
        if waits != script:
            waits.kill()
    came: list[int] = []
    before = signal.signal(END_SCRIPT, lambda number, _: came.append(number))
    try:
        assert signal_guard(rank.run, 0, signal.SIGCONT)
        rank.guard.kill()
        rank.guard.wait()
        wait_until(lambda: script.ppid() == psutil.Process().pid)
        assert not signal_guard(rank.run, 0, END_SCRIPT)
        assert not came
    finally:
        signal.signal(END_SCRIPT, before)
        script.kill()
        script.wait()


def test_a_late_agent_leaves_the_next_attempt_alone(start: Callable[[str], Rank], wait_until: Callable[..., None]) -> None:
    rank = start(f"import time\n{BEGUN}time.sleep(60)\n")
    wait_until(rank.begun)
    variables = {env.RUN_DIR: str(rank.run.root), **env.supervised_variables(1)}
    following = subprocess.Popen(["sleep", "60"], env={**os.environ, **variables})
    try:
        for attempt in (0, 1):
            with rank.agent(attempt=attempt) as agent:
                pass  # its standard input is closed
            assert agent.returncode == 0
            assert rank.guard.wait(timeout=30) == 137
            assert following.poll() == (-signal.SIGKILL if attempt == 1 else None)
    finally:
        following.kill()
        following.wait()


def test_a_rank_ends_with_its_attempt_and_not_with_the_scripts_own_folders(
    start: Callable[[str], Rank], wait_until: Callable[..., None]
) -> None:
    """What the script may remove says nothing of the attempt."""
    removes = "import shutil, time\nshutil.rmtree('outputs/checkpoints')\nopen('code-works', 'w').close()\ntime.sleep(60)\n"
    rank = start(removes)
    wait_until((rank.run.code / "code-works").exists)
    beat = rank.run.rank(0).heartbeat
    seen = set()

    def has_looked() -> bool:
        seen.add(beat.stat().st_mtime_ns)
        return len(seen) > 2 or rank.guard.poll() is not None

    wait_until(has_looked)
    assert rank.guard.poll() is None
    rank.run.end_attempt()
    assert rank.guard.wait(timeout=30) == 137


def test_a_rank_that_cannot_write_its_folder_says_so_and_does_not_begin(start: Callable[[str], Rank], project: Project) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    folder = RunLayout(project.folder / "workspace" / "runs" / "one", 0).rank(0).root
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(folder)], check=True)
    try:
        (folder / "full").write_bytes(b"x" * 4096)
        rank = start(BEGUN)
        _, said = rank.guard.communicate(timeout=30)
        assert rank.guard.returncode == 1
        failure = failure_from_line(said.decode())
        assert failure is not None
        assert failure.message == f"its folder cannot be written: No space left on device ({folder})"
        assert not rank.begun()
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_guard_that_stays_keeps_its_scripts_process_id(start: Callable[[str], Rank], wait_until: Callable[..., None]) -> None:
    """Until then it, and who waits for its end, may signal that id."""
    rank = start(f"import time\n{BEGUN}time.sleep(60)\n")
    wait_until(rank.begun)
    script = rank.script
    rank.guard.send_signal(END_SCRIPT)
    wait_until(rank.run.rank(0).error.exists)
    assert script.status() == psutil.STATUS_ZOMBIE
    assert rank.guard.poll() is None
    rank.guard.terminate()
    assert rank.guard.wait(timeout=30) == 143
    assert not psutil.pid_exists(script.pid)
