"""When a rank hangs, and when it only waits."""

from __future__ import annotations

import os
import time
from pathlib import Path

from dtrain.job_options import Hangs
from dtrain.launch.agents import Agents
from dtrain.launch.beats import Beats
from dtrain.launch.crew import Crew
from dtrain.launch.hang import HangWatch
from dtrain.launch.plan import LaunchPlan
from dtrain.layout import RunLayout
from dtrain.processes import ProcessRecord
from dtrain.progress import PROGRESS
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
