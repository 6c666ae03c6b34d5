"""`dtrain run -H node1,node2` where node2 and node3 do not see the workspace: the run folder is copied, and all comes back.

dtrain runs on node1, as in test_mpi_on_hosts.py.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dtrain.checkpoint import verify_step
from dtrain.metrics import read_metrics
from dtrain.status import read_status
from tests.console.conftest import ROOT, watched
from tests.console.test_cluster import PRELUDE

from .conftest import Testbed
from .test_mpi_on_hosts import OPENMPI, MpiProject

pytestmark = pytest.mark.needs("netcluster")

COPIES = "the run folder is copied there, and what is written there is brought back"


class ApartProject(MpiProject):
    """Its folder is empty on the other hosts."""

    def __init__(self, folder: Path, *, hosts: Testbed) -> None:
        super().__init__(folder, hosts=hosts)
        self.mounted: list[tuple[str, Path]] = []

    def hide_on(self, *nodes: str, size: str = "100m", below: str = "") -> None:
        for node in nodes:
            self.hosts("exec", node, "mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(self.folder / below))
            self.mounted.append((node, self.folder / below))

    def on(self, node: str, *command: str) -> str:
        return self.hosts("exec", node, "env", "-C", str(self.folder), *command)

    def output(self, name: str) -> str:
        return (self.latest.outputs / name).read_text()

    def left_on(self, node: str) -> list[str]:
        return self.on(node, "find", ".", "-mindepth", "1").split()


@pytest.fixture(params=["openmpi", pytest.param("mpich", marks=pytest.mark.needs("mpich"))])
def project(request: pytest.FixtureRequest, tmp_path: Path, testbed: Testbed) -> Iterator[ApartProject]:
    project = ApartProject(tmp_path, hosts=testbed)
    project.python = os.environ["DTRAIN_TEST_MPICH_PYTHON"] if request.param == "mpich" else sys.executable
    try:
        yield from watched(project)  # type: ignore[misc]
    finally:
        for node, folder in project.mounted:
            project.hosts("exec", node, "umount", "-l", str(folder))


@pytest.fixture
def apart(project: ApartProject) -> ApartProject:
    """The same, with node2 and node3 apart."""
    project.hide_on("node2", "node3")
    return project


WRITES = """
import os, sys, time
import dtrain

run = dtrain.init()
print("says", run.rank, flush=True)
open(f"outputs/rank-{run.rank}", "w").write(str(run.rank))
open(f"logs/rank-{run.rank}", "w").write(str(run.rank))
open(f"here-{run.rank}", "w").write(str(run.rank))
open("outputs/same", "w").write("the same")
os.makedirs(f"outputs/of-{run.rank}/empty")
run.log("loss", run.rank)
"""
FILLS = """
run.comm.barrier()
if run.rank == 2:
    with open("outputs/full", "wb", 0) as file:
        while True:
            file.write(bytes(4096))
run.comm.barrier()
"""
TRAINS = """
import os, signal, sys
import numpy as np
import dtrain

run = dtrain.init()
restored = run.checkpoints.restore()
first = 0 if restored is None else restored.step
if restored is not None:
    assert (restored.shared["weights"] == first).all() and restored.own["mine"] == run.rank, restored
for step in range(first + 1, int(sys.argv[1]) + 1):
    run.checkpoints.save(step, {"weights": np.full(1000, step)}, {"mine": np.array(run.rank)})
    again = run.checkpoints.restore()
    assert again.step == step and (again.shared["weights"] == step).all() and again.own["mine"] == run.rank
    open(f"outputs/steps-{run.rank}", "a").write(f"{step} ")
    run.log("loss", step)
    if step == 2 and run.rank == run.size - 1 and os.environ["DTRAIN_ATTEMPT"] == "0" and restored is None:
        os.kill(os.getpid(), signal.SIGKILL)
print("began at", first)
"""


def test_what_every_rank_wrote_comes_back(apart: ApartProject) -> None:
    done = apart.dtrain("run", "-H", "node1,node2:2,node3", apart.script(WRITES))
    assert done.returncode == 0, done.stderr
    assert f"hosts node2, node3 do not see this workspace: {COPIES}" in done.stderr
    assert sorted(done.stdout.splitlines()) == [f"[node{host}:{rank}] says {rank}" for rank, host in enumerate((1, 2, 2, 3))]
    run = apart.latest
    for rank in range(4):
        assert apart.output(f"rank-{rank}") == (run.logs / f"rank-{rank}").read_text() == str(rank)
        assert (run.code / f"here-{rank}").read_text() == str(rank)
        assert (run.outputs / f"of-{rank}" / "empty").is_dir()
        assert run.rank(rank).output_log.read_text() == f"says {rank}\n"
        assert [row["loss"] for row in read_metrics(run).rows[rank]] == [rank]
    assert apart.output("same") == "the same"
    assert not [path.name for path in run.root.rglob("*") if path.name.startswith(".") or ".from-" in path.name]
    assert apart.left_on("node2") == apart.left_on("node3") == []


@OPENMPI
def test_the_cause_is_told_as_on_shared_files(apart: ApartProject) -> None:
    failing = WRITES + (
        "run.comm.barrier()\n"
        "if run.rank == 2:\n    print('about to', flush=True)\n    raise ValueError('bad batch')\n"
        "run.comm.barrier()\n"
    )
    done = apart.dtrain("run", "-H", "node1,node2:2", apart.script(failing))
    assert done.returncode == 1, done.stderr
    told = done.stderr[done.stderr.index("first to fail was ") :]
    assert told.startswith("first to fail was rank 2 on node2: ValueError: bad batch\n")
    assert told.index("    about to\n") < told.index("    ValueError: bad batch\n")
    assert {apart.output(f"rank-{rank}") for rank in range(3)} == {"0", "1", "2"}
    assert apart.left_on("node2") == []


@OPENMPI
def test_output_is_shown_while_it_is_written_and_comes_back_after_an_interruption(
    apart: ApartProject, wait_until: Callable[..., None]
) -> None:
    job = apart.start("run", "-H", "node1,node2", "--grace", "1", apart.script(WRITES + "time.sleep(60)\n"))
    wait_until(lambda: said(apart, 0) and said(apart, 1))
    assert not (apart.latest.outputs / "rank-1").exists()
    wait_until(lambda: (apart.latest.outputs / "metrics" / "rank-00001.jsonl").is_file())
    apart.find(job, "dtrain.cli").send_signal(signal.SIGINT)
    out, words = job.communicate(timeout=60)
    assert job.returncode == 130, words
    assert "[node2:1] says 1" in out
    assert apart.output("rank-1") == "1"
    assert apart.left_on("node2") == []


@OPENMPI
def test_an_interruption_of_the_copying(project: ApartProject, wait_until: Callable[..., None]) -> None:
    project.hide_on("node2", size="400m")
    (project.folder / "weights").write_bytes(bytes(280_000_000))
    job = project.start("run", "-H", "node1,node2", project.script(WRITES))
    wait_until(lambda: any(name.endswith("/code") for name in project.left_on("node2")))
    project.find(job, "dtrain.cli").send_signal(signal.SIGINT)
    out, words = job.communicate(timeout=60)
    assert (job.returncode, out) == (130, ""), words
    assert "canceled by SIGINT" in words
    wait_until(lambda: project.left_on("node2") == [])


@OPENMPI
def test_stacks_of_a_hang_are_here(apart: ApartProject) -> None:
    script = apart.script(WRITES + "if run.rank == 0:\n    run.comm.barrier()\ndef stuck():\n    time.sleep(60)\nstuck()\n")
    done = apart.dtrain("run", "-H", "node1,node2", "--hang-timeout", "3", "--grace", "1", script)
    assert done.returncode == 123, done.stderr
    assert "rank 1 did not come (train.py:" in done.stderr
    assert "in stuck" in apart.latest.rank(1).stack.read_text()


@pytest.mark.parametrize("node", ["node1", "node2"], ids=["rank-0-here", "rank-0-there"])
@OPENMPI
def test_a_job_goes_on_from_its_checkpoint(apart: ApartProject, node: str) -> None:
    hosts = "node1:1,node2:2" if node == "node1" else "node2:2,node1:1"
    done = apart.dtrain("run", "-H", hosts, "--max-restarts", "1", apart.script(TRAINS), "4")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(COPIES) == 2
    assert "starting the job again from the checkpoint of step 2" in done.stderr
    assert done.stdout.count("began at 2") == 3
    assert [apart.output(f"steps-{rank}") for rank in range(3)] == ["1 2 3 4 "] * 3
    assert [row["loss"] for row in read_metrics(apart.latest).rows[2]] == [1, 2, 3, 4]
    steps = sorted(apart.latest.checkpoints.glob("step-*"))
    assert steps[-1].name == "step-000000004"
    assert [verify_step(step) for step in steps] == [[]] * len(steps)

    done = apart.dtrain("run", "-H", hosts, "--resume", "latest", "train.py", "5")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("began at 4") == 3
    assert apart.left_on("node2") == []


@pytest.mark.parametrize(("hosts", "loser", "kept"), [("node1,node2", "node2", "1"), ("node2,node1", "node1", "1")])
@OPENMPI
def test_of_two_files_for_one_name_that_of_rank_0_has_it(apart: ApartProject, hosts: str, loser: str, kept: str) -> None:
    script = apart.script(
        WRITES + "open('outputs/model', 'w').write(str(run.rank))\nopen('train.py', 'a').write(f'# {run.rank}')\n"
    )
    done = apart.dtrain("run", "-H", hosts, script)
    assert done.returncode == 0, done.stderr
    assert (apart.output("model"), apart.output(f"model.from-{loser}")) == ("0", kept)
    assert "wrote outputs/model, not the same: the other one is beside it, as model.from-" + loser in done.stderr
    code = apart.latest.code
    assert ((code / "train.py").read_text()[-3:], (code / f"train.py.from-{loser}").read_text()[-3:]) == ("# 0", "# 1")
    assert not (apart.latest.outputs / f"same.from-{loser}").exists()


@OPENMPI
def test_a_host_that_is_cut_off_keeps_what_it_wrote(
    apart: ApartProject, cut: Callable[[str], None], wait_until: Callable[..., None]
) -> None:
    job = apart.start(
        "run", "-H", "node1,node2", "--heartbeat-timeout", "5", "--grace", "1", apart.script(WRITES + "time.sleep(60)\n")
    )
    wait_until(lambda: said(apart, 0) and said(apart, 1))
    cut("node2")
    words = job.communicate(timeout=60)[1]
    assert job.returncode == 255, words
    assert "first to fail was rank 1 on node2: lost: host node2 does not answer" in words
    assert "what host node2 wrote is not brought back: ssh: connect to host node2 port 22: " in words
    assert f"it is kept there, in {apart.latest.root}\n" in words
    assert (apart.output("rank-0"), apart.latest.rank(1).output_log.read_text()) == ("0", "says 1\n")
    apart.hosts("heal", "node2")
    assert apart.on("node2", "cat", str(apart.latest.outputs / "rank-1")) == "1"
    wait_until(lambda: not apart.processes())


@OPENMPI
def test_a_host_of_a_cluster_that_is_cut_off(
    apart: ApartProject, cut: Callable[[str], None], wait_until: Callable[..., None]
) -> None:
    script = apart.script(PRELUDE + "print('says', index, flush=True)\nserver = listen()\ntime.sleep(60)\n")
    options = ("-H", "node1,node2", "--heartbeat-timeout", "6", "--grace", "1")
    job = apart.start("run", "--launcher", "multi_worker", "-n", "2", *options, script)
    wait_until(lambda: said(apart, 0) and said(apart, 1))
    cut("node2")
    words = job.communicate(timeout=60)[1]
    assert job.returncode == 255, words
    assert "first to fail was worker 1 on node2: lost: " in words
    assert f"it is kept there, in {apart.latest.root}\n" in words
    apart.hosts("heal", "node2")
    wait_until(lambda: not apart.processes())


@OPENMPI
def test_a_job_is_not_complete_without_what_was_written_elsewhere(apart: ApartProject) -> None:
    loses = WRITES + "if run.rank == 1:\n    os.remove('../.copy.json')\n"
    done = apart.dtrain("run", "-H", "node1,node2", apart.script(loses))
    assert done.returncode == 1
    assert "what host node2 wrote is not brought back: " in done.stderr
    assert "all ranks completed, but what node2 wrote is not brought back" in done.stderr
    assert apart.on("node2", "cat", str(apart.latest.outputs / "rank-1")) == "1"


@OPENMPI
def test_that_some_hosts_share_and_some_do_not_is_found(project: ApartProject) -> None:
    project.hide_on("node3")
    script = project.script(WRITES)
    done = project.dtrain("run", "-H", "node1,node2,node3", script)
    assert done.returncode == 127
    assert "host node3: does not see this workspace, and host node2 does; mount it there too" in done.stderr
    done = project.dtrain("run", "-H", "node1,node2,node3", "--no-shared-fs", script)
    assert done.returncode == 0, done.stderr
    assert {project.output(f"rank-{rank}") for rank in range(3)} == {"0", "1", "2"}
    done = project.dtrain("run", "-H", "node1,node2", "--no-shared-fs", script)
    assert done.returncode == 0
    assert "--no-shared-fs has no effect: all hosts see this workspace" in done.stderr
    done = project.dtrain("run", "-H", "node1,node2", "--no-shared-fs", "--skip-preflight", script)
    assert done.returncode == 127
    assert "host node2: the run folder cannot be copied there: there is a " in done.stderr
    (answer,) = project.json("doctor", "-H", "node3")
    assert {
        "name": "workspace",
        "level": "ok",
        "said": "does not see it: the run folder is copied, and outputs brought back",
    } in answer["checks"]


@OPENMPI
def test_a_full_disk_of_one_host_is_named(project: ApartProject) -> None:
    project.hide_on("node2")
    project.hide_on("node3", size="300k")
    (project.folder / "weights").write_bytes(os.urandom(10**6))
    done = project.dtrain("run", "-H", "node1,node2,node3", project.script(WRITES))
    assert done.returncode == 127
    assert "host node3: the run folder cannot be copied there: [Errno 28] No space left on device" in done.stderr
    assert (done.stdout, read_status(project.latest).state) == ("", "failed")
    assert project.left_on("node2") == project.left_on("node3") == []


def test_a_rank_that_fills_the_disk_of_its_host_is_named(project: ApartProject) -> None:
    """That of all that dtrain writes there: the rank's records and output, and its copy of the run folder."""
    project.hide_on("node2", size="3m")
    script = project.script(WRITES + FILLS)
    done = project.dtrain("run", "-H", "node1,node2:2", script)
    assert done.returncode == 1, done.stderr
    assert "first to fail was rank 2 on node2: OSError: [Errno 28] No space left on device" in done.stderr
    assert read_status(project.latest).state == "failed"
    assert (project.output("rank-0"), project.output("rank-1")) == ("0", "1")
    assert (project.latest.outputs / "full").stat().st_size > 2**20
    assert project.left_on("node2") == []


@OPENMPI
def test_a_full_disk_here_leaves_what_was_written_where_it_is(project: ApartProject) -> None:
    project.hide_on("node2")
    (project.folder / "workspace").mkdir()
    project.hide_on("node1", size="2m", below="workspace")
    script = project.script(WRITES + "if run.rank == 1:\n    open('outputs/large', 'wb').write(bytes(5_000_000))\n")
    done = project.dtrain("run", "-H", "node1,node2", script)
    assert done.returncode == 1
    assert "what host node2 wrote is not brought back: [Errno 28] No space left on device" in done.stderr
    assert [name for name in project.left_on("node2") if name.endswith("/outputs/large")]
    here = project.on("node1", "find", "workspace")
    assert ("/outputs/rank-0" in here, "/outputs/rank-1" in here, "/.from-node2" in here) == (True, False, False)


@OPENMPI
def test_a_flood_of_output_is_whole(apart: ApartProject) -> None:
    flood = "import sys\nfor n in range(300_000):\n    sys.stdout.write(f'{n:07d} {\"x\" * 60}\\n')\n"
    done = apart.dtrain("run", "-H", "node1,node2", "--show", "1", apart.script(flood))
    assert done.returncode == 0, done.stderr
    lines = apart.latest.rank(1).output_log.read_text().splitlines()
    assert [int(line[:7]) for line in lines] == list(range(300_000))
    assert len(done.stdout.splitlines()) == 300_000


@OPENMPI
def test_a_cluster_and_a_worker_that_is_started_again(apart: ApartProject) -> None:
    script = apart.script(
        PRELUDE
        + """
if (role, index) == ("worker", 1) and not noted("worker1", "died"):
    note("died")
    print("dies", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
if role == "chief":
    host, _, port = config["cluster"]["worker"][1].rpartition(":")
    while True:
        try:
            with socket.create_connection((host, int(port))) as peer:
                if peer.makefile().read() == "again":  # and not the launcher's question whether it listens
                    break
        except OSError:
            time.sleep(0.1)
    sys.exit()
server = listen()
while True:
    peer, _ = server.accept()
    peer.sendall(b"again")
    peer.close()
"""
    )
    cluster = ("--launcher", "parameter_server", "--workers", "2", "--servers", "1", "--chief", "-H", "node1:2,node2:2")
    done = apart.dtrain("run", *cluster, script)
    assert done.returncode == 0, done.stderr
    assert f"host node2 does not see this workspace: {COPIES}" in done.stderr
    assert "worker 1 was killed by SIGKILL; it is started again on node2:" in done.stderr
    assert done.stdout == "[node2:worker1] dies\n"
    assert apart.output("worker1.txt").count("begins") == 2
    assert "listens" in apart.output("ps0.txt")
    assert apart.left_on("node2") == []


@OPENMPI
def test_a_task_that_raises_on_another_host(apart: ApartProject) -> None:
    script = apart.script(PRELUDE + "server = listen()\nif index:\n    raise ValueError('bad batch')\ntime.sleep(60)\n")
    done = apart.dtrain("run", "--launcher", "multi_worker", "-n", "2", "-H", "node1,node2", "--grace", "1", script)
    assert done.returncode == 1
    assert "first to fail was worker 1 on node2: ValueError: bad batch" in done.stderr
    assert done.stderr.count("raise ValueError('bad batch')") == 1
    assert "listens" in apart.output("worker1.txt")


@OPENMPI
@pytest.mark.needs("tensorflow", "horovod")
def test_horovod_trains_and_resumes(apart: ApartProject) -> None:
    script = apart.script((ROOT / "examples" / "tensorflow_digits.py").read_text())
    run = ("run", "--launcher", "horovod", "-H", "node1,node2")
    done = apart.dtrain(*run, script, "--epochs", "1", timeout=110)
    assert done.returncode == 0, done.stderr
    (step,) = apart.latest.checkpoints.glob("step-*")
    assert verify_step(step) == []
    done = apart.dtrain(*run, "--resume", "latest", script, "--epochs", "2", timeout=110)
    assert done.returncode == 0, done.stderr
    assert apart.left_on("node2") == []


@OPENMPI
@pytest.mark.needs("tensorflow", "sklearn")
def test_tensorflow_trains_on_a_server_elsewhere(apart: ApartProject) -> None:
    script = apart.script((ROOT / "examples" / "tensorflow_ps_digits.py").read_text())
    cluster = ("--launcher", "parameter_server", "--workers", "2", "--servers", "1", "--chief", "-H", "node1:2,node2:2")
    done = apart.dtrain("run", *cluster, script, timeout=110)
    assert done.returncode == 0, done.stderr
    assert read_metrics(apart.latest).rows[0]
    assert apart.left_on("node2") == []


def said(project: ApartProject, rank: int) -> bool:
    """Whether what a rank prints first is in its file here."""
    logs = list(project.folder.glob(f"workspace/runs/*/ranks/{rank:05d}/output.log"))
    return bool(logs) and logs[0].read_text() == f"says {rank}\n"
