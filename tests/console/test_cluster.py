"""`dtrain run --launcher parameter_server`: roles, the order of start and end, and every death, with scripts that only listen.

What TensorFlow itself does in such a cluster is in test_tensorflow_cluster.py.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dtrain.metrics import read_metrics
from dtrain.status import read_process, read_status

from .conftest import Project

# Every task writes the times of its life to ./outputs, listens as its TF_CONFIG says, then does what the test says.
PRELUDE = """
import json, os, pathlib, signal, socket, sys, time
config = json.loads(os.environ["TF_CONFIG"])
role, index = config["task"]["type"], config["task"]["index"]
def note(what):
    with open(f"outputs/{role}{index}.txt", "a") as file:
        file.write(f"{time.time()} {what}\\n")
def listen():
    address = config["cluster"][role][index]
    server = socket.create_server(("", int(address.rpartition(":")[2])))
    note("listens")
    return server
def noted(name, what):
    return pathlib.Path("outputs", name + ".txt").exists() and what in pathlib.Path("outputs", name + ".txt").read_text()
def wait_for(name, what):
    while not noted(name, what):
        time.sleep(0.02)
note("begins")
"""
SERVE = """
server = listen()
while True:
    time.sleep(60)
"""


def times(project: Project, task: str) -> dict[str, float]:
    lines = (project.latest.outputs / f"{task}.txt").read_text().splitlines()
    return {line.split()[1]: float(line.split()[0]) for line in lines}


def count(project: Project, task: str, what: str) -> int:
    """How often a task noted something; 0 also when there is no run yet."""
    return sum(path.read_text().count(what) for path in project.folder.glob(f"workspace/runs/*/outputs/{task}.txt"))


def test_roles_from_start_to_end(project: Project) -> None:
    """Servers listen before others begin; chief and evaluator are waited for; servers and serving workers are ended then."""
    script = project.script(
        PRELUDE
        + """
import dtrain
run = dtrain.init()
assert dtrain.init() is run and (run.role, run.index, run.comm.size) == (role, index, 1), (run.role, run.index)
run.log("loss", run.rank, step=3)
run.tags["from"] = role
if role == "chief":
    run.checkpoints.save(1, {})
else:
    try:
        run.checkpoints.save(2, {})
        sys.exit("saved")
    except dtrain.errors.UsageError as error:
        assert "saved by rank 0" in str(error), error
print("I am", role, index, "rank", run.rank, "of", run.size)
if role in ("ps", "worker"):
"""
        + SERVE.replace("\n", "\n    ")
        + "\ntime.sleep(0.3 if role == 'chief' else 1)\nnote('ends')\n"
    )

    done = project.dtrain(
        "run", "--launcher", "parameter_server", "--workers", "2", "--servers", "2", "--chief", "--evaluator", script
    )

    assert done.returncode == 0, done.stderr
    assert "1 chief, 2 workers, 2 ps, 1 evaluator · launcher parameter_server" in done.stderr
    tasks = ["chief 0", "worker 0", "worker 1", "ps 0", "ps 1", "evaluator 0"]
    host = os.uname().nodename
    assert set(done.stdout.splitlines()) == {
        f"[{host}:{task.replace(' ', '')}] I am {task} rank {rank} of 6" for rank, task in enumerate(tasks)
    }
    life = {task: times(project, task.replace(" ", "")) for task in tasks}
    servers_listen = max(life["ps 0"]["listens"], life["ps 1"]["listens"])
    assert all(life[task]["begins"] > servers_listen for task in tasks if "ps" not in task)
    assert {task for task in tasks if "ends" in life[task]} == {"chief 0", "evaluator 0"}
    run = project.latest
    files = {path.name for path in run.metrics.iterdir()}
    assert files == {f"rank-{rank:05d}-{task.replace(' ', '-')}.jsonl" for rank, task in enumerate(tasks)}
    assert {rank: rows[0]["loss"] for rank, rows in read_metrics(run).rows.items()} == dict(enumerate(range(6)))
    data = project.json("show", "latest")
    assert (data["tasks"], data["tags"], data["checkpoints"]) == (tasks, {"from": "chief"}, [1])
    assert "worker 1" in project.dtrain("show", "latest").stdout
    assert f"[{host}:ps1] I am ps 1 rank 4 of 6" in project.dtrain("logs", "latest").stdout


def test_worker_0_leads_where_there_is_no_chief(project: Project) -> None:
    """It listens before the others begin, all workers must end well, and a server that ends by itself is no failure."""
    script = project.script(
        PRELUDE
        + """
server = listen()
if role == "ps":
    time.sleep(60 if index == 0 else 1)
if role == "worker":
    assert config["environment"] == "cloud"
    time.sleep(0.3 * index)
note("ends")
"""
    )
    done = project.dtrain("run", "--launcher", "parameter_server", "--workers", "3", "--servers", "2", script)
    assert done.returncode == 0, done.stderr
    leader = times(project, "worker0")
    assert max(times(project, f"ps{n}")["listens"] for n in (0, 1)) < leader["begins"]
    assert all(leader["listens"] < times(project, f"worker{n}")["begins"] for n in (1, 2))
    assert all("ends" in times(project, f"worker{n}") for n in (0, 1, 2))


def test_workers_without_servers_start_together(project: Project) -> None:
    script = project.script(PRELUDE + "server = listen()\nwait_for(f'worker{1 - index}', 'listens')\nsys.exit(3 * index)\n")
    done = project.dtrain("run", "--launcher", "multi_worker", "-n", "2", script)
    assert done.returncode == 3
    assert "first to fail was worker 1" in done.stderr
    assert done.stderr.splitlines()[-1].endswith("ranks/00001/output.log")


def test_a_host_that_is_this_one_needs_no_ssh(project: Project) -> None:
    script = project.script(PRELUDE + "server = listen()\nprint(config['cluster']['worker'][0].split(':')[0])\n")
    for name in ("localhost", os.uname().nodename):
        done = project.dtrain("run", "--launcher", "multi_worker", "-n", "2", "-H", f"{name}:2", script)
        assert (done.returncode, {line.split()[-1] for line in done.stdout.splitlines()}) == (0, {name}), done.stderr


def test_one_worker_alone_has_no_cluster(project: Project) -> None:
    script = project.script("import os, dtrain\nrun = dtrain.init()\nprint(run.role, run.size, os.environ.get('TF_CONFIG'))\n")
    for launcher in (("multi_worker",), ("parameter_server", "--servers", "0")):
        done = project.dtrain("run", "--launcher", *launcher, script)
        assert (done.returncode, done.stdout.split("] ")[1]) == (0, "rank 1 None\n"), done.stderr


# A worker dies as the test says, once; the others wait for what it does after its restart.
DIES = (
    PRELUDE
    + """
first = not noted(role + str(index), "died")
if role == "worker" and index == 1 and first:
    BEFORE
server = listen()
if role == "worker" and index == 1 and first:
    AFTER
if role == "worker" and index == 1:
    note("works")
if role == "chief":
    wait_for("worker1", "works")
else:
    time.sleep(60)
"""
)


def dies(before: str, after: str = "pass") -> str:
    return DIES.replace("BEFORE", before).replace("AFTER", after)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("note('died'); os.kill(os.getpid(), signal.SIGKILL)", "pass", "killed by SIGKILL"),
        ("pass", "note('died'); os.kill(os.getpid(), signal.SIGKILL)", "killed by SIGKILL"),
        ("pass", "note('died'); os.kill(os.getppid(), signal.SIGKILL); time.sleep(60)", "killed by SIGKILL"),
        ("pass", "note('died'); os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)", "ended by SIGTERM, which dtrain did not"),
    ],
    ids=["before it listens", "after", "with its guard", "by a SIGTERM of somebody's"],
)
def test_a_killed_worker_is_started_again_on_its_port(project: Project, before: str, after: str, message: str) -> None:
    script = project.script(dies(before, after))
    done = project.dtrain("run", "--launcher", "parameter_server", "--chief", "-n", "2", "--max-worker-restarts", "1", script)
    assert done.returncode == 0, done.stderr
    assert f"worker 1 was {message}" in done.stderr
    assert "(1 of 1 restarts)" in done.stderr
    assert (count(project, "worker1", "begins"), count(project, "worker0", "begins")) == (2, 1)
    assert project.json("show", "latest")["restarts"] == 1
    assert "restarts 1" in project.dtrain("show", "latest").stdout
    recorded = project.latest.rank(2).earlier_error(1)
    assert recorded.is_file() != ("getppid" in after and "SIGKILL" in after)  # the guard writes it


def test_restarts_have_an_end(project: Project) -> None:
    script = project.script(dies("os.kill(os.getpid(), signal.SIGKILL)"))
    done = project.dtrain("run", "--launcher", "parameter_server", "--chief", "-n", "2", "--max-worker-restarts", "2", script)
    assert done.returncode == 137
    assert count(project, "worker1", "begins") == 3
    assert "first to fail was worker 1" in done.stderr
    assert "killed by SIGKILL" in done.stderr


def test_a_worker_that_raises_is_not_started_again(project: Project) -> None:
    script = project.script(dies("raise ValueError('bad batch')"))
    done = project.dtrain("run", "--launcher", "parameter_server", "--chief", "-n", "2", script)
    assert done.returncode == 1
    assert count(project, "worker1", "begins") == 1
    assert "first to fail was worker 1" in done.stderr
    assert "ValueError: bad batch" in done.stderr


@pytest.mark.parametrize("guard", [False, True], ids=["script", "with its guard"])
@pytest.mark.parametrize("victim", ["chief 0", "ps 0", "worker 0"])
def test_death_of_what_cannot_be_replaced(project: Project, victim: str, guard: bool, wait_until: Callable[..., None]) -> None:
    """The chief, a server, and a worker 0 that leads: the job ends with that as its cause, though others fail of it at once."""
    options = () if victim == "worker 0" else ("--chief",)
    script = project.script(
        PRELUDE
        + f"""
victim = {victim.split()}
if role != "evaluator":
    server = listen()
if [role, str(index)] == victim:
    note("ready")
    time.sleep(60)
if role in ("chief", "worker"):  # as TensorFlow's tasks do, this one fails of the death at once
    wait_for(victim[0] + victim[1], "ready")
    pid = json.load(open(next(p for p in pathlib.Path("../ranks").glob("*/process.json")
                              if victim[0] in (p.parent / "output.log").read_text())))["pid"]
    while os.path.exists(f"/proc/{{pid}}") and "Z" not in open(f"/proc/{{pid}}/stat").read().split()[2]:
        time.sleep(0.001)
    raise ConnectionError("it is gone")
time.sleep(60)
""".replace('note("ready")', 'print("victim", role, index, flush=True)\n    note("ready")')
    )
    job = project.start("run", "--launcher", "parameter_server", "-n", "2", *options, script)
    name = victim.replace(" ", "")
    wait_until(lambda: count(project, name, "ready") == 1)
    wait_until(lambda: count(project, "worker1", "listens") == 1)
    rank = project.json("show", "latest")["tasks"].index(victim)
    record = read_process(project.latest, rank)
    assert record is not None
    target = record.pid
    if guard:
        target = int(Path(f"/proc/{record.pid}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(target, signal.SIGKILL)
    _, words = job.communicate(timeout=30)
    assert job.returncode == 137, words
    assert f"first to fail was {victim}" in words
    assert "killed by SIGKILL" in words
    status = read_status(project.latest)
    assert status.failure is not None
    assert (status.failure.task, status.state) == (victim, "failed")


@pytest.mark.parametrize("task", ["ps 0", "worker 1"])
def test_a_task_that_never_listens_ends_the_job_by_name(project: Project, task: str) -> None:
    script = project.script(
        PRELUDE + f"if (role + ' ' + str(index)) != {task!r} and role != 'chief':\n    s = listen()\ntime.sleep(60)\n"
    )
    began = time.monotonic()
    done = project.dtrain("run", "--launcher", "parameter_server", "-n", "2", "--chief", "--start-timeout", "2", script)
    assert done.returncode == 1
    assert time.monotonic() - began < 20
    assert f"first to fail was {task}" in done.stderr
    assert "does not listen on 127.0.0.1:" in done.stderr
    assert "2 s after its start (--start-timeout)" in done.stderr
    assert count(project, "chief0", "begins") == (task != "ps 0")


@pytest.mark.parametrize("code", [0, 3])
def test_a_server_that_ends_before_it_listens_is_named_and_nobody_is_started_after(project: Project, code: int) -> None:
    script = project.script(PRELUDE + f"\nif role == 'ps':\n    sys.exit({code})\n" + SERVE)
    done = project.dtrain("run", "--launcher", "parameter_server", "--workers", "1", "--servers", "1", "--chief", script)
    assert done.returncode == (code or 1)
    assert "first to fail was ps 0" in done.stderr
    if code == 0:
        assert "ended with 0 before it listened" in done.stderr
    assert not count(project, "chief0", "begins")
    assert not count(project, "worker0", "begins")


def test_a_signal_after_the_work_is_done_cancels_nothing(project: Project, wait_until: Callable[..., None]) -> None:
    script = project.script(
        PRELUDE
        + "\nif role == 'chief':\n    sys.exit(0)\nsignal.signal(signal.SIGTERM, lambda *_: time.sleep(3) or sys.exit(0))\n"
        + SERVE
    )
    job = project.start("run", "--launcher", "parameter_server", "--workers", "1", "--servers", "1", "--chief", script)
    wait_until(lambda: any(project.folder.glob("workspace/runs/*/ranks/00000/done.json")))
    time.sleep(0.5)
    job.send_signal(signal.SIGTERM)
    _, err = job.communicate(timeout=40)
    assert job.returncode == 0, err


def test_a_signal_after_a_failure_leaves_it_the_cause(project: Project, wait_until: Callable[..., None]) -> None:
    script = project.script(
        PRELUDE
        + "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nserver = listen()\nwait_for('worker0', 'listens')\n"
        + "if index == 1:\n    raise ValueError('bad batch')\ntime.sleep(60)\n"
    )
    job = project.start("run", "--launcher", "multi_worker", "-n", "2", "--grace", "30", script)
    wait_until(lambda: any(project.folder.glob("workspace/runs/*/ranks/00001/error.json")))
    time.sleep(1)
    job.send_signal(signal.SIGINT)
    _, err = job.communicate(timeout=20)
    assert (job.returncode, read_status(project.latest).state) == (1, "failed"), err
    assert "first to fail was worker 1" in err
    assert "ValueError: bad batch" in err


def test_a_port_that_is_taken_is_named(project: Project) -> None:
    script = project.script(
        PRELUDE
        + """
server = listen()
if role == "ps":  # begins before the workers, and takes the port of one
    thief = socket.create_server(("", int(config["cluster"]["worker"][1].rpartition(":")[2])))
time.sleep(60)
"""
    )
    done = project.dtrain("run", "--launcher", "parameter_server", "-n", "2", "--chief", script)
    assert done.returncode == 1
    assert "first to fail was worker 1" in done.stderr
    assert "another process listens on 127.0.0.1:" in done.stderr
    assert count(project, "worker1", "begins") == 0


def test_nothing_outlives_a_killed_launcher(project: Project, wait_until: Callable[..., None]) -> None:
    script = project.script(PRELUDE + SERVE)
    job = project.start("run", "--launcher", "parameter_server", "-n", "2", "--chief", script)
    wait_until(lambda: count(project, "chief0", "listens") == 1)
    wait_until(lambda: count(project, "worker0", "listens") + count(project, "worker1", "listens") == 2)
    assert len(project.processes()) == 12  # of each: script, guard, and who waits for the guard to die
    job.kill()
    job.communicate()
    wait_until(lambda: not project.processes())


def test_a_server_that_does_not_end_is_killed_after_the_grace_time(project: Project) -> None:
    script = project.script(
        PRELUDE
        + "signal.signal(signal.SIGTERM, lambda *a: note('told'))\n"
        + "if role == 'ps':\n"
        + SERVE.replace("\n", "\n    ")
        + "\nserver = listen()\n"
    )
    done = project.dtrain("run", "--launcher", "parameter_server", "--grace", "1", "-n", "1", script)
    assert done.returncode == 0, done.stderr
    assert count(project, "ps0", "told") >= 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--servers", "1"), "go with --launcher parameter_server or multi_worker, not with local"),
        (("--launcher", "mpi", "-n", "2", "--chief"), "not with mpi"),
        (("--launcher", "multi_worker", "--servers", "1"), "has no servers"),
        (("--launcher", "multi_worker", "--tf-config", "master"), "knows no master"),
        (("--launcher", "multi_worker", "--max-worker-restarts", "1"), "cannot start one worker again"),
        (("--launcher", "parameter_server", "--servers", "-1"), "--servers -1"),
        (("--launcher", "parameter_server", "--tf-config", "cheif"), "did you mean chief"),
        (("--launcher", "parameter_server", "--chief", "--tf-config", "workers"), "in which worker 0 leads"),
        (("--launcher", "parameter_server", "--evaluator"), "--evaluator goes with --chief"),
        # tf.estimator's own word for it: "If `master` node exists in `cluster`, task_type `evaluator` is not supported."
        (("--launcher", "parameter_server", "--tf-config", "master", "--evaluator"), "a master evaluates by itself"),
        (("--launcher", "parameter_server", "--start-timeout", "0"), "--start-timeout=0"),
        (("--launcher", "parameter_server", "-n", "2", "--servers", "3", "--max-ranks", "4"), "-n 2 (with all tasks 5) exceeds"),
        (("--launcher", "parameter_server", "--env", "TF_CONFIG={}", "--dry-run"), "--env TF_CONFIG"),
        (("--launcher", "parameter_server", "-n", "4", "-H", "a:2,b:2"), "5 tasks exceed 2 hosts x 2 slots = 4; add hosts"),
        (("--launcher", "parameter_server", "--hostfile", "absent"), "--hostfile absent cannot be read: No such file"),
        (("--launcher", "parameter_server", "--hostfile", "absent", "-H", "a"), "exclude each other"),
        (("--launcher", "multi_worker", "-H", "a"), "one worker without servers runs where dtrain does"),
        (("--launcher", "local", "-H", "a"), "-H and --hostfile go with --launcher mpi, horovod,"),
        (("-n", "3", "-H", "a,b"), "3 tasks exceed 2 hosts x 1 slot = 2; add hosts or slots (-H NAME:SLOTS), or lower --workers"),
        (("-n", "2", "--network", "10.0.0.0/24"), "--network goes with -H or --hostfile"),
        (("-H", "a,b", "--heartbeat-timeout", "1"), "--heartbeat-timeout 1 is not a number of seconds from 3; 0 is never"),
        (("--launcher", "multi_worker", "-n", "2", "--skip-preflight"), "has to ask its hosts for free ports"),
    ],
)
def test_options_that_contradict_are_refused(project: Project, options: tuple[str, ...], words: str) -> None:
    done = project.dtrain("run", *options, project.script("print('ran')"))
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr


def test_dry_run_shows_every_process(project: Project) -> None:
    script = project.script("")
    options = ("--launcher", "parameter_server", "--chief", "--evaluator", "-n", "1")
    plan = json.loads(project.dtrain("run", "--dry-run", "--json", *options, script).stdout)
    assert [(p["name"], p["rank"]) for p in plan["processes"]] == [
        ("ps 0", 2),
        ("chief 0", 0),
        ("worker 0", 1),
        ("evaluator 0", 3),
    ]
    config = json.loads(plan["processes"][3]["environment"]["TF_CONFIG"])
    assert (config["task"], set(config["cluster"])) == ({"type": "evaluator", "index": 0}, {"chief", "worker", "ps"})
    ports = [int(address.rpartition(":")[2]) for addresses in config["cluster"].values() for address in addresses]
    assert len(set(ports)) == 3
    for port in ports:  # they are free
        socket.create_server(("", port)).close()


def test_a_task_started_by_hand_has_a_run_of_its_own(project: Project) -> None:
    project.env["TF_CONFIG"] = json.dumps({"cluster": {"worker": ["a:1", "b:2"]}, "task": {"type": "worker", "index": 1}})
    script = project.script(
        "import dtrain\nrun = dtrain.init()\nrun.log('x', 1)\nprint(run.role, run.index, run.rank, run.size)\n"
    )
    done = subprocess.run(
        [sys.executable, script], cwd=project.folder, env=project.environ(), capture_output=True, text=True, check=True
    )
    assert done.stdout == "worker 1 0 1\n"
    assert [path.name for path in project.latest.metrics.iterdir()] == ["rank-00000-worker-1.jsonl"]
    assert project.json("show", "latest")["tasks"] == ["worker 1"]
