"""Train a small network on handwritten digits with TensorFlow's parameter servers; a chief hands out steps to the workers.

``dtrain run --launcher parameter_server --workers 2 --servers 1 --chief tensorflow_ps_digits.py``, with ``--evaluator`` too;
alone it trains as well: ``python tensorflow_ps_digits.py``.
"""

import argparse
import contextlib
import itertools
import time

import numpy as np

import dtrain
import dtrain.tensorflow  # before tensorflow: it quiets its start

# isort: split
import tensorflow as tf


class MLP(tf.Module):
    """Plain variables: they work wherever they lie, here on the servers."""

    def __init__(self, units, seed):
        super().__init__()
        random = np.random.RandomState(seed)
        sizes = [64, units, units, 10]
        self.weights = [tf.Variable(random.randn(m, n) * np.sqrt(2 / m), dtype=tf.float32) for m, n in itertools.pairwise(sizes)]
        self.biases = [tf.Variable(tf.zeros(n)) for n in sizes[1:]]

    @tf.function(input_signature=[tf.TensorSpec([None, 64], tf.float32)])
    def __call__(self, x):
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            x = tf.nn.relu(x @ weight + bias)
        return x @ self.weights[-1] + self.biases[-1]

    def state(self):
        return {f"{kind}/{n}": v.numpy() for kind in ("weights", "biases") for n, v in enumerate(getattr(self, kind))}

    def load(self, state):
        for name, value in state.items():
            kind, n = name.split("/")
            getattr(self, kind)[int(n)].assign(value)


def load_digits():
    """scikit-learn's 1,797 images of 8 x 8, of which 360 are kept for validation."""
    from sklearn.datasets import load_digits as load

    images, labels = load(return_X_y=True)
    order = np.random.RandomState(0).permutation(len(images))
    images, labels = np.float32(images[order] / 16), np.int64(labels[order])
    return (images[:-360], labels[:-360]), (images[-360:], labels[-360:])


def parse_arguments():
    parser = argparse.ArgumentParser(description="Train a network on handwritten digits.")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=32, help="samples in a step of one worker")
    parser.add_argument("--units", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=0.1)
    return parser.parse_args()


def accuracy_of(model, test):
    images, labels = test
    return float(np.mean(np.argmax(model(images), axis=1) == labels))


def evaluate(run, model, test, last_step):
    """The evaluator's part: the newest checkpoint, again and again, until the last one."""
    for saved in run.checkpoints.follow(run.checkpoints.restore(), until=run.is_done):
        model.load(saved.shared)
        accuracy = accuracy_of(model, test)
        run.log_row(saved.step, accuracy=accuracy)
        print(f"step {saved.step}/{last_step}  validation {accuracy:.4f}")
        if saved.step >= last_step:
            break


def main():
    args = parse_arguments()
    run = dtrain.init()
    dtrain.tensorflow.serve_if_server()  # servers and workers stay here until the chief is done
    train, test = load_digits()
    steps = len(train[0]) // args.batch_size
    if run.role == "evaluator":
        return evaluate(run, MLP(args.units, seed=0), test, args.epochs * steps)
    coordinator, scope = None, contextlib.nullcontext()
    if run.role == "chief":
        strategy = tf.distribute.ParameterServerStrategy(tf.distribute.cluster_resolver.TFConfigClusterResolver())
        coordinator, scope = tf.distribute.coordinator.ClusterCoordinator(strategy), strategy.scope()
    with scope:
        model = MLP(args.units, seed=0)
    restored = run.checkpoints.restore()
    if restored is not None:
        model.load(restored.shared)

    def batches():
        return tf.data.Dataset.from_tensor_slices(train).shuffle(len(train[0])).repeat().batch(args.batch_size)

    @tf.function
    def step(iterator):
        images, labels = next(iterator)
        with tf.GradientTape() as tape:
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=model(images))
            loss = tf.reduce_mean(losses)
        variables = model.trainable_variables
        for variable, gradient in zip(variables, tape.gradient(loss, variables), strict=True):
            variable.assign_sub(args.learning_rate * gradient)
        return loss

    iterator = iter(coordinator.create_per_worker_dataset(batches) if coordinator else batches())
    first = restored.step // steps if restored is not None else 0
    for epoch in range(first + 1, args.epochs + 1):
        began = time.perf_counter()
        losses = [coordinator.schedule(step, args=(iterator,)) if coordinator else step(iterator) for _ in range(steps)]
        if coordinator:
            coordinator.join()
            losses = coordinator.fetch(losses)
        loss, steps_per_s = float(np.mean(losses)), steps / (time.perf_counter() - began)
        accuracy = accuracy_of(model, test)
        run.log_row(epoch * steps, loss=loss, accuracy=accuracy, steps_per_s=steps_per_s)
        print(f"epoch {epoch}/{args.epochs}  loss {loss:.4g}  validation {accuracy:.4f}  {steps_per_s:.0f} steps/s")
        run.checkpoints.save(epoch * steps, model.state())

    exported = MLP(args.units, seed=0)  # with variables of its own here, not on the servers
    exported.load(model.state())
    tf.saved_model.save(exported, str(run.outputs / "model"))
    print(f"saved {run.outputs / 'model'}")


if __name__ == "__main__":
    main()
