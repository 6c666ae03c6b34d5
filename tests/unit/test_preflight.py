"""What hosts answer, and what is made of it. Over ssh: tests/cluster/test_mpi_on_hosts.py."""

from __future__ import annotations

import dataclasses
import socket
from typing import Any

import pytest

from dtrain.launch import preflight
from dtrain.launch.preflight import Answer, Question, Report, answer_to

OWN = Answer(python="3.11.7", dtrain="1.0", cores=2, gpus=0, ports=[], shared=True, time=0.0, mpi="Open MPI 5.0.11")


@pytest.mark.parametrize(
    ("other", "ahead_s", "level", "said"),
    [
        ({}, 0.9, None, ""),
        ({"python": "3.11.2"}, 0.0, None, ""),
        ({"dtrain": "0.9"}, 0.0, "problem", "has dtrain 0.9, and this host has 1.0; install the same on all"),
        ({"python": "3.12.1"}, 0.0, "problem", "and this host has 3.11.7; use the same on all"),
        ({"mpi": "MPICH 5.0.2"}, 0.0, "problem", "has MPICH 5.0.2, and this host has Open MPI 5.0.11; use the same MPI on all"),
        ({"mpi": "", "mpi_problem": "MPI is not installed; do so"}, 0.0, "problem", "MPI is not installed; do so"),
        ({"back": "10.0.0.1:99: timed out"}, 0.0, "warning", "cannot connect to this host at 10.0.0.1:99: timed out"),
        ({}, -12.3, "warning", "its clock is 12.3 s behind"),
    ],
)
def test_what_differs_is_told(other: dict[str, Any], ahead_s: float, level: str | None, said: str) -> None:
    checks = preflight._compared(dataclasses.replace(OWN, **other), OWN, ahead_s, tried_back=True)
    bad = [(check.level, check.said) for check in checks if check.level != "ok"]
    assert len(bad) == (level is not None)
    assert all(found == level and said in words for found, words in bad)


def test_a_host_that_was_not_asked_for_its_mpi_is_not_told_to_lack_it() -> None:
    own = dataclasses.replace(OWN, mpi="")
    assert {check.level for check in preflight._compared(own, own, 0.0)} == {"ok"}


def test_a_connection_back_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSH_CONNECTION", "127.0.0.1 5 127.0.0.1 22")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert answer_to(Question(back=port)).back == ""
    assert f"127.0.0.1:{port}: " in answer_to(Question(back=port)).back


@pytest.mark.parametrize(
    ("sees", "shared_fs", "levels"),
    [
        ({"b": True, "c": True}, True, ["ok", "ok"]),
        ({"b": False, "c": False}, True, ["ok", "ok"]),
        ({"b": True, "c": False}, True, ["ok", "problem"]),
        ({"b": True, "c": False}, False, ["ok", "ok"]),
    ],
)
def test_that_only_some_see_the_workspace_is_a_problem(sees: dict[str, bool], shared_fs: bool, levels: list[str]) -> None:
    reports = [Report(host=name, answer=dataclasses.replace(OWN, shared=shared)) for name, shared in sees.items()]
    preflight._compare_sight([*reports, Report(host="silent")], shared_fs)
    assert [check.level for report in reports for check in report.checks] == levels
    assert ["does not see" in check.said for report in reports for check in report.checks] == [not each for each in sees.values()]
