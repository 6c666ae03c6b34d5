"""TensorFlow's own clusters under `dtrain run`: real servers, real deaths. Few, for TensorFlow's import costs seconds."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dtrain.metrics import read_metrics, read_rows
from dtrain.status import read_process

from .conftest import ROOT, Project

pytestmark = [pytest.mark.needs("tensorflow"), pytest.mark.timeout(400)]

EXAMPLE = str(ROOT / "examples" / "tensorflow_ps_digits.py")
TASKS = ["chief 0", "worker 0", "worker 1", "ps 0"]


def kill(project: Project, task: str) -> None:
    record = read_process(project.latest, TASKS.index(task))
    assert record is not None
    os.kill(record.pid, signal.SIGKILL)


def printed(project: Project, rank: int, words: str) -> bool:
    return any(words in path.read_text() for path in project.folder.glob(f"workspace/runs/*/ranks/{rank:05d}/output.log"))


@pytest.fixture
def cluster(project: Project) -> tuple[Project, tuple[str, ...]]:
    return project, ("run", "--launcher", "parameter_server", "--workers", "2", "--servers", "1")


@pytest.mark.needs("sklearn")
def test_the_example_with_an_evaluator_goes_on_when_a_worker_is_killed(
    cluster: tuple[Project, tuple[str, ...]], wait_until: Callable[..., None]
) -> None:
    project, run = cluster
    job = project.start(*run, "--chief", "--evaluator", EXAMPLE, "--epochs", "40")
    wait_until(lambda: printed(project, 0, "epoch 2/"), timeout=180)
    kill(project, "worker 1")
    out, err = job.communicate(timeout=180)

    assert job.returncode == 0, out + err
    assert "worker 1 was killed by SIGKILL; it is started again on 127.0.0.1:" in err
    assert f"[{os.uname().nodename}:chief0] epoch 40/40" in out
    assert not re.findall(r"\] [IW]0000 |absl::InitializeLog|device_count", out)  # TensorFlow's messages
    data = project.json("show", "latest")
    assert (data["state"], data["restarts"], data["tasks"]) == ("completed", 1, [*TASKS, "evaluator 0"])
    chief = data["ranks"][0]["metrics"]
    assert chief["accuracy"] > 0.95
    assert len(read_metrics(project.latest).rows[0]) == 40
    assert data["checkpoints"] == [38 * 44, 39 * 44, 40 * 44]
    evaluated = read_rows(project.latest.metrics_file(4, "evaluator 0"))[-1]
    assert (evaluated["step"], evaluated["accuracy"]) == (40 * 44, chief["accuracy"])

    # The exported model, registered and pulled, says the same in another process.
    assert project.dtrain("register", "latest", "--name", "digits", "--path", "outputs/model").returncode == 0
    assert project.dtrain("pull", "digits:1", "pulled").returncode == 0
    folder = next((project.folder / "pulled").rglob("saved_model.pb")).parent
    read_back = (
        "import sys, numpy as np, tensorflow as tf\n"
        f"sys.path.insert(0, {str(Path(EXAMPLE).parent)!r})\n"
        "from tensorflow_ps_digits import load_digits\n"
        "_, (x, y) = load_digits()\n"
        f"model = tf.saved_model.load({str(folder)!r})\n"
        "print(float(np.mean(np.argmax(model(x), axis=1) == y)))\n"
    )
    done = subprocess.run([sys.executable, "-c", read_back], env=project.environ(), capture_output=True, text=True, check=False)
    assert float(done.stdout) == chief["accuracy"], done.stderr


def test_a_chief_that_is_done_ends_while_a_worker_is_waited_for(
    cluster: tuple[Project, tuple[str, ...]], wait_until: Callable[..., None]
) -> None:
    """By itself, TensorFlow's coordinator then waits for ever."""
    project, run = cluster
    script = project.script("""
import os, time
import tensorflow as tf
resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
task = resolver.task_type, resolver.task_id
if task == ("worker", 1):
    try:
        os.close(os.open("outputs/began", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        time.sleep(600)  # started again, and never there
if task[0] != "chief":
    tf.distribute.Server(resolver.cluster_spec(), *task, protocol="grpc").join()
strategy = tf.distribute.ParameterServerStrategy(resolver)
coordinator = tf.distribute.coordinator.ClusterCoordinator(strategy)
with strategy.scope():
    total = tf.Variable(0.0)
step = tf.function(lambda: total.assign_add(1.0))
steps = 0
while steps < 10:
    for _ in range(4):
        coordinator.schedule(step)
    coordinator.join()
    open("outputs/works", "w").close()
    steps += os.path.exists("outputs/killed")
    time.sleep(0.1)
print("done", flush=True)
""")
    job = project.start(*run, "--chief", script)
    wait_until(lambda: any(project.folder.glob("workspace/runs/*/outputs/works")), timeout=180)
    kill(project, "worker 1")
    (project.latest.outputs / "killed").touch()
    out, err = job.communicate(timeout=90)
    assert job.returncode == 0, out + err
    assert "chief0] done" in out


@pytest.mark.needs("sklearn")
def test_the_example_ends_when_its_server_is_killed_and_is_resumed(
    cluster: tuple[Project, tuple[str, ...]], wait_until: Callable[..., None]
) -> None:
    project, run = cluster
    job = project.start(*run, "--chief", EXAMPLE, "--epochs", "4000")
    wait_until(lambda: printed(project, 0, "epoch 2/"), timeout=180)
    kill(project, "ps 0")
    _, err = job.communicate(timeout=60)
    assert job.returncode == 137, err
    assert "first to fail was ps 0" in err  # and not the chief, which gets an UnavailableError at once
    last = project.json("show", "latest")["checkpoints"][-1] // 44
    again = project.dtrain(*run, "--chief", "--resume", "latest", EXAMPLE, "--epochs", str(last + 1), timeout=180)
    assert again.returncode == 0, again.stderr
    assert re.findall(r"epoch (\d+)/", again.stdout) == [str(last + 1)]


@pytest.mark.needs("sklearn")
def test_the_example_is_started_again_when_its_server_or_chief_is_killed(
    cluster: tuple[Project, tuple[str, ...]], wait_until: Callable[..., None]
) -> None:
    project, run = cluster
    job = project.start(*run, "--chief", "--max-restarts", "2", EXAMPLE, "--epochs", "40")
    for attempt, victim in enumerate(["ps 0", "chief 0"]):
        log = f"workspace/runs/*/attempts/{attempt}/00000/output.log"
        wait_until(lambda log=log: any("epoch" in path.read_text() for path in project.folder.glob(log)), timeout=180)
        wait_until(lambda: list(project.folder.glob("workspace/runs/*/outputs/checkpoints/step-*")))  # an epoch is told first
        kill(project, victim)
    out, err = job.communicate(timeout=240)
    assert job.returncode == 0, out + err
    data = project.json("show", "latest")
    assert [cause.partition(" on ")[0] for cause in data["earlier"]] == ["ps 0", "chief 0"]
    assert len(re.findall("starting the job again from the checkpoint of step", err)) == 2
    rows = read_metrics(project.latest).rows[0]
    assert [row["step"] for row in rows] == [44 * epoch for epoch in range(1, 41)]


TF1 = """
import json, os
import numpy as np
import tensorflow.compat.v1 as tf
tf.disable_v2_behavior()
config = json.loads(os.environ["TF_CONFIG"])
job, index = config["task"]["type"], config["task"]["index"]
cluster = tf.train.ClusterSpec(config["cluster"])
server = tf.train.Server(cluster, job_name=job, task_index=index)
if job == "ps":
    server.join()
with tf.device(tf.train.replica_device_setter(worker_device=f"/job:worker/task:{index}", cluster=cluster)):
    step = tf.train.get_or_create_global_step()
    x = tf.placeholder(tf.float32, [None, 4])
    y = tf.placeholder(tf.float32, [None, 1])
    w = tf.get_variable("w", [4, 1], initializer=tf.zeros_initializer())
    loss = tf.reduce_mean(tf.square(tf.matmul(x, w) - y))
    train = tf.train.GradientDescentOptimizer(0.1).minimize(loss, global_step=step)
# As TensorFlow 1 advises: a worker then neither waits for the other workers nor ends with them.
filters = tf.ConfigProto(device_filters=["/job:ps", f"/job:worker/task:{index}"])
random = np.random.RandomState(index)
with tf.train.MonitoredTrainingSession(server.target, is_chief=index == 0, checkpoint_dir="outputs/checkpoint", config=filters,
                                       hooks=[tf.train.StopAtStepHook(last_step=60)]) as session:
    while not session.should_stop():
        a = random.randn(32, 4)
        session.run(train, {x: a, y: a.sum(1, keepdims=True)})
print("trained")
"""


def test_a_tf1_script_runs_as_it_is(cluster: tuple[Project, tuple[str, ...]]) -> None:
    project, run = cluster
    done = project.dtrain(*run, "--tf-config", "workers", project.script(TF1), timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "worker0] trained" in done.stdout
    assert "worker1] trained" in done.stdout
    written = (project.latest.outputs / "checkpoint" / "checkpoint").read_text()
    assert re.search(r"model.ckpt-6[0-2]", written), written  # worker 1 may be in a step when worker 0 sees the last one


MULTI_WORKER = """
import tensorflow as tf
import dtrain
run = dtrain.init()
strategy = tf.distribute.MultiWorkerMirroredStrategy()
with strategy.scope():
    w = tf.Variable(tf.zeros(3), aggregation=tf.VariableAggregation.MEAN)
@tf.function
def step(x):
    strategy.run(lambda: w.assign_add(x))
for _ in range(4):
    step(tf.constant([1.0, 2.0, 3.0]) * (run.rank + 1))
print("w", w.numpy().tolist(), "of", strategy.num_replicas_in_sync)
"""


def test_multi_worker_mirrored_strategy(cluster: tuple[Project, tuple[str, ...]]) -> None:
    project, _ = cluster
    done = project.dtrain("run", "--launcher", "multi_worker", "-n", "2", project.script(MULTI_WORKER), timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    for worker in (0, 1):
        assert f"worker{worker}] w [6.0, 12.0, 18.0] of 2" in done.stdout


KERAS = """
import tensorflow as tf
import tf_keras
import dtrain, dtrain.tensorflow
run = dtrain.init()
dtrain.tensorflow.serve_if_server()
strategy = tf.distribute.ParameterServerStrategy(tf.distribute.cluster_resolver.TFConfigClusterResolver())
def model(keras):
    return keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(2)])
print("elsewhere:", model(tf.keras).count_params())
with strategy.scope():
    legacy = model(tf_keras)
    legacy.compile(tf_keras.optimizers.SGD(0.1), "mse")
    try:
        model(tf.keras)
    except dtrain.errors.UsageError as error:
        print("refused:", error)
data = lambda context: tf.data.Dataset.from_tensors((tf.ones([8, 3]), tf.ones([8, 2]))).repeat()
legacy.fit(tf_keras.utils.experimental.DatasetCreator(data), epochs=1, steps_per_epoch=7, verbose=0)
print("steps:", int(legacy.optimizer.iterations.numpy()))
"""


@pytest.mark.skipif(importlib.util.find_spec("tf_keras") is None, reason="this lane has neither Keras 3 nor tf_keras")
def test_keras_3_is_refused_on_parameter_servers_and_tf_keras_is_right(cluster: tuple[Project, tuple[str, ...]]) -> None:
    project, run = cluster
    done = project.dtrain(*run, "--chief", project.script(KERAS), timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "elsewhere: 8" in done.stdout
    assert "refused: Keras 3 does not work under ParameterServerStrategy" in done.stdout
    assert "TF_USE_LEGACY_KERAS=1" in done.stdout
    assert "steps: 7" in done.stdout


SERVE = """
import json, os, socket
from dtrain.errors import DtrainError
from dtrain.tensorflow import serve_if_server
taken = socket.create_server(("", 0))
port = taken.getsockname()[1]
def serve(roles, role):
    cluster = {name: [f"127.0.0.1:{port}"] for name in roles}
    os.environ["TF_CONFIG"] = json.dumps({"cluster": cluster, "task": {"type": role, "index": 0}})
    try:
        print("returns", serve_if_server())
    except DtrainError as error:
        print(type(error).__name__, error)
serve_if_server()
serve(["chief", "worker", "ps"], "evaluator")
serve(["chief", "worker"], "worker")
serve(["worker", "ps"], "ps")
serve(["chief", "worker", "ps"], "ps")
"""


def test_who_serves_and_who_does_not(project: Project) -> None:
    project.env["TF_CPP_MIN_LOG_LEVEL"] = "3"
    argv = [sys.executable, "-c", SERVE]
    done = subprocess.run(argv, env=project.environ(), capture_output=True, text=True, timeout=180, check=False)
    first, second, no_chief, taken = done.stdout.splitlines()
    assert (first, second) == ("returns None", "returns None")
    assert no_chief.startswith("RankError this cluster has ps, worker and no chief")
    assert "--launcher parameter_server --chief" in no_chief
    assert taken.startswith("CommunicationError ps 0 cannot listen on 127.0.0.1:"), done.stderr
