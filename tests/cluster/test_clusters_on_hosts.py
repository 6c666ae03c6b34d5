"""`dtrain run --launcher parameter_server -H node1:2,node2:2`: what tests/console/test_cluster.py tests on one host, over ssh.

dtrain runs on node1. The chief and worker 0 go there too, worker 1 and the server to node2.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable

import pytest

from dtrain.metrics import read_metrics
from dtrain.status import read_process, read_status
from tests.console.conftest import ROOT
from tests.console.test_cluster import PRELUDE, SERVE, count, dies

from .conftest import ClusterProject

pytestmark = pytest.mark.needs("netcluster")

HOSTS = ("-H", "node1:2,node2:2")
CLUSTER = ("run", "--launcher", "parameter_server", "--workers", "2", "--servers", "1", "--chief")


def test_tasks_are_on_their_hosts_and_reach_each_other(project: ClusterProject) -> None:
    project.env["MARK"] = "of the user's"
    (project.folder / "hosts").write_text("# two\nnode1 slots=2\nnode2:2\n")
    script = project.script(
        PRELUDE
        + """
import dtrain
run = dtrain.init()
assert sys.stdin.read() == "" and os.environ["MARK"] == "of the user's"
print("local", run.local_rank, "of", run.local_size, "says", sys.argv[1:], flush=True)
if role == "chief":
    for name in config["cluster"]["worker"] + config["cluster"]["ps"]:
        host, _, port = name.rpartition(":")
        for task in ("worker0", "worker1", "ps0"):
            wait_for(task, "listens")
        with socket.create_connection((host, int(port))) as peer:
            print(host, "is", peer.makefile().read(), flush=True)
    sys.exit()
server = listen()
while True:
    peer, _ = server.accept()
    peer.sendall(socket.gethostname().encode())
    peer.close()
"""
    )
    done = project.dtrain(*CLUSTER, "--hostfile", "hosts", script, "a b", "it's")
    assert done.returncode == 0, done.stderr
    said = set(done.stdout.splitlines())
    where = [("node1:chief0", 0), ("node1:worker0", 1), ("node2:worker1", 0), ("node2:ps0", 1)]
    assert {f"[{task}] local {local} of 2 says ['a b', \"it's\"]" for task, local in where} <= said
    assert {"[node1:chief0] node1 is node1", "[node1:chief0] node2 is node2"} <= said
    assert [read_process(project.latest, rank).host for rank in range(4)] == ["node1", "node1", "node2", "node2"]  # type: ignore[union-attr]


def test_more_tasks_on_a_host_than_its_sshd_takes_connections_at_once(project: ClusterProject) -> None:
    script = project.script(PRELUDE + "listen()\n")
    done = project.dtrain("run", "--launcher", "multi_worker", "-n", "17", "--max-ranks", "17", "-H", "node1:1,node2:16", script)
    assert done.returncode == 0, done.stderr
    assert all(count(project, f"worker{index}", "listens") == 1 for index in range(17))


def test_a_script_that_raises_on_another_host(project: ClusterProject) -> None:
    script = project.script(PRELUDE + "server = listen()\nif index:\n    raise ValueError('bad batch')\ntime.sleep(60)\n")
    done = project.dtrain("run", "--launcher", "multi_worker", "-n", "2", "-H", "node1,node2", script)
    assert done.returncode == 1
    assert "first to fail was worker 1 on node2: ValueError: bad batch" in done.stderr
    assert 'raise ValueError("bad batch")' in done.stderr.replace("'", '"')


def test_a_secret_comes_to_other_hosts_by_no_command_line(project: ClusterProject) -> None:
    """Also one whose name is like those that Python reads, which a host is told on the command line; bound as every rank is."""
    project.env["PYTHON_API_KEY"] = "s3cr3t v4lue"
    script = project.script(
        PRELUDE
        + "server = listen()\nwait_for('worker0', 'listens'), wait_for('worker1', 'listens')\n"
        + "for path in pathlib.Path('/proc').glob('[0-9]*/cmdline'):\n"
        + "    try:\n        assert b'v4lue' not in path.read_bytes(), path\n    except OSError:\n        pass\n"
        + "print('key', os.environ['PYTHON_API_KEY'], len(os.environ['PYTHON_API_KEY']), len(os.sched_getaffinity(0)))\n"
    )
    options = ("--secret", "PYTHON_API_KEY", "--bind", "core", "-H", "node1,node2")
    done = project.dtrain("run", "--launcher", "multi_worker", "-n", "2", *options, script)
    assert done.returncode == 0, done.stderr
    cores = len(os.sched_getaffinity(0))
    told = [f"[node1:worker0] key *** 12 {cores}", f"[node2:worker1] key *** 12 {cores}"]
    assert sorted(done.stdout.splitlines()) == told
    assert not [
        path
        for path in project.latest.root.rglob("*")
        if path.name != "train.py" and path.is_file() and b"cr3t v4" in path.read_bytes()
    ]


@pytest.mark.parametrize(
    ("death", "message"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "killed by SIGKILL"),
        ("os.kill(os.getppid(), signal.SIGKILL); time.sleep(60)", "vanished without a record: it was killed together with"),
    ],
    ids=["script", "with its guard"],
)
def test_a_killed_worker_is_started_again_on_its_host_and_port(project: ClusterProject, death: str, message: str) -> None:
    script = project.script(dies("pass", f"note('died'); {death}"))
    done = project.dtrain(*CLUSTER, *HOSTS, "--max-worker-restarts", "1", script)
    assert done.returncode == 0, done.stderr
    assert f"worker 1 was {message}" in done.stderr or f"worker 1 {message}" in done.stderr
    assert "it is started again on node2:" in done.stderr
    assert (count(project, "worker1", "begins"), count(project, "worker0", "begins")) == (2, 1)


def test_a_worker_whose_ssh_client_is_killed_ends_and_is_started_again(
    project: ClusterProject, wait_until: Callable[..., None]
) -> None:
    job = project.start(
        *CLUSTER, *HOSTS, project.script(PRELUDE + "if role == 'chief':\n    wait_for('worker1', 'listens')\n" + SERVE)
    )
    wait_until(lambda: count(project, "worker1", "listens") == 1)
    project.find(job, "ssh", "DTRAIN_RANK=2").kill()
    wait_until(lambda: count(project, "worker1", "listens") == 2)
    project.find(job, "dtrain.cli").send_signal(signal.SIGTERM)
    _, words = job.communicate(timeout=40)
    assert job.returncode == 143, words
    assert "worker 1 was lost: its ssh client was killed by SIGKILL; it is started again on node2:" in words


def test_the_death_of_a_server_on_another_host_ends_the_job(project: ClusterProject) -> None:
    script = project.script(
        PRELUDE
        + """
server = listen()
if role == "ps":
    wait_for("chief0", "listens")
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(60)
"""
    )
    done = project.dtrain(*CLUSTER, *HOSTS, script)
    assert done.returncode == 137
    assert "first to fail was ps 0 on node2: killed by SIGKILL" in done.stderr


@pytest.mark.parametrize("canceled", [False, True], ids=["done", "canceled"])
def test_scripts_on_other_hosts_have_their_grace_time(
    project: ClusterProject, canceled: bool, wait_until: Callable[..., None]
) -> None:
    script = project.script(
        PRELUDE
        + """
def end(*_):
    note("told")
    time.sleep(1)
    note("saved")
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
if role == "chief" and len(sys.argv) == 1:
    wait_for("worker1", "listens")
    sys.exit(0)
"""
        + SERVE
    )
    job = project.start(*CLUSTER, *HOSTS, script, *(["stay"] if canceled else []))
    wait_until(lambda: count(project, "worker1", "listens") == 1)
    if canceled:
        wait_until(lambda: count(project, "chief0", "listens") == 1)
        project.find(job, "dtrain.cli").send_signal(signal.SIGTERM)
    _, words = job.communicate(timeout=40)
    assert job.returncode == (143 if canceled else 0), words
    assert all(count(project, task, "saved") == 1 for task in ("worker1", "ps0"))


def test_one_that_does_not_end_is_killed_after_the_grace_time(project: ClusterProject) -> None:
    script = project.script(
        PRELUDE
        + "signal.signal(signal.SIGTERM, lambda *_: note('told'))\n"
        + "if role == 'chief':\n    wait_for('worker1', 'listens')\n    sys.exit(0)\n"
        + SERVE
    )
    done = project.dtrain(*CLUSTER, *HOSTS, "--grace", "1", script)
    assert done.returncode == 0, done.stderr
    assert count(project, "worker1", "told") >= 1
    assert project.processes() == []


def test_nothing_outlives_a_killed_launcher(project: ClusterProject, wait_until: Callable[..., None]) -> None:
    job = project.start(*CLUSTER, *HOSTS, project.script(PRELUDE + SERVE))
    wait_until(lambda: all(count(project, task, "listens") for task in ("chief0", "worker0", "worker1", "ps0")))
    project.find(job, "dtrain.cli").kill()
    job.communicate()
    wait_until(lambda: not project.processes())


def test_a_stopped_task_is_lost_and_not_left_behind(project: ClusterProject, wait_until: Callable[..., None]) -> None:
    """Its guard is stopped as well, and does not learn that its connection has ended."""
    job = project.start(*CLUSTER, *HOSTS, "--heartbeat-timeout", "5", project.script(PRELUDE + SERVE))
    wait_until(lambda: all(count(project, task, "listens") for task in ("chief0", "worker1", "ps0")))
    task = [p for p in project.processes() if p.environ().get("DTRAIN_RANK") == "2"]
    for process in task:
        if process.parent() not in task or os.getsid(process.pid) != process.pid:  # not who waits for the guard's end
            process.send_signal(signal.SIGSTOP)
    _, words = job.communicate(timeout=40)
    assert job.returncode == 255, words
    assert "first to fail was worker 1 on node2: lost: gives no sign of life since" in words
    wait_until(lambda: not project.processes())


def test_a_host_that_is_cut_off_is_found_and_named(
    project: ClusterProject, cut: Callable[[str], None], wait_until: Callable[..., None]
) -> None:
    job = project.start(*CLUSTER, *HOSTS, "--heartbeat-timeout", "6", project.script(PRELUDE + SERVE))
    wait_until(lambda: all(count(project, task, "listens") for task in ("chief0", "worker1", "ps0")))
    cut("node2")
    began = time.monotonic()
    _, words = job.communicate(timeout=60)
    assert job.returncode == 255, words
    status = read_status(project.latest)
    assert status.failure is not None
    assert status.failure.host == "node2"
    assert "lost: the ssh connection to node2 broke" in words
    assert status.ended is not None
    assert time.monotonic() - began < 15
    project.hosts("heal", "node2")
    wait_until(lambda: not project.processes())  # there they learn of it when the network is back


def test_a_short_cut_is_outlived(project: ClusterProject, cut: Callable[[str], None], wait_until: Callable[..., None]) -> None:
    script = project.script(PRELUDE + "server = listen()\nwhile not os.path.exists('outputs/go'):\n    time.sleep(0.1)\n")
    job = project.start(*CLUSTER, *HOSTS, script)
    wait_until(lambda: all(count(project, task, "listens") for task in ("chief0", "worker1", "ps0")))
    cut("node2")
    time.sleep(8)
    project.hosts("heal", "node2")
    time.sleep(2)
    (project.latest.outputs / "go").touch()
    _, words = job.communicate(timeout=40)
    assert job.returncode == 0, words


def test_a_python_that_cannot_start_on_another_host_says_why(project: ClusterProject) -> None:
    done = project.dtrain(*CLUSTER, *HOSTS, "--env", "PYTHONHOME=/nowhere", project.script(""))
    assert done.returncode == 1
    assert "first to fail was ps 0 on node2: did not begin: ModuleNotFoundError: No module named 'encodings'" in done.stderr


def test_a_task_on_another_host_that_never_listens_is_named(project: ClusterProject) -> None:
    script = project.script(PRELUDE + "if (role, index) != ('worker', 1):\n    server = listen()\ntime.sleep(60)\n")
    done = project.dtrain(*CLUSTER, *HOSTS, "--start-timeout", "2", script)
    assert done.returncode == 1
    assert "first to fail was worker 1 on node2: does not listen on node2:" in done.stderr


def test_a_port_that_is_taken_on_another_host_is_named(project: ClusterProject) -> None:
    script = project.script(
        PRELUDE
        + """
server = listen()
if role == "ps":  # begins before the workers, and takes the port of the one beside it
    thief = socket.create_server(("", int(config["cluster"]["worker"][1].rpartition(":")[2])))
time.sleep(60)
"""
    )
    done = project.dtrain(*CLUSTER, *HOSTS, script)
    assert done.returncode == 1
    assert "first to fail was worker 1 on node2: cannot have its port: another process listens on node2:" in done.stderr


def test_stacks_of_a_hang_come_from_all_hosts(project: ClusterProject) -> None:
    script = project.script(PRELUDE + "def stuck():\n    time.sleep(60)\nserver = listen()\nstuck()\n")
    done = project.dtrain("run", "--launcher", "multi_worker", "-n", "2", "-H", "node1,node2", "--hang-timeout", "2", script)
    assert done.returncode == 123
    assert "worker 0, worker 1 are in no collective that dtrain knows: train.py:" in done.stderr
    for index in (0, 1):
        assert "in stuck" in project.latest.rank(index).stack.read_text()


def test_hosts_that_cannot_be_used_are_named_before_anything_starts(project: ClusterProject) -> None:
    script = project.script("print('ran')")
    run = ("run", "--launcher", "multi_worker", "-n", "2")
    done = project.dtrain(*run, "-H", "node1,elsewhere", script)
    assert (done.returncode, done.stdout) == (127, "")
    assert "host elsewhere: ssh cannot connect: ssh: Could not resolve hostname elsewhere" in done.stderr
    assert "no such host; give the name as ssh knows it" in done.stderr

    done = project.dtrain(*run, "-H", "localhost,node2", script)
    assert (done.returncode, done.stdout) == (2, "")
    assert "other hosts cannot reach 'localhost'; name this host as they do, as node1" in done.stderr
    assert not list(project.folder.glob("workspace/runs/*"))


def test_dry_run_shows_the_hosts_and_writes_nothing(project: ClusterProject) -> None:
    script = project.script("")
    plan = json.loads(project.dtrain(*CLUSTER, *HOSTS, "--dry-run", "--json", script).stdout)
    placed = [("ps 0", "node2", True), ("chief 0", "node1", False), ("worker 0", "node1", False), ("worker 1", "node2", True)]
    assert [(p["name"], p["host"], p["over_ssh"]) for p in plan["processes"]] == placed
    assert all("TF_CONFIG" in p["environment"] for p in plan["processes"])
    lines = project.dtrain(*CLUSTER, *HOSTS, "--dry-run", script).stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["ssh", "cd", "cd", "ssh"]
    assert not (project.folder / "workspace").exists()


@pytest.mark.needs("tensorflow", "sklearn")
def test_tensorflow_trains_over_two_hosts(project: ClusterProject) -> None:
    script = project.script((ROOT / "examples" / "tensorflow_ps_digits.py").read_text())
    done = project.dtrain(*CLUSTER, *HOSTS, script, timeout=110)
    assert done.returncode == 0, done.stderr
    assert [read_process(project.latest, rank).host for rank in range(4)] == ["node1", "node1", "node2", "node2"]  # type: ignore[union-attr]
    assert read_metrics(project.latest).rows[0]
