"""Which hosts an elastic job may use: fixed ones, or those that a program prints; and only those that answer."""

from __future__ import annotations

import os
import queue
from pathlib import Path

import pytest

from dtrain.errors import NotRunnable
from dtrain.hosts import Host
from dtrain.launch.discovery import Discovery, discover_hosts


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "hosts.sh"
    path.write_text("#!/bin/sh\ncat hosts\n")
    path.chmod(0o755)
    return path


def test_what_a_program_prints(program: Path) -> None:
    hosts = program.with_name("hosts")
    hosts.write_text("node1:2\n\nnode2 slots=3  # new\nnode3\n")
    assert discover_hosts(program) == (Host("node1", 2), Host("node2", 3), Host("node3", 1))
    hosts.write_text("")
    assert discover_hosts(program) == ()
    hosts.write_text("node1:0\n")
    with pytest.raises(NotRunnable, match=r"hosts\.sh, line 1: 'node1:0' gives no number of slots from 1"):
        discover_hosts(program)
    hosts.unlink()
    with pytest.raises(NotRunnable, match="failed with exit code 1: cat: hosts: No such file"):
        discover_hosts(program)


def test_horovod_is_told_labels_without_colons(program: Path) -> None:
    program.with_name("hosts").write_text("[::1] slots=2\n")
    discovery = Discovery((), program, print)
    assert discovery.find_available_hosts_and_slots() == {"0--1..ipv6": 2}


def test_a_program_that_fails_later_is_told_of_once(program: Path) -> None:
    said: list[str] = []
    hosts = program.with_name("hosts")
    hosts.write_text("localhost:1\n")
    discovery = Discovery((), program, said.append)
    assert discovery.find_available_hosts_and_slots() == {"localhost": 1}
    hosts.unlink()
    for _ in range(2):
        assert discovery.find_available_hosts_and_slots() == {"localhost": 1}
    assert len(said) == 1
    hosts.write_text("localhost:2\n")
    assert discovery.find_available_hosts_and_slots() == {"localhost": 2}


def test_a_host_on_which_a_worker_failed_counts_when_it_answers() -> None:
    discovery = Discovery((Host("localhost", 2), Host("nowhere.invalid")), None, print)
    assert discovery.find_available_hosts_and_slots() == {"localhost": 2, "nowhere.invalid": 1}
    for name in ("localhost", "nowhere.invalid"):
        discovery.doubt(name)
    assert discovery.find_available_hosts_and_slots() == {"localhost": 2}


def test_a_host_does_not_answer_where_ssh_cannot_be_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said: queue.Queue[str] = queue.Queue()
    path = os.environ["PATH"]
    monkeypatch.setenv("PATH", str(tmp_path))
    discovery = Discovery((Host("nowhere.invalid"),), None, said.put)
    monkeypatch.setenv("PATH", path)  # its threads have the environment that there was
    discovery.find_available_hosts_and_slots()
    discovery.doubt("nowhere.invalid")
    assert discovery.find_available_hosts_and_slots() == {}
    assert "host nowhere.invalid is taken not to answer: [Errno 2] No such file or directory: 'ssh'" in said.get(timeout=20)
