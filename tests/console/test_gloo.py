"""Horovod over Gloo: ranks that stay, and elastic jobs, started by `dtrain run` with Horovod's own driver."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from dtrain.status import read_process, read_status, read_world

from .conftest import ROOT, Project

pytestmark = pytest.mark.needs("horovod")

# Of what Horovod itself does only that it gives ranks: TensorFlow's import takes seconds.
PLAIN = 'import os, sys, time\nrank, size = (int(os.environ[f"HOROVOD_{name}"]) for name in ("RANK", "SIZE"))\n'

# An allreduce a step, until the folder holds `enough`.
TRAIN = """
import os, sys, time
import dtrain, dtrain.errors
run = dtrain.init()
import numpy as np
import tensorflow as tf
import horovod.tensorflow as hvd
from horovod.common.elastic import ObjectState

hvd.init()
state = ObjectState(bcast_object=hvd.broadcast_object, get_rank=hvd.rank, step=0, enough=False)

@hvd.elastic.run
def train(state):
    print(f"worker {run.index} is rank {run.rank} of {run.size} from step {state.step}", flush=True)
    while not state.enough:
        total = float(hvd.allreduce(tf.constant(1.0), op=hvd.Sum, name="one"))
        assert total == run.size == hvd.size() and run.rank == hvd.rank()
        state.step += 1
        run.log_row(state.step, workers=total)
        EACH_STEP
        time.sleep(0.05)
        state.enough = bool(hvd.broadcast_object(os.path.exists(sys.argv[1])))
        state.commit()

train(state)
print("done", flush=True)
"""
KERAS = """
import os, sys, time
import dtrain
run = dtrain.init()
import numpy as np
import tensorflow as tf
import horovod.tensorflow.keras as hvd
from horovod.tensorflow import broadcast_object

hvd.init()
tf.keras.utils.set_random_seed(run.index)
model = tf.keras.Sequential([tf.keras.layers.Dense(1)])
model.build((None, 3))
optimizer = hvd.DistributedOptimizer(tf.keras.optimizers.SGD(0.01, momentum=0.9))
optimizer.build(model.trainable_variables)
model.compile(optimizer, "mse")
x = np.random.default_rng(0).normal(size=(64, 3)).astype("float32")
state = hvd.elastic.KerasState(model, epoch=0, enough=False)

@hvd.elastic.run
def train(state):
    while not state.enough:
        mine = x[run.rank :: run.size]
        state.model.fit(mine, mine.sum(1, keepdims=True), epochs=1, verbose=0)
        state.epoch += 1
        run.log_row(state.epoch, workers=float(run.size))
        state.enough = bool(broadcast_object(os.path.exists(sys.argv[1])))
        state.commit()

train(state)
print("weights", *(value for each in model.get_weights() for value in each.ravel()), flush=True)
"""
ELASTIC = ("run", "--launcher", "horovod", "--grace", "2")
TWO_HOSTS = ("-H", "localhost:1,127.0.0.1:1")  # both this one: Horovod gives up a whole host when a worker fails on it


def scripts(project: Project) -> list[psutil.Process]:
    """The scripts' processes of the newest run, by the numbers of their ranks."""
    run = project.latest.newest_attempt()
    records = [read_process(run, number) for number in range(run.count_ranks())]
    return [process for record in records if record is not None and (process := record.find()) is not None]


@pytest.fixture
def trains(project: Project, wait_until: Callable[..., None]) -> Callable[..., subprocess.Popen[str]]:
    """Starts an elastic job that trains until the file `enough` is there; returns when its first workers have made a step."""

    def start(*options: str, workers: int, each_step: str = "") -> subprocess.Popen[str]:
        script = project.script(TRAIN.replace("EACH_STEP", each_step))
        job = project.start(*ELASTIC, *options, script, str(project.folder / "enough"))
        wait_until(lambda: job.poll() is not None or made_steps(project, job, workers), 100)
        return job

    return start


def made_steps(project: Project, job: subprocess.Popen[str], workers: int) -> bool:
    """Whether so many workers have trained together, or nothing more will come."""
    if job.poll() is not None or not list(project.folder.glob("workspace/runs/*/spec.json")):
        return job.poll() is not None
    run = project.latest
    there = [path for paths in run.metrics_files().values() for path in paths]
    return any(f'"workers":{workers}.0' in path.read_text() for path in there)


def end(project: Project, job: subprocess.Popen[str]) -> tuple[str, str]:
    (project.folder / "enough").touch()
    return job.communicate(timeout=120)


def test_ranks_that_stay(project: Project) -> None:
    script = project.script(
        "import os\nimport psutil\nimport dtrain\n"
        "run = dtrain.init()\n"
        "assert run.comm.allgather_obj(run.rank) == [0, 1] and type(run.comm).__name__ == 'HorovodCommunicator'\n"
        "run.log('rank', run.rank)\n"
        "told = [word for p in psutil.process_iter(['cmdline']) for word in p.info['cmdline'] or () if 'opensesame' in word]\n"
        "assert os.environ['WORD'] == 'opensesame' and not told, told\n"
        "print('rank', run.rank, os.environ['WORD'], os.environ['OPENBLAS_NUM_THREADS'], flush=True)\n"
    )
    project.env["WORD"] = "opensesame"
    cores = len(os.sched_getaffinity(0))
    done = project.dtrain(
        "run", "--launcher", "horovod", "--controller", "gloo", "-n", "2", "--secret", "WORD", script, timeout=120
    )
    assert done.returncode == 0, done.stderr
    host = os.uname().nodename
    assert sorted(done.stdout.splitlines()) == [f"[{host}:{rank}] rank {rank} *** {max(1, cores // 2)}" for rank in (0, 1)]
    assert [rank["metrics"]["rank"] for rank in project.json("show", "latest")["ranks"]] == [0, 1]


@pytest.mark.parametrize(
    ("how", "code", "words"),
    [
        ("raise ValueError('bad batch')", 1, "ValueError: bad batch"),
        ("os.kill(os.getpid(), 9)", 137, "killed by SIGKILL"),
        ("os.kill(os.getppid(), 9)", 137, "killed by SIGKILL, with the process that watched it"),
    ],
)
def test_the_first_to_fail_ends_the_others_and_is_named(project: Project, how: str, code: int, words: str) -> None:
    script = project.script(PLAIN + f"if rank == 1:\n    {how}\ntime.sleep(60)\n")
    done = project.dtrain("run", "--launcher", "horovod", "--controller", "gloo", "-n", "2", script)
    assert done.returncode == code
    assert f"first to fail was rank 1 on {os.uname().nodename}: {words}" in done.stderr


@pytest.mark.parametrize("options", [("--controller", "gloo", "-n", "2"), ("--max-workers", "2", "-n", "2")])
def test_nothing_is_left_when_dtrain_is_killed(
    project: Project, options: tuple[str, ...], wait_until: Callable[..., None]
) -> None:
    script = project.script(PLAIN + "open(f'outputs/{rank}', 'w').close()\ntime.sleep(100)\n")
    job = project.start("run", "--launcher", "horovod", *options, script)
    wait_until(lambda: len(list(project.folder.glob("workspace/runs/*/outputs/[01]"))) == 2)
    job.kill()
    wait_until(lambda: not project.processes())


def test_ctrl_c_ends_an_elastic_job(project: Project, wait_until: Callable[..., None]) -> None:
    script = project.script(PLAIN + "print('there', flush=True)\ntime.sleep(100)\n")
    job = project.start(*ELASTIC, "--max-workers", "2", "-n", "2", script)
    wait_until(lambda: len(list(project.folder.glob("workspace/runs/*/ranks/*/stack.txt"))) == 2)
    job.send_signal(signal.SIGINT)
    said = job.communicate(timeout=30)[1]
    assert job.returncode == 130, said
    assert (read_status(project.latest).state, read_status(project.latest).size) == ("canceled", 2)


def test_a_script_that_raises_ends_an_elastic_job(project: Project) -> None:
    script = project.script(PLAIN + "print('there', flush=True)\ntime.sleep(0.5 * rank)\nraise ValueError('bad batch')\n")
    done = project.dtrain(*ELASTIC, "--min-workers", "1", "-n", "2", "--max-workers", "2", script)
    assert done.returncode == 1
    host = os.uname().nodename
    assert f"first to fail was worker 0 on {host}: ValueError: bad batch; all workers failed" in done.stderr
    assert f"[{host}:worker1] ValueError: bad batch" in done.stdout
    data = project.json("show", "latest")
    assert [(rank["task"], rank["rank_now"]) for rank in data["ranks"]] == [("worker 0", 0), ("worker 1", 1)]


def test_an_elastic_job_that_hangs_is_ended(project: Project) -> None:
    script = project.script(PLAIN + "print('there', flush=True)\ntime.sleep(60)\n")
    done = project.dtrain(*ELASTIC, "--min-workers", "1", "--hang-timeout", "2", script)
    assert done.returncode == 123, done.stderr
    assert "no progress for 2 s (--hang-timeout): worker 0 was at train.py:4" in done.stderr


def test_an_elastic_job_is_started_again_as_any_other(project: Project) -> None:
    script = project.script(
        PLAIN + "print('there', flush=True)\nif os.environ['DTRAIN_ATTEMPT'] == '0':\n    os.kill(os.getpid(), 9)\n"
    )
    done = project.dtrain(*ELASTIC, "--min-workers", "2", "--max-restarts", "1", script)
    assert done.returncode == 0, done.stderr
    status = read_status(project.latest)
    assert (status.size, len(status.earlier)) == (2, 1)
    assert "killed by SIGKILL" in status.earlier[0]


def test_too_few_hosts_to_begin_with(project: Project) -> None:
    (project.folder / "hosts.sh").write_text("#!/bin/sh\necho localhost:1\n")
    (project.folder / "hosts.sh").chmod(0o755)
    script = project.script(PLAIN)
    done = project.dtrain(*ELASTIC, "--min-workers", "2", "--discovery", "hosts.sh", "--elastic-timeout", "2", script)
    assert done.returncode == 1
    assert "no hosts with 2 slots within 2 s (--elastic-timeout)" in done.stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("#!/bin/sh\necho 'no queue' >&2\nexit 3\n", "hosts.sh failed with exit code 3: no queue"),
        ("#!/bin/sh\necho a:b\n", "hosts.sh, line 1: 'a:b' gives no number of slots"),
        ("no program\n", "hosts.sh cannot be run"),
    ],
)
def test_a_discovery_that_fails_is_told_before_anything_starts(project: Project, text: str, words: str) -> None:
    (project.folder / "hosts.sh").write_text(text)
    (project.folder / "hosts.sh").chmod(0o755)
    done = project.dtrain(*ELASTIC, "--min-workers", "1", "--discovery", "./hosts.sh", project.script(PLAIN))
    assert done.returncode == 127
    assert words in done.stderr
    assert not (project.folder / "workspace" / "runs").exists()


def test_a_discovery_that_fails_later_leaves_the_hosts_as_they_were(project: Project, wait_until: Callable[..., None]) -> None:
    program = project.folder / "hosts.sh"
    program.write_text("#!/bin/sh\necho localhost:1\n")
    program.chmod(0o755)
    script = project.script(PLAIN + "print('there', flush=True)\nwhile not os.path.exists(sys.argv[1]):\n    time.sleep(0.1)\n")
    job = project.start(*ELASTIC, "--min-workers", "1", "--discovery", str(program), script, str(project.folder / "enough"))
    wait_until(lambda: bool(list(project.folder.glob("workspace/runs/*/ranks/00000/stack.txt"))))
    program.write_text("#!/bin/sh\nexit 3\n")
    wait_until(lambda: project.latest.launcher_log.exists() and "exit code 3" in project.latest.launcher_log.read_text())
    out, said = end(project, job)
    assert job.returncode == 0, said
    assert out.count("until it answers, the hosts are taken to be as they were") == 1


def test_horovodrun_by_hand(project: Project) -> None:
    project.script("import dtrain\nrun = dtrain.init()\nrun.log('rank', run.rank)\nrun.comm.barrier()\n")
    horovodrun = [sys.executable, "-m", "horovod.runner.launch", "--gloo", "-np", "2", "--disable-cache"]
    done = project.run([*horovodrun, sys.executable, "train.py"], timeout=110)
    assert done.returncode == 0, done.stderr
    data = project.json("show", "latest")
    assert (data["state"], [rank["metrics"]["rank"] for rank in data["ranks"]]) == ("completed", [0, 1])


def test_dtrain_init_in_an_elastic_job_by_hand_says_what_to_do(project: Project) -> None:
    project.env.update(HOROVOD_RANK="0", HOROVOD_SIZE="1", HOROVOD_ELASTIC="1")
    done = project.run([sys.executable, "-c", "import dtrain; dtrain.init()"])
    assert "start it with `dtrain run --launcher horovod --min-workers N script.py`" in done.stderr


@pytest.mark.timeout(300)
def test_an_elastic_job_grows_and_shrinks(
    project: Project, trains: Callable[..., subprocess.Popen[str]], wait_until: Callable[..., None]
) -> None:
    """Also: only who is rank 0 saves, each worker has records of its own, and run.comm waits for nobody."""
    hosts, program = project.folder / "hosts", project.folder / "hosts.sh"
    hosts.write_text("localhost:1\n")
    program.write_text("#!/bin/sh\ncat hosts\n")
    program.chmod(0o755)
    save = (
        "run.comm.barrier()\n"
        "        try:\n"
        "            run.checkpoints.save(state.step, {'step': np.array(state.step)})\n"
        "        except dtrain.errors.UsageError as error:\n"
        "            print(error, flush=True)\n"
    )
    job = trains("--min-workers", "1", "--max-workers", "4", "--discovery", str(program), workers=1, each_step=save)
    hosts.write_text("localhost:1\n127.0.0.1:1\n")
    wait_until(lambda: made_steps(project, job, 2), 60)
    hosts.write_text("127.0.0.1:1\n")
    wait_until(lambda: read_world(project.latest.newest_attempt()).workers == [1], 60)
    out, said = end(project, job)
    assert job.returncode == 0, out + said
    host, run = os.uname().nodename, project.latest
    assert f"[{host}:worker0] worker 0 is rank 0 of 1 from step 0" in out
    assert f"[{host}:worker1] worker 1 is rank 1 of 2 from step " in out
    assert (
        f"[{host}:worker1] checkpoints are saved by rank 0, where ranks come and go one by one, and this is worker 1 (rank 1)"
        in out
    )
    assert f"[{host}:worker1] worker 1 is rank 0 of 1 from step " in out
    assert "dtrain: worker 1 joined: the job has 2 workers now" in said
    assert f"dtrain: worker 0 on {host} was let go, as its host was; the job goes on with 1 worker" in said
    assert f"[{host}:worker1] done" in project.dtrain("logs", "latest").stdout
    ranks = project.json("show", "latest")["ranks"]
    assert [(rank["task"], rank["rank_now"]) for rank in ranks] == [("worker 0", None), ("worker 1", 0)]
    assert {path.name for path in run.metrics.iterdir()} == {"rank-00000-worker-0.jsonl", "rank-00001-worker-1.jsonl"}
    assert len(list(run.checkpoints.glob("step-*/manifest.json"))) == 3


@pytest.mark.timeout(300)
def test_a_model_is_shared_with_a_worker_that_joins(project: Project, wait_until: Callable[..., None]) -> None:
    hosts, program = project.folder / "hosts", project.folder / "hosts.sh"
    hosts.write_text("localhost:1\n")
    program.write_text("#!/bin/sh\ncat hosts\n")
    program.chmod(0o755)
    if importlib.util.find_spec("tf_keras") is not None:
        project.env["TF_USE_LEGACY_KERAS"] = "1"
    options = ("--min-workers", "1", "--discovery", str(program))
    job = project.start(*ELASTIC, *options, project.script(KERAS), str(project.folder / "enough"))
    wait_until(lambda: made_steps(project, job, 1), 100)
    hosts.write_text("localhost:1\n127.0.0.1:1\n")
    wait_until(lambda: made_steps(project, job, 2), 100)
    out, said = end(project, job)
    assert job.returncode == 0, out + said
    weights = [line.split("weights ")[1] for line in out.splitlines() if "weights " in line]
    assert len(weights) == 2
    assert len(set(weights)) == 1


@pytest.mark.timeout(300)
def test_a_killed_worker_is_survived(
    project: Project, trains: Callable[..., subprocess.Popen[str]], wait_until: Callable[..., None]
) -> None:
    job = trains("--min-workers", "1", "-n", "2", *TWO_HOSTS, workers=2)
    run = project.latest.newest_attempt()
    scripts(project)[1].kill()
    wait_until(lambda: made_steps(project, job, 1), 60)
    wait_until(lambda: made_steps(project, job, 2) and read_world(run).workers == [0, 2], 60)  # back, as another worker
    out, said = end(project, job)
    assert job.returncode == 0, out + said
    assert f"dtrain: worker 1 on {os.uname().nodename}: killed by SIGKILL; the job goes on with 1 worker" in said
    assert "dtrain: worker 2 joined: the job has 2 workers now" in said
    status = read_status(run)
    assert (status.state, status.size, status.failure) == ("completed", 3, None)


@pytest.mark.timeout(300)
def test_a_job_with_fewer_workers_than_it_needs_ends_with_its_cause(
    project: Project, trains: Callable[..., subprocess.Popen[str]], wait_until: Callable[..., None]
) -> None:
    job = trains("--min-workers", "2", "--elastic-timeout", "2", *TWO_HOSTS, workers=2)
    scripts(project)[1].kill()
    _, said = job.communicate(timeout=60)
    assert job.returncode == 137, said
    cause = "killed by SIGKILL; fewer than --min-workers 2 were left, and no hosts with 2 slots within 2 s (--elastic-timeout)"
    assert f"first to fail was worker 1 on {os.uname().nodename}: {cause}" in said


@pytest.mark.timeout(300)
def test_a_stale_worker_commits_nothing(
    project: Project, trains: Callable[..., subprocess.Popen[str]], tmp_path: Path, wait_until: Callable[..., None]
) -> None:
    """One that is stopped is given up by the others; its right to save is gone from then on."""
    job = trains("--min-workers", "1", "-n", "2", "--heartbeat-timeout", "3", *TWO_HOSTS, workers=2)
    run = project.latest.newest_attempt()
    assert run.worker_staging(1).is_dir()
    script = scripts(project)[1]
    parent = script.parent()
    assert parent is not None
    parent.suspend()
    script.suspend()
    wait_until(lambda: read_world(run).workers == [0], 60)
    assert not run.worker_staging(1).exists()
    assert run.worker_staging(0).is_dir()
    out, said = end(project, job)
    assert job.returncode == 0, out + said
    assert f"dtrain: worker 1 on {os.uname().nodename}: lost: gives no sign of life since" in said


@pytest.mark.needs("sklearn")
@pytest.mark.timeout(300)
def test_the_example_trains_on_when_a_worker_is_killed(project: Project, wait_until: Callable[..., None]) -> None:
    project.script((ROOT / "examples" / "tensorflow_elastic_digits.py").read_text(), "digits.py")
    job = project.start(*ELASTIC, "--min-workers", "1", "-n", "2", *TWO_HOSTS, "digits.py", "--epochs", "10")
    made = "workspace/runs/*/outputs/metrics/rank-00001-worker-1.jsonl"
    wait_until(lambda: job.poll() is not None or any(path.read_text().count("\n") for path in project.folder.glob(made)), 100)
    scripts(project)[1].kill()
    out, said = job.communicate(timeout=150)
    assert job.returncode == 0, out + said
    assert "the job goes on with 1 worker" in said
    worker = project.json("show", "latest")["ranks"][0]
    assert (worker["steps"], worker["metrics"]["accuracy"] > 0.9) == (10, True)
