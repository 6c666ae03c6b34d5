"""Which failure of several is named as the first."""

from __future__ import annotations

import pytest

from dtrain.status import Kind, RankFailure, first_failure


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
