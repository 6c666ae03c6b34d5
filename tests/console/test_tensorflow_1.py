"""Scripts for TensorFlow 1, as they are, under `dtrain run`: synchronous workers, and Supervisor.

Asynchronous ones with a MonitoredTrainingSession are in test_tensorflow_cluster.py.
"""

from __future__ import annotations

import re

import pytest

from .conftest import Project

pytestmark = [pytest.mark.needs("tensorflow"), pytest.mark.timeout(400)]

RUN = ("run", "--launcher", "parameter_server", "--workers", "2", "--servers", "1", "--tf-config", "workers")

MODEL = """
import json, os, signal, sys, time
import numpy as np
import tensorflow.compat.v1 as tf
tf.disable_v2_behavior()
tf.logging.set_verbosity("ERROR")
config = json.loads(os.environ["TF_CONFIG"])
job, index = config["task"]["type"], config["task"]["index"]
cluster = tf.train.ClusterSpec(config["cluster"])
server = tf.train.Server(cluster, job_name=job, task_index=index)
if job == "ps":
    server.join()
chief, workers = index == 0, len(config["cluster"]["worker"])
with tf.device(tf.train.replica_device_setter(worker_device=f"/job:worker/task:{index}", cluster=cluster)):
    step = tf.train.get_or_create_global_step()
    x, y = tf.placeholder(tf.float32, [None, 4]), tf.placeholder(tf.float32, [None, 1])
    w = tf.get_variable("w", [4, 1], initializer=tf.zeros_initializer())
    optimizer = tf.train.GradientDescentOptimizer(0.1)
    if "sync" in sys.argv:
        optimizer = tf.train.SyncReplicasOptimizer(optimizer, replicas_to_aggregate=workers, total_num_replicas=workers)
    train = optimizer.minimize(tf.reduce_mean(tf.square(tf.matmul(x, w) - y)), global_step=step)
filters = tf.ConfigProto(device_filters=["/job:ps", f"/job:worker/task:{index}"])
random = np.random.RandomState(index)
starts = open("outputs/starts", "a")  # of worker 1
def begins():
    if not chief:
        starts.write("x")
        starts.flush()
def wait_for(count):
    while chief and os.path.getsize("outputs/starts") < count:
        time.sleep(0.05)
def train_a_step(session):
    a = random.randn(32, 4)
    return session.run([step, train], {x: a, y: a.sum(1, keepdims=True)})[0]
"""

MONITORED = (
    MODEL
    + """
hooks = [optimizer.make_session_run_hook(chief), tf.train.StopAtStepHook(last_step=60 if chief else 40)]
with tf.train.MonitoredTrainingSession(server.target, is_chief=chief, checkpoint_dir="outputs/checkpoint", config=filters,
                                       hooks=hooks) as session:
    begins()
    wait_for(1)
    now, steps = 0, 0
    while not session.should_stop():
        now, steps = train_a_step(session), steps + 1
        if not chief and steps == 5 and os.path.getsize("outputs/starts") == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if now >= 20:
            wait_for(2)
print("trained to", now)
"""
)


def test_synchronous_workers_when_one_is_killed_and_one_leaves_first(project: Project) -> None:
    """Worker 1 is killed, and started again on its port; it leaves at step 40, and worker 0 goes on to 60 without it."""
    done = project.dtrain(*RUN, project.script(MONITORED), "sync", timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "worker 1 was killed by SIGKILL; it is started again on 127.0.0.1:" in done.stderr
    assert re.search(r"worker1\] trained to (39|4\d)", done.stdout), done.stdout
    assert re.search(r"worker0\] trained to (59|60)", done.stdout), done.stdout
    assert 'model.ckpt-60"' in (project.latest.outputs / "checkpoint" / "checkpoint").read_text()
    # It waits two minutes for the next gradients, where nobody tells TensorFlow that there are none.
    assert project.json("show", "latest")["duration_s"] < 100


SUPERVISED = (
    MODEL
    + """
options = {}
if "sync" in sys.argv:
    tokens, runner = optimizer.get_init_tokens_op(0), optimizer.get_chief_queue_runner()
    options["local_init_op"] = optimizer.chief_init_op if chief else optimizer.local_step_init_op
    options["ready_for_local_init_op"] = optimizer.ready_for_local_init_op
supervisor = tf.train.Supervisor(is_chief=chief, logdir="outputs/logdir", init_op=tf.global_variables_initializer(),
                                 global_step=step, recovery_wait_secs=1, **options)
def work(session):
    begins()
    if "sync" in sys.argv and chief:
        session.run(tokens)
        supervisor.start_queue_runners(session, [runner])
    wait_for(1)
    now = 0
    while now < 60 and not supervisor.should_stop():
        before = session.run(step)
        train_a_step(session)
        now = session.run(step) if chief else before  # so worker 1 always wants one step more than worker 0
    print("trained to", now)
if "managed" in sys.argv:
    with supervisor.managed_session(server.target, config=filters) as session:
        work(session)
else:
    work(supervisor.prepare_or_wait_for_session(server.target, config=filters))
print("done")
"""
)


@pytest.mark.parametrize("words", [("async", "managed"), ("sync", "managed"), ("sync", "not stopped")], ids=" ".join)
def test_workers_of_a_supervisor(project: Project, words: tuple[str, ...]) -> None:
    done = project.dtrain(*RUN, project.script(SUPERVISED), *words, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"worker0\] trained to 6\d", done.stdout), done.stdout
    for worker in (0, 1):
        assert f"worker{worker}] done" in done.stdout
    assert project.json("show", "latest")["duration_s"] < 100
