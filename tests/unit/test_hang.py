"""When a rank hangs, and when it only waits."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest

from dtrain.job_options import Hangs
from dtrain.launch.agents import Agents
from dtrain.launch.beats import Beats
from dtrain.launch.crew import Crew
from dtrain.launch.hang import HangWatch
from dtrain.launch.plan import LaunchPlan
from dtrain.launch.stacks import collective, place
from dtrain.layout import RunLayout
from dtrain.processes import ProcessRecord
from dtrain.progress import PROGRESS, Progress
from dtrain.status import RankFailure, World, write_record


def test_workers_that_wait_for_a_host_do_not_hang(tmp_path: Path) -> None:
    run = RunLayout(tmp_path / "run")
    run.make_folders(2)
    run = run.newest_attempt()
    write_record(run.world, World(since=time.time(), workers=[0, 1], started=2))
    write_record(run.rank(0).process, ProcessRecord.of(os.getpid()))
    PROGRESS.write(run.rank(0).heartbeat)
    write_record(run.rank(1).error, RankFailure.now(1, "signal", 137, "killed by SIGKILL", task="worker 1"))
    plan = LaunchPlan(launcher="horovod", size=0, elastic=True, processes=())
    said: list[str] = []
    crew = Crew(plan, run, Agents(plan, run, 1.0, said.append), output=1, start_timeout_s=1.0, say=said.append)
    beats = Beats(plan, run)
    hangs = HangWatch(plan, run, Hangs(hang_timeout_s=0.01, on_hang="end"), said.append, crew, beats)

    def look() -> str | None:
        beats.read()
        return hangs.look()

    assert look() is None
    time.sleep(0.1)
    assert look() is None
    assert not said
    run.rank(1).error.unlink()
    time.sleep(0.1)
    found = look()
    assert found is not None
    assert found.startswith("no progress for 0.01 s (--hang-timeout): worker 0")


def test_ranks_that_wait_for_each_other_are_told_when_it_is_known_of_all(tmp_path: Path) -> None:
    """They began at the same time, but the second one's guard beats later."""
    run = RunLayout(tmp_path / "run").begin_attempt(0, 2)
    plan = LaunchPlan(launcher="mpi", size=2, processes=())
    said: list[str] = []
    crew = Crew(plan, run, Agents(plan, run, 1.0, said.append), output=1, start_timeout_s=1.0, say=said.append)
    beats = Beats(plan, run)
    hangs = HangWatch(plan, run, Hangs(hang_timeout_s=2.0, on_hang="auto"), said.append, crew, beats)

    def look(*, beat: int | None = None) -> str | None:
        if beat is not None:
            waits[beat].write(run.rank(beat).heartbeat)
        beats.read()
        return hangs.look()

    waits = [Progress(), Progress()]
    for rank, call in enumerate((b"Barrier", b"recv")):
        waits[rank].enter(call)
        write_record(run.rank(rank).process, ProcessRecord.of(os.getpid()))
    assert look(beat=0) is None
    time.sleep(1)
    assert look(beat=1) is None
    time.sleep(1.1)
    assert look() is None
    assert not said
    time.sleep(1.1)
    assert look() == "no progress for 2 s (--hang-timeout): rank 0 waited in Barrier; rank 1 waited in recv"
    assert said[0].startswith("dtrain: no progress of rank 0, rank 1 for 2 s")
    assert not any("the job goes on" in line for line in said)


@pytest.mark.parametrize(
    ("over", "words"),
    [
        ({0, 3}, "rank 0 on HOST, rank 3 on HOST had left (their scripts are over) while rank 1, rank 2 waited in Allreduce"),
        ({0, 1, 2, 3}, "rank 0, rank 1, rank 2, rank 3 waited in MPI_Finalize (script is over)"),
    ],
)
def test_who_is_over_is_why_others_wait(tmp_path: Path, over: set[int], words: str) -> None:
    run = RunLayout(tmp_path / "run").begin_attempt(0, 4)
    plan = LaunchPlan(launcher="mpi", size=4, processes=())
    said: list[str] = []
    crew = Crew(plan, run, Agents(plan, run, 1.0, said.append), output=1, start_timeout_s=1.0, say=said.append)
    beats = Beats(plan, run)
    hangs = HangWatch(plan, run, Hangs(hang_timeout_s=0.01, on_hang="end"), said.append, crew, beats)

    def look() -> str | None:
        for rank, progress in enumerate(waits):
            progress.write(run.rank(rank).heartbeat)
        beats.read()
        hangs.look()
        time.sleep(0.1)
        return hangs.look()

    waits = [Progress() for _ in range(4)]
    for rank, progress in enumerate(waits):
        progress.end(finalizes=True) if rank in over else progress.enter(b"Allreduce")
        write_record(run.rank(rank).process, ProcessRecord.of(os.getpid()))
    found = look()
    assert found is not None
    assert found.removeprefix("no progress for 0.01 s (--hang-timeout): ") == words.replace("HOST", os.uname().nodename)
    told = next(line for line in said if line.startswith(f"dtrain:   rank 0, {'rank 3' if over == {0, 3} else 'rank 1'}"))
    assert re.fullmatch(r".* wait in MPI_Finalize( for \d+ s)?: their scripts are over", told)


def test_an_operation_of_horovods_is_known_by_its_frame() -> None:
    """What faulthandler says of a rank in hvd.allreduce: TensorFlow has made the function of text."""
    stacks = (
        "Current thread 0x00007f00 (most recent call first):\n"
        '  File "<string>", line 59 in horovod_allreduce\n'
        '  File "/site-packages/horovod/tensorflow/mpi_ops.py", line 130 in _allreduce\n'
        '  File "/home/me/train.py", line 10 in <module>\n'
    )
    assert (collective(stacks), place(stacks)) == ("horovod_allreduce", "train.py:10 in <module>")
    assert collective(stacks.replace("<string>", "/home/me/own.py")) == ""
