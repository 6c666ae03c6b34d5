"""The mean of gradients over the ranks, in an optimizer of Keras 2 or tf_keras, ``tf.keras.optimizers.legacy`` included.

Horovod's wrapper averages in ``minimize`` alone: gradients that a loop of one's own, or a ``train_step``, hands to
``apply_gradients`` it applies as they are; and where it accumulates it counts every batch as an update, by which Adam corrects
its bias, and schedules set the rate, too fast. Ours averages where Keras itself aggregates over replicas: once on every way.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import tensorflow as tf

from dtrain.errors import UsageError
from dtrain.tensorflow.averaging import NOT_ACCUMULATED, NOT_COMPILED, Reduction, check_same_variables, subclass

_Pairs = Iterable[tuple[Any, Any]]
"""Gradients (some may be None), each with its variable."""


def is_keras2_optimizer(optimizer: Any) -> bool:
    return hasattr(optimizer, "aggregate_gradients") or hasattr(optimizer, "_aggregate_gradients")


def is_distributed(optimizer: Any) -> bool:
    return isinstance(getattr(optimizer, "inner_optimizer", optimizer), _Averaging)


def distribute(optimizer: Any, reduction: Reduction, *, backward_passes: int = 1) -> Any:
    """Make an optimizer of Keras 2 average its gradients over the ranks; returns the same object.

    Its class becomes a :func:`~dtrain.tensorflow.averaging.subclass`.
    """
    # What scales a loss (mixed_float16) lets its inner optimizer aggregate before it looks for an overflow: all ranks see one.
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    cls = type(inner)
    if issubclass(cls, _Averaging) or hasattr(inner, "_allreduce_grads"):
        raise UsageError(f"this {cls.__name__} averages its gradients already; wrap an optimizer once")
    if backward_passes > 1 and inner is not optimizer:
        raise UsageError(NOT_ACCUMULATED)
    made = subclass(_Averaging, cls, {"dtrain_reduction": reduction, "dtrain_passes": backward_passes})
    # Keras's own __setattr__ tracks what it is given, for its checkpoints.
    object.__setattr__(inner, "__class__", made)
    return optimizer


class _Accumulated:
    """What the backward passes since the last update came to, by variable."""

    def __init__(self) -> None:
        self.has_agreed = False
        """Whether the ranks have compared their variables."""
        self._variables: list[Any] = []
        self._passes: Any = None
        self._sums: dict[Any, Any] = {}

    def add(self, pairs: _Pairs) -> tuple[Any, list[Any]]:
        """How many passes these are the last of, and each variable's sum; None where no pass had a gradient.

        Raises UsageError for other variables than those of the passes before: a pass is all of them.
        """
        refs = [variable.ref() for _, variable in pairs]
        if (self._variables or refs) != refs:
            raise UsageError(
                "backward_passes_per_step counts calls of apply_gradients, each with all variables; this one has others than the "
                "one before: give it all of them, or wrap an optimizer for each part"
            )
        self._variables = refs
        with tf.init_scope():
            if self._passes is None:
                self._passes = tf.Variable(0, trainable=False, dtype=tf.int64)
            for gradient, variable in pairs:
                if gradient is not None and variable.ref() not in self._sums:
                    self._sums[variable.ref()] = tf.Variable(tf.zeros(variable.shape, gradient.dtype), trainable=False)
        sums = []
        for gradient, variable in pairs:
            if gradient is not None:
                # Of an embedding it is sparse, and a sum of those has every row that any of them has.
                self._sums[variable.ref()].assign_add(tf.convert_to_tensor(gradient))
            sums.append(self._sums.get(variable.ref()))
        return self._passes.assign_add(1, read_value=True), sums

    def clear(self, sums: Iterable[Any]) -> None:
        self._passes.assign(0)
        for total in sums:
            if total is not None:
                total.assign(tf.zeros_like(total))


class _Averaging:
    """Put in front of a Keras 2 optimizer's class."""

    dtrain_reduction: Reduction
    dtrain_passes: int

    @property
    def dtrain_accumulated(self) -> _Accumulated:
        # Made late: Keras makes optimizers anew, of this class, from their configuration.
        if "_dtrain_accumulated" not in self.__dict__:
            object.__setattr__(self, "_dtrain_accumulated", _Accumulated())
        made: _Accumulated = self.__dict__["_dtrain_accumulated"]
        return made

    @tf.autograph.experimental.do_not_convert
    def aggregate_gradients(self, grads_and_vars: _Pairs) -> list[tuple[Any, Any]]:
        pairs = list(grads_and_vars)
        if self.dtrain_passes > 1 and getattr(self, "_is_wrapped_by_loss_scale_optimizer", False):
            raise UsageError(NOT_ACCUMULATED)
        variables = [variable for _, variable in pairs]
        if not self.dtrain_accumulated.has_agreed:
            self.dtrain_accumulated.has_agreed = True
            check_same_variables(variables)
        return list(zip(self.dtrain_reduction([gradient for gradient, _ in pairs]), variables, strict=True))

    _aggregate_gradients = aggregate_gradients  # of tf.keras.optimizers.legacy

    @tf.autograph.experimental.do_not_convert
    def apply_gradients(self: Any, grads_and_vars: _Pairs, *args: Any, **kwargs: Any) -> Any:
        apply, passes = super().apply_gradients, self.dtrain_passes  # type: ignore[misc]
        pairs = list(grads_and_vars)
        if passes == 1:
            return apply(pairs, *args, **kwargs)
        variables = [variable for _, variable in pairs]
        with tf.init_scope():  # what it needs must not be made within the condition
            (self.build if hasattr(self, "build") else self._create_all_weights)(variables)
        accumulated = self.dtrain_accumulated
        done, sums = accumulated.add(pairs)

        def update() -> Any:
            means = [None if total is None else total / passes for total in sums]
            apply(list(zip(means, variables, strict=True)), *args, **kwargs)
            accumulated.clear(sums)
            return tf.constant(True)

        tf.cond(tf.equal(done, passes), update, lambda: tf.constant(False))
        return self.iterations


def compile_model(original: Callable[..., None], model: Any, *args: Any, **kwargs: Any) -> None:
    """``compile`` of Keras 2, which refuses what does not go with an optimizer of ours."""
    given = inspect.signature(original).bind_partial(model, *args, **kwargs).arguments
    if is_distributed(given.get("optimizer")) and given.get("jit_compile"):
        raise UsageError(NOT_COMPILED)
    original(model, *args, **kwargs)
    inner = getattr(model.optimizer, "inner_optimizer", None)  # Keras wraps it to scale the loss
    if isinstance(inner, _Averaging) and inner.dtrain_passes > 1:
        raise UsageError(NOT_ACCUMULATED)
