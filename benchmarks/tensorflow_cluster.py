"""One task of a side of bench_tensorflow.py's part ``parameter_server``: tensorflow_cluster.py SIDE BEGAN STEPS WARM_UP FOLDER.

The chief's loop is the same on both sides; they differ in how a process becomes a server or a worker, and ``dtrain`` records.
BEGAN is the time at which the command was given.
"""

import itertools
import json
import resource
import sys
import time
from pathlib import Path

import numpy as np
import tensorflow as tf

side, began, folder = sys.argv[1], float(sys.argv[2]), Path(sys.argv[5])
steps, warm_up = (int(number) for number in sys.argv[3:5])
CHUNK = 100
"""Steps from one join to the next."""

if side == "dtrain":
    import dtrain
    import dtrain.tensorflow

    run = dtrain.init()
    dtrain.tensorflow.serve_if_server()

resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
if resolver.task_type in ("worker", "ps"):
    tf.distribute.Server(
        resolver.cluster_spec(), job_name=resolver.task_type, task_index=resolver.task_id, protocol="grpc"
    ).join()

BATCH, UNITS = 32, (64, 128, 10)


def batches():
    draw = np.random.RandomState(0)
    x = draw.randn(4096, UNITS[0]).astype("float32")
    y = (x @ draw.randn(UNITS[0], UNITS[-1])).argmax(1)
    return tf.data.Dataset.from_tensor_slices((x, y)).shuffle(len(x)).repeat().batch(BATCH)


def main():
    strategy = tf.distribute.ParameterServerStrategy(resolver)
    coordinator = tf.distribute.coordinator.ClusterCoordinator(strategy)
    with strategy.scope():
        draw = np.random.RandomState(1)
        shapes = list(itertools.pairwise(UNITS))
        weights = [tf.Variable((0.1 * draw.randn(*shape)).astype("float32")) for shape in shapes]
        biases = [tf.Variable(tf.zeros(shape[1])) for shape in shapes]
    variables = [*weights, *biases]

    @tf.function
    def step(iterator):
        x, y = next(iterator)
        with tf.GradientTape() as tape:
            hidden = tf.nn.relu(x @ weights[0] + biases[0])
            logits = hidden @ weights[1] + biases[1]
            loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels=y, logits=logits))
        for variable, gradient in zip(variables, tape.gradient(loss, variables), strict=True):
            variable.assign_sub(0.1 * gradient)
        return loss

    iterator = iter(coordinator.create_per_worker_dataset(batches))

    def train(count, done):
        losses = [coordinator.schedule(step, args=(iterator,)) for _ in range(count)]
        coordinator.join()
        loss = float(np.mean(coordinator.fetch(losses)))
        if side == "dtrain":
            run.log_row(done + count, loss=loss)
        return loss

    first_loss = train(1, 0)
    first_step_s = time.time() - began
    for done in range(0, warm_up, CHUNK):
        train(CHUNK, done)
    chunks_s = []
    for done in range(0, steps, CHUNK):
        start = time.perf_counter()
        loss = train(CHUNK, warm_up + done)
        chunks_s.append(time.perf_counter() - start)
    record = {
        "steps_per_s": steps / sum(chunks_s),
        "chunks_s": [round(value, 4) for value in chunks_s],
        "first_step_s": first_step_s,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "first_loss": first_loss,
        "loss": loss,
    }
    (folder / "chief.json").write_text(json.dumps(record))


main()
