"""Two hosts on this machine (tests/testbed), and a user's folder that both see."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from tests.console.conftest import ROOT, Project, wait_until, watched

__all__ = ["wait_until"]

SCRIPT = ROOT / "tests" / "testbed" / "hosts.sh"


@dataclass(frozen=True)
class Testbed:
    """node1 and node2, each with a network, a name and processes of its own."""

    __test__ = False
    state: Path

    def __call__(self, *args: str) -> None:
        environ = {**os.environ, "TESTBED": str(self.state)}
        subprocess.run([SCRIPT, *args], env=environ, check=True, stdin=subprocess.DEVNULL, timeout=60)


@dataclass
class ClusterProject(Project):
    """A folder that both hosts see; its commands are typed on node1."""

    hosts: Testbed = field(kw_only=True)

    def environ(self) -> dict[str, str]:
        return {**super().environ(), "TESTBED": str(self.hosts.state)}

    def argv(self, *args: str) -> list[str]:
        return [str(SCRIPT), "exec", "node1", "env", "-C", str(self.folder), *super().argv(*args)]

    def find(self, job: subprocess.Popen[str], *words: str) -> psutil.Process:
        """The one process below a job whose command line holds all these words."""
        found = [p for p in psutil.Process(job.pid).children(recursive=True) if all(w in " ".join(p.cmdline()) for w in words)]
        return found[-1]


@pytest.fixture(scope="session")
def testbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Testbed]:
    """Up for all tests that need it; down in the end, whatever happened."""
    hosts = Testbed(tmp_path_factory.mktemp("testbed"))
    try:
        pythons = [Path(sys.prefix), Path(sys.base_prefix)]
        if "DTRAIN_TEST_MPICH_PYTHON" in os.environ:
            pythons.append(Path(os.environ["DTRAIN_TEST_MPICH_PYTHON"]).absolute().parents[1])
        shared = {str(path.resolve()) for path in (tmp_path_factory.getbasetemp(), ROOT, *pythons)}
        hosts("up", "2", *sorted(shared))
        yield hosts
    finally:
        hosts("down")


@pytest.fixture
def project(tmp_path: Path, testbed: Testbed) -> Iterator[Project]:
    yield from watched(ClusterProject(tmp_path, hosts=testbed))


@pytest.fixture
def cut(testbed: Testbed) -> Iterator[Callable[[str], None]]:
    """Cuts a host off; it is back when the test ends, and what waited for that has had its time."""
    were: list[str] = []

    def cut(node: str) -> None:
        were.append(node)
        testbed("cut", node)

    yield cut
    for node in were:
        testbed("heal", node)
