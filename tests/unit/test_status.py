"""Which failure of several is named as the first."""

from __future__ import annotations

from pathlib import Path

import pytest

from dtrain.files import write_json
from dtrain.layout import RunLayout
from dtrain.status import VANISHED, Kind, RankFailure, first_failure, name_who_left


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


LEFT = "rank 2 had left before with exit code 0, and the others still needed it"


@pytest.mark.parametrize(
    ("kind", "code", "message", "done", "told"),
    [
        ("consequence", 14, "", {"time": 9.9, "early": False}, f"lost its connection to another rank: {LEFT}"),
        ("consequence", 14, "", {"time": 10.1, "early": True}, f"lost its connection to another rank: {LEFT}"),  # noted late
        ("consequence", 14, "", {"time": 10.1, "early": False}, ""),
        ("consequence", 14, "", {"time": 12.0, "early": True}, ""),
        ("signal", 137, VANISHED, {"time": 9.9, "early": True}, f"{VANISHED}: {LEFT}"),
        ("signal", 137, VANISHED, {"time": 9.9, "early": False}, VANISHED),
        ("signal", 137, VANISHED, {"time": -50.0, "early": True}, VANISHED),
        ("signal", 137, "killed by SIGKILL", {"time": 9.9, "early": True}, "killed by SIGKILL"),
    ],
)
def test_who_left_with_0_is_named_where_others_fail_of_it(
    tmp_path: Path, kind: Kind, code: int, message: str, done: dict[str, object], told: str
) -> None:
    run = RunLayout(tmp_path / "run").begin_attempt(0, 3)
    write_json(run.rank(2).done, done)
    failed = RankFailure(rank=0, host="node", time=10.0, exit_code=code, kind=kind, message=message)
    assert name_who_left(run, failed, 3).message == told
