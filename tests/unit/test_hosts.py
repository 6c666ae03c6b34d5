"""Hosts as users write them, and which rank goes where."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from dtrain.errors import UsageError
from dtrain.hosts import Host, parse_hosts, place, read_hostfile
from dtrain.job_options import ClusterOptions
from dtrain.spec import JobSpec


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("node1", [("node1", 1)]),
        ("a:2,b,[::1]:4", [("a", 2), ("b", 1), ("::1", 4)]),
        (" a:2 , 10.0.0.7:3 ", [("a", 2), ("10.0.0.7", 3)]),
        ("[fd00::0:1]", [("fd00::1", 1)]),
        ("[fe80::1%eth0]:2", [("fe80::1%eth0", 2)]),
        ("a:2,b,a", [("a", 3), ("b", 1)]),
        ("my-node.example_1.org:16", [("my-node.example_1.org", 16)]),
    ],
)
def test_hosts_on_the_command_line(text: str, hosts: list[tuple[str, int]]) -> None:
    assert parse_hosts(text) == tuple(Host(*each) for each in hosts)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is not a host"),
        ("a,,b", "is not a host"),
        ("a:0", "'a:0' gives no number of slots from 1"),
        ("a:two", "gives no number of slots"),
        ("a:", "gives no number of slots"),
        ("fd00::1:2", "gives no number of slots.*IPv6 address in brackets"),
        ("[node1]:2", "not an IPv6 address"),
        ("[fe80::1]:2", r"fe80::1 is link-local; name the interface by which it is reached, as \[fe80::1%eth0\]"),
        ("[fd00::1%eth0]", "'fd00::1%eth0' is no address with an interface"),
        ("[fe80::1%-oA=b]", "no address with an interface"),
        ("[fe80::1%a;b]", "no address with an interface"),
        ("-oProxyCommand=x", "is not a host"),
        ("me@a:2", "names a user; name the host alone"),
        ("a b", "is not a host"),
        ("a;reboot", "is not a host"),
    ],
)
def test_what_is_no_host_is_refused(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parse_hosts(text)


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("node1", "node1"),
        ("10.0.0.7", "10.0.0.7"),
        ("fd00::1", "fd00--1..ipv6"),
        ("::1", "0--1..ipv6"),
        ("fd00::", "fd00--..ipv6"),
        ("fe80::1%enp0s3.7-x", "fe80--1senp0s3_d7-x..ipv6"),
        ("fe80::1%my_d0._u", "fe80--1smy_ud0_d_uu..ipv6"),
    ],
)
def test_a_label_has_no_colon_and_leads_back_to_the_host(name: str, label: str) -> None:
    assert Host(name, 2).label == label
    assert Host.labelled(label, 2) == Host(name, 2)


def test_labels_differ_before_their_first_dot() -> None:
    """Open MPI knows a host by that part alone."""
    first = {Host(f"fe80::1%eth0{interface}").label.partition(".")[0] for interface in ("", ".100", ".200", "_d100")}
    assert len(first) == 4


def test_no_server_is_asked_for_a_label() -> None:
    with pytest.raises(UnicodeError, match="label"):
        socket.getaddrinfo(Host("fd00::1").label, None)


def test_hostfiles_of_all_kinds(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text(
        "\ufeff# a cluster\r\n\nnode1 slots = 2\nnode2:3   # MPICH\n  node3\nnode4 slots=1 max_slots=4\n[::1]:2\nnode1\n"
    )
    assert read_hostfile(file) == (Host("node1", 3), Host("node2", 3), Host("node3"), Host("node4"), Host("::1", 2))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("# nobody\n", "names no host"),
        ("node1:2 slots=3\n", "line 1: node1:2 and slots=3 both say how many"),
        ("node1\nnode2 slots=x\n", "line 2: 'slots=x' gives no number"),
        ("node1 slots\n", "'slots' gives no number"),
    ],
)
def test_a_hostfile_that_is_wrong_is_refused(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "hosts"
    file.write_text(text)
    with pytest.raises(UsageError, match=words):
        read_hostfile(file)


def test_a_hostfile_that_is_not_there_is_no_job_on_one_host(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"hosts cannot be read: No such file or directory; name a file"):
        read_hostfile(tmp_path / "hosts")


def test_hosts_are_filled_by_rank() -> None:
    assert [host.name for host in place(4, parse_hosts("a:2,b:3"))] == ["a", "a", "b", "b"]
    with pytest.raises(UsageError, match=r"5 tasks exceed 2 hosts x 2 slots = 4; add hosts .*or lower --workers"):
        place(5, parse_hosts("a:2,b:2"))
    with pytest.raises(UsageError, match=r"5 tasks exceed a:3 \+ b:1 = 4"):
        place(5, parse_hosts("a:3,b"))


def test_a_spec_knows_its_hosts(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("")
    hosts = parse_hosts("a:2,b:2")
    spec = JobSpec(target=str(script), workers=2, launcher="parameter_server", cluster=ClusterOptions(chief=True), hosts=hosts)
    assert spec.to_json()["hosts"] == ({"name": "a", "slots": 2}, {"name": "b", "slots": 2})
    with pytest.raises(UsageError, match="5 tasks exceed"):
        JobSpec(target=str(script), workers=3, launcher="parameter_server", cluster=ClusterOptions(chief=True), hosts=hosts)


def test_mpi_has_hosts_and_a_network(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("")
    hosts = parse_hosts("a:2,b:2")
    assert JobSpec(target=str(script), workers=1, hosts=hosts).launcher_name == "mpi"
    with pytest.raises(UsageError, match="5 tasks exceed 2 hosts x 2 slots = 4"):
        JobSpec(target=str(script), workers=5, hosts=hosts)
    with pytest.raises(UsageError, match=r"-H and --hostfile go with --launcher mpi, horovod, .* not with local"):
        JobSpec(target=str(script), workers=1, launcher="local", hosts=hosts)
    assert JobSpec(target=str(script), workers=2, hosts=parse_hosts("a,[fe80::1%eth0]")).hosts[1].name == "fe80::1%eth0"
    with pytest.raises(UsageError, match="the address fe80::1%eth0 is link-local: other tasks cannot reach it"):
        JobSpec(target=str(script), workers=2, launcher="multi_worker", hosts=parse_hosts("a,[fe80::1%eth0]"))
    assert JobSpec(target=str(script), workers=4, hosts=hosts, network="10.0.0.0/24").network == "10.0.0.0/24"
    with pytest.raises(UsageError, match=r"--network 10.0.0.1/24: .* has host bits set; give a network as 10.0.0.0/24"):
        JobSpec(target=str(script), workers=4, hosts=hosts, network="10.0.0.1/24")
    with pytest.raises(UsageError, match="--network goes with -H or --hostfile"):
        JobSpec(target=str(script), workers=4, network="10.0.0.0/24")
    with pytest.raises(UsageError, match="--no-shared-fs goes with -H or --hostfile"):
        JobSpec(target=str(script), workers=4, shared_fs=False)
