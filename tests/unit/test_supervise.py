"""What the supervisor makes of what many ranks have left."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from dtrain.files import write_json
from dtrain.job_options import Hangs
from dtrain.launch.agents import lost
from dtrain.launch.console import Console
from dtrain.launch.crew import order
from dtrain.launch.judge import Judge
from dtrain.launch.output import Output
from dtrain.launch.plan import LaunchPlan, PlannedHost, PlannedProcess
from dtrain.launch.supervise import Limits, Signals, Supervisor
from dtrain.layout import RunLayout
from dtrain.processes import ProcessRecord
from dtrain.status import VANISHED, RankFailure, RankProcess, write_record

_SIZE = 512
LEFT = "left with exit code 0 while others still needed it"


@pytest.mark.parametrize(
    ("code", "begun", "left", "cause"),
    [
        (1, _SIZE, 0, f"rank 7 on {os.uname().nodename} and 504 more: each {VANISHED}"),
        (0, 0, 0, "but rank 0, rank 1, rank 2, rank 3, rank 4, rank 5, rank 6, rank 7 and 504 more left no completion record"),
        (1, 0, 511, "after rank 0, 1, 2, 3, 4, 5, 6, 7 and 503 more had left with exit code 0, and others had not"),
    ],
)
def test_many_ranks_are_one_short_sentence(tmp_path: Path, code: int, begun: int, left: int, cause: str) -> None:
    ended = subprocess.Popen(["sleep", "60"])
    record = ProcessRecord.of(ended.pid)
    ended.kill()
    ended.wait()
    run = RunLayout(tmp_path / "run").begin_attempt(0, _SIZE)
    for rank in range(begun):
        write_record(run.rank(rank).process, record, durable=False)
    for rank in range(left):
        run.rank(rank).done.write_text("{}")
    launcher = PlannedProcess(name="mpirun", host=record.host, argv=("sh", "-c", f"exit {code}"), environment={}, cwd=tmp_path)
    plan = LaunchPlan(launcher="mpi", size=_SIZE, processes=(launcher,))
    status = Supervisor(plan, run, Limits(timeout_s=None, grace_s=1.0), Console(), Signals()).run()
    assert cause in status.cause
    assert len(status.cause) < 500


def test_what_another_host_writes_is_shown_as_it_comes(tmp_path: Path) -> None:
    """A file replaced by a longer copy stands for one of a network file system: only who opens it sees what came."""
    run, shown = RunLayout(tmp_path / "run").begin_attempt(0, 1), tmp_path / "shown"
    grow = "cp log longer; echo $word >>longer; mv longer log"
    wait = "n=0; until grep -q $word $0; do n=$((n + 1)); [ $n -lt 200 ] || exit 3; sleep 0.1; done"
    script = f"echo one >log; word=one; {wait}; word=two; {grow}; {wait}; word=three; {grow}".replace("log", "output.log")
    launcher = PlannedProcess(
        name="srun", host="here", argv=("sh", "-c", script, str(shown)), environment={}, cwd=run.rank(0).root
    )
    plan = LaunchPlan(launcher="slurm", size=1, processes=(launcher,), ordered=True)
    with open(shown, "w") as out:
        Supervisor(plan, run, Limits(timeout_s=None, grace_s=1.0), Console(out, out), Signals()).run()
    assert [line.partition("] ")[2] for line in shown.read_text().splitlines()] == ["one", "two", "three"]


def test_who_left_early_is_the_first_of_those_whom_mpi_killed_for_it(tmp_path: Path) -> None:
    """As MPICH's mpiexec does: it kills the guards too."""
    run = RunLayout(tmp_path / "run").begin_attempt(0, 3)
    for rank in range(3):
        write_record(run.rank(rank).process, ProcessRecord(host="node", pid=2**22, started=0.0), durable=False)
    write_json(run.rank(2).done, {"time": time.time(), "early": True})
    launcher = PlannedProcess(name="mpirun", host="node", argv=("false",), environment={}, cwd=tmp_path)
    plan = LaunchPlan(launcher="mpi", size=3, processes=(launcher,))
    status = Supervisor(plan, run, Limits(timeout_s=None, grace_s=1.0), Console(), Signals()).run()
    assert status.cause == f"rank 2 on node: {LEFT}; then rank 0 on node, rank 1 on node: each {VANISHED}"
    assert (status.exit_code, status.failure is not None and status.failure.rank) == (1, 2)


@pytest.fixture
def judged(tmp_path: Path) -> Callable[..., RankFailure]:
    """Judges an attempt of three ranks under mpirun, of which one has failed."""
    run = RunLayout(tmp_path / "run").begin_attempt(0, 3)
    for rank in range(3):
        write_record(run.rank(rank).process, ProcessRecord(host="node", pid=2**22, started=0.0), durable=False)
        write_json(run.rank(rank).heartbeat, {"over": None})
    launcher = PlannedProcess(name="mpirun", host="node", argv=("mpirun",), environment={}, cwd=tmp_path)
    plan = LaunchPlan(launcher="horovod", size=3, processes=(launcher,))
    judge = Judge(plan, run, Output(plan, run, Console(), str), dict.fromkeys(range(3), ""), lambda rank: "node")

    def first(failure: RankFailure, over: Mapping[int, float], left: Mapping[int, float], early: bool) -> RankFailure:
        for rank, when in over.items():
            write_json(run.rank(rank).heartbeat, {"over": when})
        for rank, when in left.items():
            write_json(run.rank(rank).done, {"time": when, "early": early})
        write_record(run.rank(failure.rank).error, failure, durable=False)
        found = judge.outcome({failure.rank: failure}, {failure.rank: failure}, set(), 1)[2]
        assert found is not None
        return found

    return first


@pytest.mark.parametrize(
    ("over", "left", "early", "first"),
    [
        ({2: 10.1}, {}, False, (1, VANISHED)),
        ({2: 10.4}, {2: 10.5}, False, (1, VANISHED)),  # it caught the exception
        ({}, {2: 10.5}, True, (1, VANISHED)),
        ({2: 9.9}, {2: 10.5}, False, (2, LEFT)),
        ({1: 9.9}, {}, False, (1, LEFT)),  # killed while it waited in MPI_Finalize
    ],
)
def test_who_was_killed_at_work_ended_horovod_unless_another_had_left(
    judged: Callable[..., RankFailure], over: dict[int, float], left: dict[int, float], early: bool, first: tuple[int, str]
) -> None:
    """Rank 1 was killed with its guard, and rank 0 has Horovod's word."""
    word = RankFailure(rank=0, host="node", time=10.0, exit_code=1, kind="consequence", message="Horovod has been shut down")
    found = judged(word, over=over, left=left, early=early)
    assert (found.rank, found.message.partition(";")[0]) == first


@pytest.mark.parametrize(("left_s", "first"), [(-0.1, 2), (4.0, 1)])
def test_who_left_after_one_was_killed_is_not_why(judged: Callable[..., RankFailure], left_s: float, first: int) -> None:
    """Rank 1 was killed with its guard, by which rank 0 lost its connection; rank 2 left so many seconds later."""
    noticed = time.time() - 10.0
    lost = RankFailure(rank=0, host="node", time=noticed, exit_code=14, kind="consequence", message="lost")
    assert judged(lost, over={}, left={2: noticed + left_s}, early=True).rank == first


def test_a_daemon_is_lost_where_mpirun_ends_well_and_a_rank_of_another_host_left_no_word(tmp_path: Path) -> None:
    """Open MPI's mpirun ends with 0 then; a guard that is killed too leaves no record."""
    run = RunLayout(tmp_path / "run").begin_attempt(0, 2)
    for rank, host in enumerate(("here", "there")):
        write_record(run.rank(rank).process, ProcessRecord(host=host, pid=2**22, started=0.0), durable=False)
    launcher = PlannedProcess(name="mpirun", host="here", argv=("true",), environment={}, cwd=tmp_path)
    plan = LaunchPlan(launcher="mpi", size=2, processes=(launcher,), other_hosts=(PlannedHost(name="there", ranks=(1,)),))
    judge = Judge(plan, run, Output(plan, run, Console(), str), {0: "", 1: ""}, ["here", "there"].__getitem__)
    ended = {0: RankFailure.now(0, "ended", 143, "ended by SIGTERM")}
    code, cause, failure = judge.outcome(ended, ended, {1}, 0)
    assert (code, failure is not None and failure.rank) == (255, 1)
    assert cause == "rank 1 on there: lost: the daemon of mpirun on this host, by which it was started, has died"


def test_beats_that_nobody_asks_for_are_not_read(tmp_path: Path) -> None:
    """Who read this one would wait for ever."""
    run = RunLayout(tmp_path / "run").begin_attempt(0, 1)
    os.mkfifo(run.rank(0).heartbeat)
    process = PlannedProcess(name="sleep", host="node", argv=("sleep", "1.5"), environment={}, cwd=tmp_path)
    plan = LaunchPlan(launcher="local", size=1, processes=(process,))
    unwatched = Limits(timeout_s=None, grace_s=1.0, hangs=Hangs(hang_timeout_s=None, heartbeat_timeout_s=None))
    assert Supervisor(plan, run, unwatched, Console(), Signals()).run().is_over


def test_of_a_lost_host_not_every_rank_is_named() -> None:
    host = PlannedHost(name="node1", ranks=tuple(range(12)))
    assert lost(host, "does not answer", 0.0, []).message.endswith("ranks 0, 1, 2, 3, 4, 5, 6, 7 and 4 more")
    alone = lost(PlannedHost(name="node2", ranks=(3,)), "does not answer", 0.0, [])
    assert alone.describe() == "rank 3 on node2: lost: host node2 does not answer"


def test_orders_are_left_for_ranks_that_look_for_them(tmp_path: Path) -> None:
    run, here = RunLayout(tmp_path / "run").begin_attempt(0, 4), vars(ProcessRecord.of(os.getpid()))
    elsewhere = {**here, "host": "elsewhere"}
    for rank, (record, ordered) in enumerate([(elsewhere, True), (elsewhere, False), (here, True)]):
        write_record(run.rank(rank).process, RankProcess(**record, ordered=ordered), durable=False)
    assert [order(run, rank, "stacks") for rank in range(4)] == [True, False, False, False]
    assert [run.rank(rank).orders.exists() for rank in range(4)] == [True, False, False, False]
    assert run.rank(0).orders.read_text() == "stacks\n"
