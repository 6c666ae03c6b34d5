"""What hosts answer, and what is made of it. Over ssh: tests/cluster/test_mpi_on_hosts.py."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import orjson
import pytest

from dtrain.binding import HostTopology
from dtrain.errors import UsageError
from dtrain.hosts import Host
from dtrain.launch import checks
from dtrain.launch.checks import Answer, Report
from dtrain.launch.interfaces import addresses_of
from dtrain.launch.mpi_families import FAMILIES, MpiInstallation, check_network, has_ipv6
from dtrain.launch.preflight import Question, answer_to
from dtrain.launch.reach import is_ipv6_alone, listen

TWO_CORES = HostTopology(cores=(frozenset({0}), frozenset({1})), nodes=(0, 0))
OWN = Answer(python="3.11.7", dtrain="1.0", topology=TWO_CORES, ports=[], shared=True, time=0.0, mpi="Open MPI 5.0.11")


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
        ({"interface": "eth0"}, 0.0, None, ""),
        ({"scratch": ""}, 0.0, None, ""),
        ({"scratch": "/tmp cannot hold mpirun's files: Read-only file system"}, 0.0, "problem", "cannot hold mpirun's files"),
        ({"network_problem": "--network 10.9.0.0/24: no"}, 0.0, "problem", "--network 10.9.0.0/24: no"),
    ],
)
def test_what_differs_is_told(other: dict[str, Any], ahead_s: float, level: str | None, said: str) -> None:
    found = checks.compared(dataclasses.replace(OWN, **other), OWN, ahead_s, tried_back=True)
    bad = [(check.level, check.said) for check in found if check.level != "ok"]
    assert len(bad) == (level is not None)
    assert all(found == level and said in words for found, words in bad)


def test_a_host_that_was_not_asked_for_its_mpi_is_not_told_to_lack_it() -> None:
    own = dataclasses.replace(OWN, mpi="")
    assert {check.level for check in checks.compared(own, own, 0.0)} == {"ok"}


def test_a_connection_back_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSH_CONNECTION", "127.0.0.1 5 127.0.0.1 22")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert answer_to(Question(back=port)).back == ""
    assert f"127.0.0.1:{port}: " in answer_to(Question(back=port)).back


def test_hosts_connect_back_by_ipv4_and_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    with listen() as server:
        port = server.getsockname()[1]
        for address in ("127.0.0.1", "::1"):
            monkeypatch.setenv("SSH_CONNECTION", f"{address} 5 {address} 22")
            assert answer_to(Question(back=port)).back == ""


def test_a_host_that_is_named_by_ipv6_tries_all_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSH_CONNECTION", "fe80::1%eth0 5 fe80::2%eth0 22")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        answer = answer_to(Question(back=port, addresses=["127.0.0.2", "127.0.0.1"]))
        assert (answer.reached, answer.back) == (["127.0.0.1"], "")
        assert answer_to(Question(back=port, addresses=["127.0.0.2"])).back.startswith(f"127.0.0.2:{port}: ")
        assert answer_to(Question(back=port, addresses=[])).back == "it has no such address"


@pytest.mark.parametrize(
    ("reached", "mpi", "ipv6", "level", "said"),
    [
        (["10.0.0.1", "fd00::1"], "MPICH 5", False, "ok", r"connects to this host \(10\.0\.0\.1\)"),
        ([], "Open MPI 5", True, "problem", r"by IPv4 or IPv6 \(it has none\); .* addresses that are not link-local"),
        (
            [],
            "MPICH 5",
            False,
            "problem",
            r"by IPv4 \(it has none\), and MPICH 5 knows no IPv6; give the hosts IPv4 addresses in one network, or an Open MPI",
        ),
        (
            [],
            "",
            False,
            "problem",
            r"Horovod over Gloo knows no IPv6; .* network, or start the ranks by MPI \(--controller mpi\); an elastic job",
        ),
    ],
)
def test_hosts_that_cannot_reach_this_one_are_told(reached: list[str], mpi: str, ipv6: bool, level: str, said: str) -> None:
    report = Report(host="fd00::2", answer=dataclasses.replace(OWN, reached=reached, back="" if reached else "it has none"))
    checks.compare_reach([report, Report(host="silent")], mpi, ipv6=ipv6)
    (check,) = report.checks
    assert (check.name, check.level) == ("network", level)
    assert re.search(said, check.said)


def test_names_that_mean_ipv6_alone_are_known() -> None:
    names = ("::1", "127.0.0.1", "no-such-host.invalid")
    assert [is_ipv6_alone(Host(name)) for name in names] == [True, False, False]


def test_a_host_of_two_names_is_told() -> None:
    """An old dtrain's answer, and that of a host without /proc, tell none's identity; a silent host tells nothing."""
    identities = {"node3": "three", "node2": "two", "fd77::3": "three", "old": "", "older": ""}
    asked = [
        (Host(name, slots), Report(host=name, answer=dataclasses.replace(OWN, identity=identity)))
        for slots, (name, identity) in enumerate(identities.items(), 1)
    ]
    checks.compare_identities([*asked, (Host("silent"), Report(host="silent"))])
    problems = [said for _, report in asked for said in report.of("problem")]
    assert problems == ["host fd77::3: is node3 again: name it once, as node3:4"]


def test_a_host_tells_who_it_is() -> None:
    """Another process of this host tells the same."""
    code = "from dtrain.launch.preflight import *; print(answer_to(Question()).identity)"
    here, again = (subprocess.check_output([sys.executable, "-c", code], text=True).strip() for _ in range(2))
    assert here == again == answer_to(Question()).identity
    assert os.uname().nodename in here


@pytest.mark.parametrize(
    ("title", "prints", "found"), [("Open MPI", "yes", True), ("Open MPI", "no", False), ("MPICH", "yes", False)]
)
def test_an_mpi_tells_whether_it_has_ipv6(tmp_path: Path, title: str, prints: str, found: bool) -> None:
    family = next(family for family in FAMILIES if family.title == title)
    program = tmp_path / "ompi_info"
    program.write_text(f"#!/bin/sh\necho package:x\necho options:ipv6:{prints}\n")
    program.chmod(0o755)
    mpi = MpiInstallation(mpirun=str(tmp_path / "mpirun"), family=family, version="5")
    assert has_ipv6(mpi) == found
    check_network("10.0.0.0/24", mpi)
    refused = (
        contextlib.nullcontext() if found else pytest.raises(UsageError, match=f"{title} 5 knows none; name a network of IPv4")
    )
    with refused:
        check_network("fd00::/64", mpi)
    program.unlink()
    assert has_ipv6(mpi) == (title == "Open MPI")


@pytest.mark.parametrize(
    ("prints", "scratch"), [("mpirun (Open MPI) 5.0.11", ""), ("HYDRA build details:\n    Version:  5.0.2", None)]
)
def test_only_an_mpi_that_keeps_files_is_asked_for_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prints: str, scratch: str | None
) -> None:
    """A /tmp that takes none is no problem to the other."""
    mpirun = tmp_path / "mpirun"
    mpirun.write_text(f"#!/bin/sh\necho '{prints}'\n")
    mpirun.chmod(0o755)
    monkeypatch.setenv("DTRAIN_MPIRUN", str(mpirun))
    assert answer_to(Question(mpi=True, scratch=True)).scratch == scratch


def test_addresses_that_others_cannot_use_are_left_out() -> None:
    assert addresses_of("lo", ipv6=True) == []
    found = addresses_of("", ipv6=True)
    assert (
        [address for address in found if ":" not in address]
        == addresses_of("", ipv6=False)
        == found[: len(addresses_of("", ipv6=False))]
    )
    assert not any(address.startswith(("127.", "fe80:")) or address == "::1" for address in found)


def test_an_address_in_the_network_is_looked_for() -> None:
    found = answer_to(Question(network="127.0.0.0/8"))
    assert (found.interface, found.network_problem) == ("lo", "")
    lacking = answer_to(Question(network="203.0.113.0/24"))
    assert lacking.interface == ""
    assert "--network 203.0.113.0/24: this host has no address in it; it is in " in lacking.network_problem


def test_an_answer_comes_back_whole() -> None:
    assert Answer.from_json(orjson.loads(orjson.dumps(OWN.to_json()))) == OWN


@pytest.mark.parametrize(
    ("hosts", "said"),
    [
        ({"a": (2, 2), "b": (2, 2)}, {}),
        ({"a": (0, 2), "b": (0, 2)}, {}),
        ({"a": (4, 1), "b": (1, 1)}, {}),
        ({"a": (4, 4), "b": (2, 3)}, {"b": "has 2 GPUs for 3 ranks: every rank sees all of them, .* give it fewer \\(-H b:2\\)"}),
        ({"a": (1, 2)}, {"a": "has 1 GPU for 2 ranks"}),
        ({"a": (4, 4), "b": (0, 4)}, {"b": "has no GPU, and host a has 4; use hosts that are alike"}),
        ({"a": (4, 0), "b": (0, 0)}, {}),  # the user says which GPUs ranks see
    ],
)
def test_hosts_with_too_few_gpus_are_told(hosts: dict[str, tuple[int, int]], said: dict[str, str]) -> None:
    """Number of GPUs and of ranks by host. No problem: a script may compute on the processors alone."""
    asked = [
        (Report(host=name, answer=dataclasses.replace(OWN, topology=dataclasses.replace(TWO_CORES, gpus=gpus))), ranks)
        for name, (gpus, ranks) in hosts.items()
    ]
    checks.compare_gpus([*asked, (Report(host="silent"), 2)])
    warned = {report.host: report.of("warning") for report, _ in asked if report.of("warning")}
    assert warned.keys() == said.keys()
    assert all(re.search(said[name], warned[name][0]) for name in said)
    assert [check.said for report, _ in asked for check in report.checks if check.level == "ok"] == [
        str(gpus) for name, (gpus, _) in hosts.items() if name not in said
    ]


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
    checks.compare_sight([*reports, Report(host="silent")], shared_fs)
    assert [check.level for report in reports for check in report.checks] == levels
    assert ["does not see" in check.said for report in reports for check in report.checks] == [not each for each in sees.values()]
