"""The mean of gradients over the ranks, within a graph or eagerly, and a Keras 3 optimizer that applies it.

Horovod wraps an optimizer by overriding methods that Keras 2 calls and Keras 3 does not: there its wrapper averages nothing.
Ours averages in ``apply``, through which every way of training goes.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import horovod.tensorflow as hvd
import tensorflow as tf

from dtrain.comm import Communicator
from dtrain.comm.horovod import HorovodCommunicator
from dtrain.env import RankEnv
from dtrain.errors import CommunicationError, UsageError
from dtrain.tensorflow.state import keras3, short_name

logger = logging.getLogger(__name__)

NOT_ACCUMULATED = (
    "gradients cannot be accumulated where Keras scales the loss (mixed_float16): its LossScaleOptimizer ignores it; leave out "
    "backward_passes_per_step and gradient_accumulation_steps, or use mixed_bfloat16, which needs no scaling"
)
NOT_COMPILED = "jit_compile=True: XLA does not compile Horovod's operations; leave it out or say jit_compile=False"


# Horovod matches what the ranks exchange by the names of its operations. Its own hold those of layers and scopes, in which Keras
# counts what a process has made: a rank that has made another model before would wait for ever.
_made = itertools.count()
_exchanges: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, kw_only=True)
class Reduction:
    """How gradients become one over the ranks: Horovod's options, by its names."""

    op: Any = hvd.Average
    compression: Any = hvd.Compression.none
    sparse_as_dense: bool = False
    gradient_predivide_factor: float = 1.0
    process_set: Any = hvd.global_process_set
    accumulated_as_sum: bool = False
    """Whether what backward passes accumulated is their sum, as Horovod's default has it, or their mean."""
    name: str = field(default_factory=lambda: f"optimizer{next(_made)}")
    """Of its exchanges, of letters and digits. All ranks make as many optimizers; or give them names."""

    def __call__(self, gradients: Sequence[Any]) -> list[Any]:
        """The reduced gradients; those that are None stay so. Collective; as TensorFlow operations."""
        reduced = list(gradients)
        groups: dict[Any, list[int]] = {}
        for index, gradient in enumerate(reduced):
            if gradient is None:
                continue
            if self.sparse_as_dense and isinstance(gradient, tf.IndexedSlices):
                reduced[index] = gradient = tf.convert_to_tensor(gradient)
            # A group of Horovod's is of one dtype.
            groups.setdefault((gradient.dtype, isinstance(gradient, tf.IndexedSlices)), []).append(index)
        for (_, is_sparse), indices in groups.items():
            exchange = self._gather if is_sparse else self._allreduce
            for index, result in zip(indices, exchange([reduced[index] for index in indices]), strict=True):
                reduced[index] = result
        return reduced

    def _allreduce(self, gradients: list[Any]) -> list[Any]:
        factors = {}
        if self.op == hvd.Average and self.gradient_predivide_factor != 1.0:
            factor = self.gradient_predivide_factor
            factors = {"prescale_factor": 1.0 / factor, "postscale_factor": factor}
        reduced: list[Any] = hvd.grouped_allreduce(
            gradients,
            op=self.op,
            compression=self.compression,
            process_set=self.process_set,
            name=self._next_name(),
            ignore_name_scope=True,
            **factors,
        )
        return reduced

    def _gather(self, gradients: list[Any]) -> list[Any]:
        """The rows of all ranks, which together are the sum, or the mean, of sparse gradients."""
        if self.op not in (hvd.Average, hvd.Sum):
            raise UsageError(
                "sparse gradients (of embeddings) can be averaged or summed, not reduced otherwise; pass sparse_as_dense=True"
            )
        same: dict[str, Any] = {"process_set": self.process_set, "ignore_name_scope": True}
        values = hvd.grouped_allgather([each.values for each in gradients], name=self._next_name(), **same)
        rows = hvd.grouped_allgather([each.indices for each in gradients], name=self._next_name(), **same)
        ranks = hvd.size_op(process_set_id=self.process_set.process_set_id) if self.op == hvd.Average else 1
        return [
            tf.IndexedSlices(value / tf.cast(ranks, value.dtype), index, dense_shape=each.dense_shape)
            for value, index, each in zip(values, rows, gradients, strict=True)
        ]

    def _next_name(self) -> str | None:
        """Of the exchange that comes next in this graph; the same on all ranks, and no other's that may be under way."""
        if tf.executing_eagerly():
            return None
        graph = tf.compat.v1.get_default_graph()
        while getattr(outer := getattr(graph, "outer_graph", None), "building_function", False):
            graph = outer
        number = _exchanges[graph] = _exchanges.get(graph, 0) + 1
        return f"dtrain_{self.name}_{number}"


@lru_cache(maxsize=1)
def agreement() -> Communicator:
    """The communicator by which the ranks agree before they exchange; collective when it is made."""
    return HorovodCommunicator()


def check_same_variables(variables: Sequence[Any]) -> None:
    """Raise CommunicationError on all ranks, naming those that differ, unless all have the same variables. Collective.

    Horovod itself waits for a tensor that only some ranks have. Names are compared without the layer's, which counts the layers
    that a process has made. Not done under horovodrun with Gloo: who joins an elastic job would wait for those that began before.
    """
    if RankEnv.read().vocabulary == "horovod":
        return
    mine = [(short_name(v), tuple(v.shape), tf.as_dtype(v.dtype).name) for v in variables]
    by_rank = agreement().allgather_obj(mine)
    for rank, other in enumerate(by_rank):
        if len(other) != len(by_rank[0]):
            raise CommunicationError(
                f"the ranks' models differ: rank 0 has {len(by_rank[0])} trainable variables, rank {rank} has {len(other)}; "
                "build the same model on every rank"
            )
        for index, (ours, theirs) in enumerate(zip(by_rank[0], other, strict=True)):
            if ours != theirs:
                raise CommunicationError(
                    f"the ranks train different models: trainable variable {index} is {_describe(ours)} on rank 0 and "
                    f"{_describe(theirs)} on rank {rank}; build the same model on every rank"
                )


def _describe(variable: tuple[str, tuple[int, ...], str]) -> str:
    name, shape, dtype = variable
    return f"{name} {shape} {dtype}"


def is_keras3_optimizer(optimizer: Any) -> bool:
    keras = keras3()
    return keras is not None and isinstance(optimizer, keras.optimizers.Optimizer)


class _Averaging:
    """Put in front of a Keras 3 optimizer's class."""

    dtrain_reduction: Reduction

    def build(self: Any, variables: Sequence[Any]) -> None:
        if self.dtrain_reduction.process_set is hvd.global_process_set:
            check_same_variables(variables)
        super().build(variables)  # type: ignore[misc]

    def apply(self: Any, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> None:
        if not self.gradient_accumulation_steps:
            grads = self.dtrain_reduction(grads)
        super().apply(grads, trainable_variables)  # type: ignore[misc]

    def register_local_var(self: Any, var: Any) -> None:
        # Without it, hvd.PartialDistributedOptimizer would average what is to stay local, and say nothing.
        raise UsageError(
            "hvd.PartialDistributedOptimizer keeps no layer local on Keras 3; use hvd.PartialDistributedGradientTape(tape, "
            "local_layers=[...]) in a loop of your own, or tf_keras (TF_USE_LEGACY_KERAS=1)"
        )

    def _clip_gradients(self: Any, grads: Sequence[Any]) -> Any:
        # With accumulation Keras calls it in the pass that updates, and with what the passes came to: so one exchange an update.
        if self.gradient_accumulation_steps:
            grads = self.dtrain_reduction(grads)
            if self.dtrain_reduction.accumulated_as_sum:
                grads = [gradient * float(self.gradient_accumulation_steps) for gradient in grads]
        return super()._clip_gradients(grads)  # type: ignore[misc]


def distribute(optimizer: Any, reduction: Reduction, *, backward_passes: int = 1) -> Any:
    """Make a Keras 3 optimizer average its gradients over the ranks; returns the same object.

    Its class becomes a :func:`subclass`.
    """
    cls = type(optimizer)
    if issubclass(cls, _Averaging):
        raise UsageError(f"this {cls.__name__} averages its gradients already; wrap an optimizer once")
    scaled = getattr(optimizer, "inner_optimizer", None)
    if scaled is not None and max(backward_passes, *(each.gradient_accumulation_steps or 1 for each in (optimizer, scaled))) > 1:
        raise UsageError(NOT_ACCUMULATED)
    if backward_passes > 1:
        if optimizer.gradient_accumulation_steps not in (None, backward_passes):
            raise UsageError(
                f"backward_passes_per_step={backward_passes}, but the optimizer has gradient_accumulation_steps="
                f"{optimizer.gradient_accumulation_steps}; give one of them"
            )
        if optimizer.built and optimizer.gradient_accumulation_steps is None:
            raise UsageError("backward_passes_per_step needs an optimizer that has not trained yet; wrap it before")
        optimizer.gradient_accumulation_steps = backward_passes
    if optimizer.built and reduction.process_set is hvd.global_process_set:
        check_same_variables(optimizer._trainable_variables)
    _set_class(optimizer, subclass(_Averaging, cls, {"dtrain_reduction": reduction}))
    return optimizer


def subclass(mixin: type, cls: Any, contents: dict[str, Any]) -> type:
    """A subclass of an optimizer's class that Keras saves by the name of that class: so a model is loaded with the plain one."""
    made = type(cls.__name__, (mixin, cls), {"__module__": cls.__module__, **contents})
    roots = [base.__module__.partition(".")[0] for base in cls.__mro__]
    utils = importlib.import_module(next(root for root in roots if root in ("keras", "tf_keras"))).utils
    package, registered, name = utils.get_registered_name(cls).partition(">")
    if registered:
        for each in (made, cls):  # the name is the latter's again
            utils.register_keras_serializable(package, name)(each)
    return made


def is_distributed(optimizer: Any) -> bool:
    return isinstance(optimizer, _Averaging)


def _set_class(optimizer: Any, cls: type) -> None:
    object.__setattr__(optimizer, "__class__", cls)  # Keras's own __setattr__ tracks what it is given


def compile_model(original: Callable[..., None], model: Any, *args: Any, **kwargs: Any) -> None:
    """``compile`` of Keras 3, which sees to what does not go with an optimizer of ours."""
    optimizer = args[0] if args else kwargs.get("optimizer")
    if is_distributed(optimizer):
        # Scripts for Horovod on Keras 2 pass it, and it has no meaning on Keras 3.
        kwargs.pop("experimental_run_tf_function", None)
        given = inspect.signature(original).bind_partial(model, *args, **kwargs).arguments
        if given.get("jit_compile") is True:
            raise UsageError(NOT_COMPILED)
        if "jit_compile" in kwargs or "jit_compile" not in given:  # else it stands among args
            kwargs["jit_compile"] = False
    original(model, *args, **kwargs)
    scaling = model.optimizer
    if is_distributed(getattr(scaling, "inner_optimizer", None)):
        # Keras, or the script, wrapped it to scale the loss (mixed_float16). It applies nothing where a gradient has
        # overflowed, so the average must come before it looks: else one rank would skip an exchange that the others wait in.
        inner = scaling.inner_optimizer
        reduction = inner.dtrain_reduction
        _set_class(inner, type(inner).__mro__[2])
        distribute(scaling, reduction)
