"""Everything of a lane in one process and one world: Chainer, mpi4py, TensorFlow and Horovod, each with its own traffic."""

from __future__ import annotations

import importlib
import importlib.util
import threading

import numpy as np
import pytest

for package in ("mpi4py", "chainer", "tensorflow", "horovod"):
    if importlib.util.find_spec(package) is None:  # not importorskip, which would import Chainer before dtrain.chainer
        pytest.skip(f"needs {package}", allow_module_level=True)

import dtrain.chainer

# isort: split
import chainer
import chainer.functions as F
import horovod.tensorflow as hvd
import tensorflow as tf

from dtrain.comm import Communicator

pytestmark = [pytest.mark.mpi, pytest.mark.needs("mpi", "chainer", "tensorflow", "horovod")]


@pytest.fixture(scope="module", autouse=True)
def horovod() -> None:
    hvd.init()


def test_one_world(comm: Communicator) -> None:
    """Not N worlds of one rank, which is what ranks under another library's mpirun see."""
    assert hvd.mpi_enabled()
    assert (hvd.rank(), hvd.size(), hvd.local_rank()) == (comm.rank, comm.size, comm.local_rank)
    assert comm.size > 1


def test_a_tape_over_tensors_that_are_no_variables(comm: Communicator) -> None:
    """Horovod's own allows them, and dtrain.tensorflow's mending of it must not take that away."""
    importlib.import_module("dtrain.tensorflow")
    tensor = tf.constant([1.0, 2.0]) * (comm.rank + 1)
    with tf.GradientTape() as plain:
        plain.watch(tensor)
        loss = tf.reduce_sum(tensor * tensor)
    (gradient,) = hvd.DistributedGradientTape(plain).gradient(loss, [tensor])
    np.testing.assert_allclose(gradient, np.array([1.0, 2.0]) * (comm.size + 1))


def test_their_collectives_do_not_meet(comm: Communicator) -> None:
    """At the same time, from two threads of each rank, in no agreed order: values follow from rank, size and round."""
    rounds, means = 50, []

    def with_horovod() -> None:
        for index in range(rounds):
            mine = tf.fill([1000], tf.constant(comm.rank + index, tf.float32))
            means.append(hvd.allreduce(mine, op=hvd.Average, name=f"round.{index}").numpy())

    thread = threading.Thread(target=with_horovod)
    thread.start()
    for index in range(rounds):
        small, large = np.full(3, comm.rank * index, np.float64), np.full(50_000, comm.rank - index, np.float32)
        comm.allreduce_mean_([small, large])
        np.testing.assert_allclose(small, np.full(3, index * (comm.size - 1) / 2), rtol=1e-12)
        np.testing.assert_allclose(large, np.full(50_000, (comm.size - 1) / 2 - index), rtol=1e-6)
    thread.join()
    for index, mean in enumerate(means):
        np.testing.assert_allclose(mean, np.full(1000, (comm.size - 1) / 2 + index), rtol=1e-6)
    assert len(means) == rounds


def test_both_frameworks_find_the_gradient_of_the_whole_batch(comm: Communicator) -> None:
    """Least squares; every rank has its share of the examples, and NumPy has them all."""
    random = np.random.RandomState(0)
    each = 4
    x, y = random.randn(comm.size * each, 3).astype("f"), random.randn(comm.size * each, 1).astype("f")
    start = random.randn(3, 1).astype("f")
    expected = 2 / len(x) * x.T @ (x @ start - y)
    share = slice(comm.rank * each, (comm.rank + 1) * each)

    model = chainer.Chain()
    with model.init_scope():
        model.w = chainer.Parameter(start)
    F.mean_squared_error(F.matmul(chainer.Variable(x[share]), model.w), y[share]).backward()
    with_chainer = dtrain.chainer.create_communicator(comm)
    with_chainer.multi_node_mean_grad(model)

    w = tf.Variable(start)

    @tf.function
    def gradient() -> tf.Tensor:
        with hvd.DistributedGradientTape(tf.GradientTape()) as tape:
            loss = tf.reduce_mean((tf.constant(x[share]) @ w - y[share]) ** 2)
        return tape.gradient(loss, [w])[0]

    np.testing.assert_allclose(model.w.grad, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient().numpy(), expected, rtol=1e-5, atol=1e-6)
