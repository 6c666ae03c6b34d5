"""Which failure of several is named as the first."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from dtrain.files import write_json
from dtrain.layout import RunLayout
from dtrain.status import VANISHED, Kind, RankFailure, blame_who_left, first_failure, write_record


def failure(rank: int, time: float, kind: Kind, exit_code: int, task: str) -> RankFailure:
    return RankFailure(rank=rank, host="node", time=time, exit_code=exit_code, kind=kind, message="", task=task)


@pytest.mark.parametrize(("kind", "code"), [("signal", 137), ("exit", 3)])
def test_who_is_gone_goes_before_who_failed_of_it(kind: Kind, code: int) -> None:
    """A chief loses its server's connection before the server's guard has noted the end."""
    chief = failure(0, 10.0, "exception", 1, "chief 0")
    assert first_failure([chief, failure(3, 10.02, kind, code, "ps 0")]) == failure(3, 10.02, kind, code, "ps 0")
    assert first_failure([chief, failure(3, 12.0, kind, code, "ps 0")]) == chief
    rank = failure(0, 10.0, "exception", 1, "")
    assert first_failure([failure(1, 10.02, kind, code, ""), rank]) == rank


LEFT = "rank 2 on {here}: left with exit code 0 while others still needed it; then rank 0 on node: "
SHUT_DOWN = "Horovod has been shut down"
LOST = "lost its connection to another rank"


@pytest.mark.parametrize(
    ("kind", "code", "message", "done", "then"),
    [
        ("consequence", 14, "", {"time": 9.9, "early": False}, LOST),
        ("consequence", 14, "", {"time": 10.1, "early": True}, LOST),  # noted late
        ("consequence", 14, "", {"time": 10.1, "early": False}, ""),
        ("consequence", 14, "", {"time": 12.0, "early": True}, ""),
        ("signal", 137, VANISHED, {"time": 9.9, "early": True}, VANISHED),
        ("signal", 137, VANISHED, {"time": 9.9, "early": False}, ""),
        ("signal", 137, VANISHED, {"time": -50.0, "early": True}, ""),
        ("signal", 137, "killed by SIGKILL", {"time": 9.9, "early": True}, ""),
        ("consequence", 1, f"UnknownError: {SHUT_DOWN}. This", {"time": 9.9, "early": True}, SHUT_DOWN),
        ("exception", 1, "ValueError: bad batch", {"time": 9.9, "early": True}, ""),
    ],
)
def test_who_left_with_0_is_named_where_others_fail_of_it(
    tmp_path: Path, kind: Kind, code: int, message: str, done: dict[str, object], then: str
) -> None:
    run = RunLayout(tmp_path / "run").begin_attempt(0, 3)
    write_json(run.rank(2).done, done)
    failed = RankFailure(rank=0, host="node", time=10.0, exit_code=code, kind=kind, message=message)
    blamed = blame_who_left(run, failed, 3)
    if not then:
        assert blamed == failed
    else:
        assert (blamed.rank, blamed.exit_code) == (2, 1)
        assert blamed.describe() == LEFT.format(here=os.uname().nodename) + then


def test_whose_end_was_seen_was_not_killed_by_mpi(tmp_path: Path) -> None:
    """As over Gloo, where another may catch what it raises of that, and leave at once."""
    run = RunLayout(tmp_path / "run").begin_attempt(0, 3)
    write_json(run.rank(2).done, {"time": 9.9, "early": True})
    killed = RankFailure(rank=0, host="node", time=10.0, exit_code=137, kind="signal", message=VANISHED)
    assert blame_who_left(run, killed, 3).rank == 2
    write_record(run.rank(0).error, killed)
    assert blame_who_left(run, killed, 3) == killed


@pytest.mark.parametrize(
    ("kind", "over", "blamed"),
    [("ended", 9.9, 2), ("ended", None, 0), ("exception", 9.9, 0), (None, 9.9, 2), (None, 12.0, 0)],
)
def test_who_was_over_and_waits_for_the_others_has_left(
    tmp_path: Path, kind: Kind | None, over: float | None, blamed: int
) -> None:
    """Horovod is shut down in all ranks when one ends, which is ended with the others, or killed with its guard."""
    run = RunLayout(tmp_path / "run").begin_attempt(0, 3)
    write_json(run.rank(1).heartbeat, {"over": None})
    write_json(run.rank(2).heartbeat, {"over": over})
    if kind is not None:
        write_record(run.rank(2).error, failure(2, 10.4, kind, 143, ""))
    failed = RankFailure(rank=0, host="node", time=10.0, exit_code=1, kind="consequence", message=SHUT_DOWN)
    assert blame_who_left(run, failed, 3).rank == blamed
    lost = dataclasses.replace(failed, message="exited with code 14", exit_code=14)  # MPI_Finalize keeps who is over
    assert blame_who_left(run, lost, 3) == lost
    task = dataclasses.replace(failed, task="worker 0")  # others of a cluster may leave when they like
    assert blame_who_left(run, task, 3) == task
