"""A training script of the SDK's style: TensorFlow 1's parameter servers, by TF_CONFIG. Worker 0 leads.

As a published sample does, worker 0 prepares the data in ./outputs, and the others wait for its file.
"""

import json
import os
import time

import numpy as np
import tensorflow.compat.v1 as tf
from azureml.core.run import Run
from sklearn.datasets import load_digits

DATA = os.path.join("outputs", "data.npz")
STEPS = 60


def load_data(leads):
    if leads:
        images, labels = load_digits(return_X_y=True)
        np.savez("outputs/data.part.npz", x=np.float32(images / 16), y=np.int64(labels))
        os.rename("outputs/data.part.npz", DATA)
    while not os.path.exists(DATA):
        time.sleep(0.1)
    with np.load(DATA) as data:
        return data["x"], data["y"]


def main():
    tf.disable_v2_behavior()
    config = json.loads(os.environ["TF_CONFIG"])
    kind, index = config["task"]["type"], config["task"]["index"]
    print("environment", config["environment"], "task", kind, index)
    cluster = tf.train.ClusterSpec(config["cluster"])
    filters = tf.ConfigProto(device_filters=["/job:ps", f"/job:worker/task:{index}"]) if kind == "worker" else None
    server = tf.train.Server(cluster, job_name=kind, task_index=index, config=filters)
    if kind == "ps":
        server.join()
        return
    leads = index == 0
    x, y = load_data(leads)
    with tf.device(tf.train.replica_device_setter(cluster=cluster, worker_device=f"/job:worker/task:{index}")):
        inputs, targets = tf.placeholder(tf.float32, [None, 64]), tf.placeholder(tf.int64, [None])
        weights = tf.get_variable("weights", [64, 10], initializer=tf.zeros_initializer())
        logits = tf.matmul(inputs, weights)
        loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels=targets, logits=logits))
        accuracy = tf.reduce_mean(tf.cast(tf.equal(tf.argmax(logits, 1), targets), tf.float32))
        step = tf.train.get_or_create_global_step()
        train = tf.train.GradientDescentOptimizer(0.5).minimize(loss, global_step=step)
    run = Run.get_context()
    hooks = [tf.train.StopAtStepHook(last_step=STEPS)]
    found, at = 0.0, 0
    session = tf.train.MonitoredTrainingSession(
        master=server.target, is_chief=leads, hooks=hooks, checkpoint_dir="outputs/train" if leads else None, config=filters
    )
    with session:
        while not session.should_stop():
            _, found, at = session.run([train, accuracy, step], {inputs: x, targets: y})
    run.log("accuracy", float(found))
    run.log("last step", int(at))


if __name__ == "__main__":
    main()
