"""What a supervisor, or who follows a run, asks the system for grows with ranks and hosts no faster than it has to."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dtrain.launch import beats
from dtrain.launch.agents import Agents
from dtrain.launch.beats import Beats, BeatWatch
from dtrain.launch.plan import LaunchPlan, PlannedHost
from dtrain.layout import RunLayout
from dtrain.processes import ProcessRecord
from dtrain.status import RunStatus, write_record

RANKS, HOSTS = 64, 8

# A process of its own counts what it asks for: what listens to that cannot be taken back.
COUNT = """
import sys, time
from pathlib import Path
asked = []
sys.addaudithook(lambda name, given: asked.append(str(given[0])) if name in ("open", "socket.getaddrinfo") else None)
def count(word):
    return sum(word in each for each in asked)
from dtrain.layout import RunLayout
run, ranks = RunLayout(Path(sys.argv[1])).newest_attempt(), int(sys.argv[2])
"""
PLACES = """
from dtrain.hosts import Host
from dtrain.launch.places import find_places
from dtrain.spec import JobSpec
Path("train.py").touch()
hosts = tuple(Host(f"192.0.2.{number}", ranks // 8) for number in range(8))
spec = JobSpec(target="train.py", workers=ranks, max_ranks=ranks, launcher="mpi", hosts=hosts, preflight=False)
assert len(find_places(spec, None)) == ranks
print(count("192.0.2."))
"""
LOGS = """
from dtrain.launch.console import Console
from dtrain.launch.logs import print_logs
until = time.monotonic() + 1
print_logs(run, rank=None, attempt=None, follow=True, is_over=lambda: time.monotonic() > until, console=Console(sys.stderr))
print(count("process.json"))
"""
LOOK = """
from dtrain.job_options import Hangs
from dtrain.launch.agents import Agents
from dtrain.launch.beats import Beats, BeatWatch
from dtrain.launch.crew import Crew
from dtrain.launch.hang import HangWatch
from dtrain.launch.plan import LaunchPlan
plan = LaunchPlan(launcher="mpi", size=ranks, processes=())
agents, beats = Agents(plan, run, 30.0, print), Beats(plan, run)
crew = Crew(plan, run, agents, output=1, start_timeout_s=1.0, say=print)
losses, hangs = BeatWatch(plan, run, 30.0, beats, agents, str), HangWatch(plan, run, Hangs(), print, crew, beats)
beats.read()
assert (losses.look(), hangs.look()) == ([], None)
assert len(beats.last) == ranks and not beats.due
print(count("/ranks/") + count("/attempts/"))
"""


@pytest.fixture
def run(tmp_path: Path) -> RunLayout:
    run = RunLayout(tmp_path / "run")
    run.make_folders(RANKS)
    run = run.newest_attempt()
    me = ProcessRecord.of(os.getpid())
    for path in (run.rank(rank).process for rank in range(RANKS)):
        write_record(path, me, durable=False)
    for rank in range(RANKS):
        run.rank(rank).output_log.touch()
        run.rank(rank).heartbeat.write_text('{"count": 1, "calls": 0, "collective": "", "since_s": 0}')
    write_record(run.status, RunStatus(state="running", size=RANKS, started=1.0, supervisor=me))
    return run


@pytest.mark.parametrize(("script", "asked"), [(PLACES, HOSTS), (LOGS, 0), (LOOK, RANKS)], ids=["places", "logs", "look"])
def test_nothing_is_asked_twice(run: RunLayout, script: str, asked: int) -> None:
    """A host's name once and not for each rank; a rank's process only when it wrote something; its beat once for all watches."""
    argv = [sys.executable, "-c", COUNT + script, str(run.root), str(RANKS)]
    done = subprocess.run(argv, cwd=run.root, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, f"{asked}\n"), done.stderr


def test_what_has_come_from_agents_is_not_taken_for_each_rank(run: RunLayout, monkeypatch: pytest.MonkeyPatch) -> None:
    ssh = run.root / "ssh"
    ssh.write_text(f"#!/bin/sh\necho gone 1\ntouch {run.root}/said\nexec cat\n")
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{run.root}:{os.environ['PATH']}")
    plan = LaunchPlan(launcher="mpi", size=2, processes=(), other_hosts=(PlannedHost(name="node2", ranks=(0, 1)),))
    agents = Agents(plan, run, 6.0, print)
    agents.start(lambda: None)
    deadline = time.monotonic() + 20
    while not (run.root / "said").exists():
        assert time.monotonic() < deadline
    assert [agents.has_left(rank) for rank in (0, 1)] == [False, False]
    agents.heard()
    assert [agents.has_left(rank) for rank in (0, 1)] == [False, True]
    agents.release()


class SlowBeats:
    """A run of which the beat of rank 0 never changes, and those after it take their time to be read."""

    def __init__(self, run: RunLayout, size: int, timeout_s: float) -> None:
        plan = LaunchPlan(launcher="mpi", size=size, processes=())
        self._slow = [run.rank(rank).heartbeat for rank in range(1, size)]
        for path in self._slow:
            path.unlink()
            os.mkfifo(path)
        self._beats = Beats(plan, run)
        self._watch = BeatWatch(plan, run, timeout_s, self._beats, Agents(plan, run, 6.0, print), lambda rank: "here")

    def look(self, seconds: float) -> list[int]:
        """Read all, each in so many seconds, and return the ranks that are lost."""
        thread = threading.Thread(target=self._feed, args=[seconds])
        thread.start()
        self._beats.read()
        thread.join()
        return [failure.rank for failure in self._watch.look()]

    def _feed(self, seconds: float) -> None:
        for path in self._slow:
            with open(path, "wb") as fifo:
                time.sleep(seconds)
                fifo.write(b"%f" % time.time())


def test_a_rank_is_lost_also_where_a_reading_takes_long(run: RunLayout, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many ranks, on a network file system: that was taken for a stop of the supervisor itself, again and again."""
    monkeypatch.setattr(beats, "_STOPPED_S", 0.5)
    slow = SlowBeats(run, 9, timeout_s=0.3)
    deadline, lost = time.monotonic() + 30, list[int]()
    while not lost and time.monotonic() < deadline:
        lost += slow.look(0.1)
    assert lost == [0]


def test_no_rank_is_lost_when_the_file_system_did_not_answer(run: RunLayout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beats, "_STOPPED_S", 0.5)
    slow = SlowBeats(run, 2, timeout_s=2.0)
    assert slow.look(0.0) == []
    assert slow.look(3.0) == []
