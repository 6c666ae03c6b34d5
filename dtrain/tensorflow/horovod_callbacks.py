"""The methods of Horovod's Keras callbacks that ask a Keras backend, done without one: right on Keras 2, tf_keras and Keras 3."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf

from dtrain.errors import UsageError
from dtrain.tensorflow.horovod_fix import plain_variables
from dtrain.tensorflow.state import read_learning_rate


def mend(module: ModuleType) -> None:
    """Replace them in ``horovod._keras.callbacks``; graphs of TensorFlow 1 keep Horovod's own."""
    broadcast = module.BroadcastGlobalVariablesCallbackImpl
    _replace(broadcast, "on_batch_end", _broadcast)
    broadcast.register_local_var = lambda self, variable: self._local_vars.add(plain_variables(variable).ref())
    _replace(module.MetricAverageCallbackImpl, "_average_metrics_in_place", _average_metrics)
    schedule = module.LearningRateScheduleCallbackImpl
    _replace(schedule, "_adjust_learning_rate", _adjust_learning_rate)
    _replace(schedule, "_restore_momentum_if_needed", _restore_momentum)
    _replace(schedule, "on_epoch_end", _log_learning_rate)
    _replace(module.LearningRateWarmupCallbackImpl, "on_epoch_end", _log_warmup)


def _replace(cls: Any, name: str, ours: Any) -> None:
    original = getattr(cls, name)

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return (ours if hvd._executing_eagerly() else original)(self, *args, **kwargs)

    setattr(cls, name, method)


def _broadcast(self: Any, batch: int, logs: Any = None) -> None:
    if self.broadcast_done:
        return
    optimizer_variables = self.model.optimizer.variables
    if callable(optimizer_variables):
        optimizer_variables = optimizer_variables()
    # `variables` of a Keras 3 model have the states of random generators, too, which are each rank's.
    for variables in (self.model.weights, optimizer_variables):
        shared = [each for each in plain_variables(list(variables)) if each.ref() not in self._local_vars]
        with tf.device(self.device):
            hvd.broadcast_variables(shared, root_rank=self.root_rank)
    self.broadcast_done = True


def _average_metrics(self: Any, logs: dict[str, Any] | None = None) -> None:
    if not logs:
        return
    names = sorted(logs)
    values = tf.constant([float(np.asarray(logs[name])) for name in names], dtype=tf.float64)
    with tf.device(self.device):
        means = hvd.allreduce(values, op=hvd.Average).numpy()
    logs.update(zip(names, (float(mean) for mean in means), strict=True))


def _adjust_learning_rate(self: Any, epoch: float) -> None:
    optimizer = self.model.optimizer
    before, after = read_learning_rate(optimizer), self.initial_lr * self.multiplier(epoch)
    optimizer.learning_rate = after
    momentum = getattr(optimizer, "momentum", None)
    if momentum is None or not self.momentum_correction or before == after or not np.any(np.asarray(momentum)):
        return
    if not hasattr(momentum, "assign"):
        raise UsageError(
            f"the momentum of {type(optimizer).__name__} is a constant in Keras's graph and cannot be corrected while the "
            "learning rate changes; pass momentum_correction=False"
        )
    self.restore_momentum = float(np.asarray(momentum))
    momentum.assign(self.restore_momentum * after / before)


def _restore_momentum(self: Any) -> None:
    if self.restore_momentum:
        self.model.optimizer.momentum.assign(self.restore_momentum)
        self.restore_momentum = None


def _log_learning_rate(self: Any, epoch: int, logs: dict[str, Any] | None = None) -> None:
    if logs is not None:
        logs["lr"] = read_learning_rate(self.model.optimizer)


def _log_warmup(self: Any, epoch: int, logs: dict[str, Any] | None = None) -> None:
    _log_learning_rate(self, epoch, logs)
    if epoch == self.end_epoch - 1 and self.verbose > 0 and hvd.rank() == 0:
        rate = read_learning_rate(self.model.optimizer)
        # What the user asks for by verbose=1, in Horovod's words.
        tf.print(f"\nEpoch {epoch + 1}: finished gradual learning rate warmup to {rate:g}.")
