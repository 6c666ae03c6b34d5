"""A training script of the SDK's style: TensorFlow on one node, which saves checkpoints and goes on from them."""

import argparse
import os

import numpy as np
import tensorflow as tf
from azureml.core import Run
from sklearn.datasets import load_digits


class MLP(tf.Module):
    def __init__(self, units):
        super().__init__()
        random = np.random.RandomState(0)
        self.w1 = tf.Variable(random.randn(64, units).astype("float32") / 8)
        self.w2 = tf.Variable(random.randn(units, 10).astype("float32") / 8)

    @tf.function(input_signature=[tf.TensorSpec([None, 64], tf.float32)])
    def __call__(self, x):
        return tf.nn.relu(x @ self.w1) @ self.w2


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=0.1)
    parser.add_argument("--resume-from", default=None, help="folder with the checkpoints from where to resume")
    args = parser.parse_args()
    run = Run.get_context()

    images, labels = load_digits(return_X_y=True)
    data = tf.data.Dataset.from_tensor_slices((np.float32(images / 16), np.int64(labels)))
    model, epoch = MLP(64), tf.Variable(0, dtype=tf.int64)
    checkpoint = tf.train.Checkpoint(w1=model.w1, w2=model.w2, epoch=epoch)
    if args.resume_from:
        checkpoint.restore(tf.train.latest_checkpoint(args.resume_from)).assert_consumed()
    print("begins after epoch", int(epoch))
    run.log("first epoch", int(epoch) + 1)

    for _ in range(args.epochs):
        epoch.assign_add(1)
        for x, y in data.shuffle(2000, seed=int(epoch)).batch(64):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels=y, logits=model(x)))
            weights = [model.w1, model.w2]
            for weight, gradient in zip(weights, tape.gradient(loss, weights), strict=True):
                weight.assign_sub(args.learning_rate * gradient)
        right = tf.argmax(model(np.float32(images / 16)), axis=1) == labels
        run.log("accuracy", float(tf.reduce_mean(tf.cast(right, tf.float32))))
        checkpoint.save("outputs/checkpoint")
    os.makedirs("outputs/model", exist_ok=True)
    tf.saved_model.save(model, "outputs/model")


if __name__ == "__main__":
    main()
