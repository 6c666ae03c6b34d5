"""`dtrain run -H '[fd77::1],[fd77::2]'`: hosts that are named by IPv6 addresses, have no others, or know no names."""

from __future__ import annotations

import ipaddress
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.console.conftest import watched

from .conftest import ClusterProject, Testbed
from .test_mpi_on_hosts import PRELUDE, MpiProject

pytestmark = [pytest.mark.needs("netcluster"), pytest.mark.needs("ipv6")]

OPENMPI = pytest.mark.parametrize("mpi", ["openmpi"], indirect=True)
NODES = ("node1", "node2", "node3")
WORLD = PRELUDE + "print('one of', comm.size, flush=True)\n"


@pytest.fixture(params=["openmpi", pytest.param("mpich", marks=pytest.mark.needs("mpich"))])
def mpi(request: pytest.FixtureRequest, tmp_path: Path, testbed: Testbed) -> Iterator[MpiProject]:
    project = MpiProject(tmp_path, hosts=testbed)
    project.python = os.environ["DTRAIN_TEST_MPICH_PYTHON"] if request.param == "mpich" else sys.executable
    yield from watched(project)


def addresses(testbed: Testbed, node: str) -> list[str]:
    """All of its eth0, with the length of their networks' prefixes."""
    return re.findall(r"inet6? (\S+)", testbed("exec", node, "ip", "addr", "show", "dev", "eth0"))


def link_local(testbed: Testbed, node: str) -> str:
    return next(each.partition("/")[0] for each in addresses(testbed, node) if each.startswith("fe80:"))


@pytest.fixture
def without(testbed: Testbed) -> Iterator[Callable[[str], None]]:
    """Takes the addresses in a network from all hosts, for the time of a test."""
    taken: list[tuple[str, str]] = []

    def without(network: str) -> None:
        for node in NODES:
            for each in addresses(testbed, node):
                if ipaddress.ip_address(each.partition("/")[0]) in ipaddress.ip_network(network):
                    taken.append((node, each))
                    testbed("exec", node, "ip", "addr", "del", each, "dev", "eth0")

    yield without
    for node, each in taken:
        testbed("exec", node, "ip", "addr", "add", each, "dev", "eth0")


@pytest.fixture
def nameless(testbed: Testbed) -> Iterator[None]:
    """No host knows a name, not even its own."""
    file = testbed.state / "hosts"  # the same one, which is mounted on all hosts
    names = file.read_text()
    file.write_text("127.0.0.1 localhost\n")
    yield
    file.write_text(names)


@pytest.fixture
def names_of_ipv6(testbed: Testbed) -> Iterator[None]:
    """Hosts' names stand for their IPv6 addresses alone."""
    file = testbed.state / "hosts"
    names = file.read_text()
    file.write_text("127.0.0.1 localhost\n" + "".join(f"fd77::{k} {node}\n" for k, node in enumerate(NODES, 1)))
    yield
    file.write_text(names)


@pytest.mark.usefixtures("names_of_ipv6")
def test_hosts_whose_names_mean_ipv6_alone(mpi: MpiProject, without: Callable[[str], None]) -> None:
    """Daemons of MPICH's, which know IPv4 alone, cannot connect to this host's name."""
    job = ("run", "-H", "node1,node2", mpi.script(WORLD))
    done = mpi.dtrain(*job)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["[node1:0] one of 2", "[node2:1] one of 2"]
    without("10.77.0.0/24")
    done = mpi.dtrain(*job)
    if mpi.python == sys.executable:
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode == 127
        assert "host node2: cannot connect to this host by IPv4 (it has no such address), and MPICH" in done.stderr


@pytest.mark.usefixtures("nameless")
def test_a_hostfile_of_addresses(mpi: MpiProject) -> None:
    hosts = ("[fd77::1]:1", "[fd77::2] slots=2  # by both", f"[{link_local(mpi.hosts, 'node3')}%eth0]")
    (mpi.folder / "hosts").write_text("\n".join(hosts))
    done = mpi.dtrain("run", "--hostfile", "hosts", mpi.script(WORLD))
    assert done.returncode == 0, done.stderr
    places = ("node1:0", "node2:1", "node2:2", "node3:3")
    assert sorted(done.stdout.splitlines()) == [f"[{place}] one of 4" for place in places]


@OPENMPI
def test_another_host_that_is_named_twice_is_told(mpi: MpiProject) -> None:
    """Open MPI's ranks on it would compute wrong sums, and crash."""
    done = mpi.dtrain("run", "-H", "node1,node2,node3,[fd77::3]:1", mpi.script("print('ran')"))
    assert (done.returncode, done.stdout) == (127, "")
    assert done.stderr == "dtrain: host fd77::3: is node3 again: name it once, as node3:2\n"


@OPENMPI
def test_hosts_with_ipv6_alone(mpi: MpiProject, without: Callable[[str], None]) -> None:
    without("10.77.0.0/24")
    done = mpi.dtrain("run", "-H", "[fd77::1],[fd77::2]", "--network", "fd77::/64", mpi.script(WORLD))
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["[node1:0] one of 2", "[node2:1] one of 2"]


def test_a_network_of_ipv6_wants_an_mpi_that_knows_it(mpi: MpiProject) -> None:
    done = mpi.dtrain("run", "-H", "node1,node2", "--network", "fd77::/64", mpi.script(WORLD))
    if mpi.python == sys.executable:
        assert done.returncode == 0, done.stderr
    else:
        assert (done.returncode, done.stdout) == (2, "")
        assert "--network fd77::/64 is of IPv6, and MPICH " in done.stderr
        assert not list((mpi.folder / "workspace").glob("runs/*"))


def test_hosts_that_their_ranks_could_not_reach_are_told(mpi: MpiProject, without: Callable[[str], None]) -> None:
    other = f"{link_local(mpi.hosts, 'node2')}%eth0"
    without("10.77.0.0/24")
    without("fd77::/64")
    done = mpi.dtrain("run", "-H", f"node1,[{other}]", mpi.script("print('ran')"))
    assert (done.returncode, done.stdout) == (127, "")
    by = "IPv4 or IPv6" if mpi.python == sys.executable else "IPv4"
    assert f"host {other}: cannot connect to this host by {by} (it has no such address)" in done.stderr


@OPENMPI
def test_doctor_says_at_which_address_a_host_connects(mpi: MpiProject) -> None:
    (host,) = json.loads(mpi.dtrain("doctor", "-H", "[fd77::2]:1", "--json").stdout)
    assert host["host"] == "fd77::2"
    checks = {check["name"]: (check["level"], check["said"]) for check in host["checks"]}
    assert checks["network"] == ("ok", "connects to this host (10.77.0.1)")


ELASTIC = """
import socket
import horovod.tensorflow as hvd
import tensorflow as tf
from horovod.common.elastic import ObjectState

hvd.init()

@hvd.elastic.run
def train(state):
    print("the sum is", float(hvd.allreduce(tf.constant(1.0), op=hvd.Sum, name="one")), flush=True)

train(ObjectState(bcast_object=hvd.broadcast_object, get_rank=hvd.rank))
"""


@pytest.mark.needs("horovod")
def test_an_elastic_job_finds_hosts_by_address(project: ClusterProject) -> None:
    program = project.folder / "hosts.sh"
    program.write_text("#!/bin/sh\necho '[fd77::1]:1'; echo '[fd77::2] slots=1'\n")
    program.chmod(0o755)
    job = ("run", "--launcher", "horovod", "-n", "2", "--min-workers", "2", "--discovery", "hosts.sh")
    done = project.dtrain(*job, project.script(ELASTIC), timeout=110)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if "the sum is" in line]
    assert sorted(line.split(":")[0] for line in said) == ["[node1", "[node2"]
    assert all(line.endswith("the sum is 2.0") for line in said)


@pytest.mark.needs("horovod")
def test_horovods_ranks_over_gloo_want_ipv4(project: ClusterProject, without: Callable[[str], None]) -> None:
    without("10.77.0.0/24")
    job = ("run", "--launcher", "horovod", "--controller", "gloo", "-H")
    done = project.dtrain(*job, "[fd77::1],[fd77::2]", project.script(""))
    assert done.returncode == 127
    said = "host fd77::2: cannot connect to this host by IPv4 (it has no such address), and Horovod over Gloo knows no IPv6"
    assert said in done.stderr
    done = project.dtrain(*job, "[fd77::1]", project.script(""))
    assert done.returncode == 127
    assert "this host has no IPv4 address at eth0, by which Horovod's ranks over Gloo would talk" in done.stderr
