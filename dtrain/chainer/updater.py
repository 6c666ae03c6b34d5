"""One training step on all ranks: gradients are averaged over samples, so the split into ranks does not change the result."""

from __future__ import annotations

from typing import Any

import numpy as np
from chainer.dataset import concat_examples
from chainer.dataset.convert import _call_converter
from chainer.training.updaters import StandardUpdater

from dtrain.chainer.iterator import GlobalBatchIterator
from dtrain.chainer.staging import Collective, Staging, cupy_memory
from dtrain.comm import Communicator
from dtrain.errors import UsageError
from dtrain.progress import PROGRESS


class GlobalBatchUpdater(StandardUpdater):
    """Chainer's StandardUpdater over a GlobalBatchIterator: the same update on all ranks, from the gradients of all their
    samples.

    ``optimizer`` is a plain Chainer optimizer that is set up. Its hooks see the averaged gradients, on every rank the same. Every
    parameter must have its shape (see :func:`dtrain.chainer.trainer.initialize`); ``update()`` is collective.
    """

    def __init__(
        self,
        iterator: GlobalBatchIterator,
        optimizer: Any,
        *,
        comm: Communicator,
        device: Any = None,
        converter: Any = concat_examples,
    ) -> None:
        if hasattr(optimizer, "actual_optimizer"):
            raise UsageError(f"{type(optimizer).__name__} of ChainerMN averages gradients itself; give the plain optimizer")
        super().__init__(iterator, optimizer, converter=converter, device=device)
        self._comm = comm
        self._exchange = Exchange()

    def update_core(self) -> None:
        iterator, optimizer = self.get_iterator("main"), self.get_optimizer("main")
        model = optimizer.target
        batch = iterator.next()
        if batch:
            loss = _call(self.loss_func or model, _call_converter(self.converter, batch, self.input_device))
            model.cleargrads()
            loss.backward(loss_scale=optimizer._loss_scale)
            del loss  # frees the graph before the exchange
        else:
            model.cleargrads()
        average_gradients(model, self._comm, self._exchange, weight=len(batch) * self._comm.size / iterator.batch_size)
        optimizer.update()
        PROGRESS.mark()
        if iterator.is_new_epoch:
            optimizer.new_epoch(auto=True)


class Exchange:
    """Runs a collective once over arrays that lie all on the host or all on one GPU; keeps the pinned buffers of the latter."""

    def __init__(self) -> None:
        self._staging: Staging | None = None

    def __call__(self, collective: Collective, arrays: list[Any]) -> None:
        if not arrays or isinstance(arrays[0], np.ndarray):
            collective(arrays)
            return
        if self._staging is None:
            self._staging = Staging(cupy_memory())
        self._staging.exchange(arrays, [], collective)


def average_gradients(model: Any, comm: Communicator, exchange: Exchange, *, weight: float) -> None:
    """Replace every gradient of ``model`` by the mean over ranks of ``weight`` times it. Collective, one fused exchange.

    ``weight`` is this rank's samples divided by the mean number of samples a rank has; a rank without samples has 0. A parameter
    without a gradient counts as having zeros, as Chainer's optimizers treat it.
    """
    params = list(model.params())
    if comm.size == 1 and weight == 1:
        return
    gradients: list[Any] = []
    seen: set[int] = set()
    for param in params:
        gradient, xp = param.grad, param.device.xp
        if gradient is None:
            gradient = xp.zeros_like(param.array)
        elif weight != 1:
            gradient = xp.asarray(gradient * gradient.dtype.type(weight))  # NumPy makes a number of an array without dimensions
        elif id(gradient) in seen or not gradient.flags.c_contiguous or (xp is np and not gradient.flags.writeable):
            # backward() may hand one array to two parameters, or a read-only view such as broadcast_to makes.
            gradient = xp.array(gradient, order="C")
        seen.add(id(gradient))
        gradients.append(gradient)
    exchange(comm.allreduce_mean_, gradients)
    for param, gradient in zip(params, gradients, strict=True):
        param.grad = gradient


def average_statistics_(model: Any, comm: Communicator) -> None:
    """Replace the model's persistent arrays (running statistics) by their mean over ranks. Collective; in place.

    Each rank's BatchNormalization sees its own samples only. An array that is not of floats is taken from rank 0.
    """
    average_arrays_([array for _, array in persistent_arrays(model)], comm)


def average_arrays_(arrays: list[Any], comm: Communicator) -> None:
    """Replace every array by its mean over ranks, or by rank 0's when it is not of floats. Collective."""
    if comm.size > 1 and arrays:
        exchange = Exchange()
        exchange(comm.allreduce_mean_, [array for array in arrays if array.dtype.kind == "f"])
        exchange(comm.broadcast_, [array for array in arrays if array.dtype.kind != "f"])


def persistent_arrays(model: Any) -> list[tuple[str, Any]]:
    """(path, array) of every persistent array of the model, the paths as in its serialized form; not scalars, nor absent ones."""
    found = []
    for prefix, link in sorted(model.namedlinks()):
        for name in sorted(link._persistent):
            value = getattr(link, name)
            if hasattr(value, "dtype") and hasattr(value, "shape") and value.ndim:
                found.append((f"{prefix.rstrip('/')}/{name}", value))
    return found


def _call(function: Any, inputs: Any) -> Any:
    """Call a loss function on what a converter returned, as Chainer does: a tuple and a dict are spread."""
    if isinstance(inputs, tuple):
        return function(*inputs)
    return function(**inputs) if isinstance(inputs, dict) else function(inputs)
