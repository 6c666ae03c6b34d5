"""Train a linear classifier on handwritten digits with Horovod, while workers die and join.

``dtrain run --launcher horovod --min-workers 1 -H node1:1,node2:1 tensorflow_elastic_digits.py``. What the workers have in common
is in the state: a worker that joins is given it, and when one is lost the others go back to the last ``commit()``.
"""

import argparse

import numpy as np

import dtrain
import dtrain.tensorflow  # before tensorflow: it keeps its start-up messages off

# isort: split
import horovod.tensorflow as hvd
import tensorflow as tf


def load_digits():
    """scikit-learn's 1,797 images of 8 x 8, of which 360 are kept for validation."""
    from sklearn.datasets import load_digits as load

    images, labels = load(return_X_y=True)
    order = np.random.RandomState(0).permutation(len(images))
    images, labels = np.float32(images[order] / 16), np.int32(labels[order])
    return (images[:-360], labels[:-360]), (images[-360:], labels[-360:])


def main():
    parser = argparse.ArgumentParser(description="Train a linear classifier on handwritten digits.")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64, help="samples in a step, of all workers together")
    args = parser.parse_args()

    run = dtrain.init()
    (images, labels), (validation_images, validation_labels) = load_digits()
    hvd.init()
    weights, bias = tf.Variable(tf.zeros((64, 10))), tf.Variable(tf.zeros(10))
    state = hvd.elastic.TensorFlowState([weights, bias], epoch=0)

    def loss_of(mine):
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels[mine], images[mine] @ weights + bias)
        return tf.reduce_mean(losses)

    @hvd.elastic.run
    def train(state):
        print(f"worker {run.index} is rank {run.rank} of {run.size}, from epoch {state.epoch}", flush=True)
        while state.epoch < args.epochs:
            order = np.random.RandomState(state.epoch).permutation(len(images))
            for begin in range(0, len(order) - args.batch_size + 1, args.batch_size):
                with hvd.DistributedGradientTape(tf.GradientTape()) as tape:
                    loss = loss_of(order[begin : begin + args.batch_size][run.rank :: run.size])
                for variable, gradient in zip((weights, bias), tape.gradient(loss, (weights, bias)), strict=True):
                    variable.assign_sub(0.5 * gradient)
            state.epoch += 1
            right = tf.argmax(validation_images @ weights + bias, axis=1) == validation_labels
            run.log_row(state.epoch, loss=float(loss), accuracy=np.mean(right))
            if run.rank == 0:
                run.checkpoints.save(state.epoch, {"weights": weights.numpy(), "bias": bias.numpy()})
            state.commit()

    train(state)
    if run.rank == 0:
        np.savez(run.outputs / "model.npz", weights=weights.numpy(), bias=bias.numpy())


if __name__ == "__main__":
    main()
