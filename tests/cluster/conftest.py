"""Hosts on this machine (tests/testbed), Slurm on them, and a user's folder that all see."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from dtrain.launch.sbatch import SlurmJob
from tests.console.conftest import ROOT, Project, wait_until, watched

__all__ = ["wait_until"]

SCRIPT = ROOT / "tests" / "testbed" / "hosts.sh"
SLURM = SCRIPT.with_name("slurm.sh")
LEAVE_S = 15.0
"""Seconds after a test until nothing of it may be left on any host."""


@dataclass(frozen=True)
class Testbed:
    """node1, node2 and node3, each with a network, a name and processes of its own."""

    __test__ = False
    state: Path

    def __call__(self, *args: str) -> str:
        return self.run(SCRIPT, *args)

    def traffic(self, node: str) -> tuple[int, int]:
        """Bytes that a host has received and sent through its interface."""
        line = next(line for line in self("exec", node, "cat", "/proc/net/dev").splitlines() if "eth0:" in line)
        counters = line.partition(":")[2].split()
        return int(counters[0]), int(counters[8])

    @property
    def first_processes(self) -> list[int]:
        """That of every host, by which its namespaces are found."""
        outer = [int(file.read_text()) for file in sorted(self.state.glob("node*.outer"))]
        return [int(Path(f"/proc/{pid}/task/{pid}/children").read_text()) for pid in outer]

    def processes(self) -> list[psutil.Process]:
        """All that run on the hosts, whoever started them and whatever they carry in their environment."""
        hosts = {os.readlink(f"/proc/{pid}/ns/pid") for pid in self.first_processes}
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if os.readlink(f"/proc/{process.pid}/ns/pid") in hosts and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def launch_files(self) -> list[Path]:
        """What launches have made in the hosts' folders for temporary files."""
        return [path for pid in self.first_processes for path in Path(f"/proc/{pid}/root/tmp").glob("dtrain-*")]

    def run(self, script: Path, *args: str) -> str:
        environ = {**os.environ, "TESTBED": str(self.state)}
        pipe = subprocess.PIPE
        return subprocess.run(
            [script, *args], env=environ, check=True, stdin=subprocess.DEVNULL, stdout=pipe, text=True, timeout=60
        ).stdout


@dataclass
class ClusterProject(Project):
    """A folder that both hosts see; its commands are typed on node1."""

    hosts: Testbed = field(kw_only=True)

    def __post_init__(self) -> None:
        self.before: set[object] = {*self.hosts.processes(), *self.hosts.launch_files()}

    def on_hosts(self) -> list[object]:
        """What is on the hosts that was not there before this project: also daemons of mpirun and sshd, which carry no mark."""
        now = [*self.hosts.processes(), *self.hosts.launch_files()]
        return [each for each in now if each not in self.before]

    def left_behind(self) -> list[object]:
        """A daemon may end a moment after what it started, and so may the sshd of a connection."""
        deadline = time.monotonic() + LEAVE_S
        while not super().left_behind() and self.on_hosts() and time.monotonic() < deadline:
            time.sleep(0.1)
        return [*super().left_behind(), *self.on_hosts()]

    def environ(self) -> dict[str, str]:
        return {**super().environ(), "TESTBED": str(self.hosts.state)}

    def argv(self, *args: str) -> list[str]:
        return [*self.on_node1, *super().argv(*args)]

    @property
    def on_node1(self) -> list[str]:
        return [str(SCRIPT), "exec", "node1", "env", "-C", str(self.folder)]

    def find(self, job: subprocess.Popen[str], *words: str) -> psutil.Process:
        """The one process below a job whose command line holds all these words."""
        found = [p for p in psutil.Process(job.pid).children(recursive=True) if all(w in " ".join(p.cmdline()) for w in words)]
        return found[-1]


@pytest.fixture(autouse=True)
def _temporary_folder_of_each_host(_temporary_folder: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here every host has a /tmp of its own: a folder that all see would hide what one of them cannot have."""
    monkeypatch.delenv("TMPDIR")


@pytest.fixture(scope="session")
def testbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Testbed]:
    """Up for all tests that need it; down in the end, whatever happened."""
    hosts = Testbed(tmp_path_factory.mktemp("testbed"))
    try:
        pythons = [Path(sys.prefix), Path(sys.base_prefix)]
        if "DTRAIN_TEST_MPICH_PYTHON" in os.environ:
            pythons.append(Path(os.environ["DTRAIN_TEST_MPICH_PYTHON"]).absolute().parents[1])
        shared = {str(path.resolve()) for path in (tmp_path_factory.getbasetemp(), ROOT, *pythons)}
        hosts("up", "3", *sorted(shared))
        yield hosts
    finally:
        hosts("down")


def is_slurms(process: psutil.Process) -> bool:
    try:
        return process.name() in ("munged", "slurmctld", "slurmscriptd", "slurmd", "slurmstepd")
    except psutil.NoSuchProcess:  # whoever it was
        return True


@dataclass
class SlurmProject(ClusterProject):
    """The same, with Slurm's commands."""

    within: tuple[str, ...] = ()
    """What dtrain is started by: salloc with its options, say."""

    def argv(self, *args: str) -> list[str]:
        return [*self.on_node1, *self.within, *Project.argv(self, *args)]

    def on_hosts(self) -> list[object]:
        """Slurm's own daemons come and go."""
        return [each for each in super().on_hosts() if not (isinstance(each, psutil.Process) and is_slurms(each))]

    def slurm(self, *command: str) -> str:
        return self.hosts("exec", "node1", *command)

    @property
    def job(self) -> str:
        """The id of the newest run's job."""
        job = SlurmJob.of(self.latest)
        assert job is not None
        return job.job_id


@pytest.fixture(scope="session")
def slurm_hosts(testbed: Testbed) -> Testbed:
    """All three hosts are nodes of Slurm's. It goes down with them."""
    testbed.run(SLURM, "up", "3")
    return testbed


@pytest.fixture
def slurm(tmp_path: Path, slurm_hosts: Testbed, wait_until: Callable[..., None]) -> Iterator[SlurmProject]:
    project = SlurmProject(tmp_path, hosts=slurm_hosts)
    watch = watched(project)
    next(watch)
    yield project
    for job in project.started:
        if job.poll() is None:
            job.kill()
    project.slurm("scancel", "--user=root")
    wait_until(lambda: not project.processes() and not project.slurm("squeue", "-h"), 60)
    wait_until(
        lambda: (
            project.slurm("sinfo", "-h", "-N", "-p", "debug", "-t", "idle", "-o", "%N").split() == ["node1", "node2", "node3"]
        ),
        60,
    )
    next(watch, None)


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
