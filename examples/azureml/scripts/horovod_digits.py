"""A training script of the SDK's style: TensorFlow over Horovod; rank 0 logs and saves."""

import argparse
import os

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf
from azureml.core.run import Run
from sklearn.datasets import load_digits


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    hvd.init()
    run = Run.get_context()
    images, labels = load_digits(return_X_y=True)
    x, y = np.float32(images / 16)[hvd.rank() :: hvd.size()], np.int64(labels)[hvd.rank() :: hvd.size()]
    weights = tf.Variable(tf.zeros([64, 10]))
    hvd.broadcast_variables([weights], root_rank=0)
    for step in range(args.steps):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels=y, logits=x @ weights))
        (gradient,) = tape.gradient(loss, [weights])
        weights.assign_sub(0.5 * hvd.allreduce(gradient))
        if hvd.rank() == 0 and step % 10 == 9:
            run.log("loss", float(loss))
    accuracy = hvd.allreduce(tf.reduce_mean(tf.cast(tf.argmax(x @ weights, axis=1) == y, tf.float32)))
    if hvd.rank() == 0:
        run.log("size", hvd.size())
        run.log("accuracy", float(accuracy))
        os.makedirs("outputs", exist_ok=True)
        np.save("outputs/weights.npy", weights.numpy())


if __name__ == "__main__":
    main()
