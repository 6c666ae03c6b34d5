"""A Keras model's state as a checkpoint's tensors, and back; Keras 2, tf_keras and Keras 3 alike.

* shared (the same on all ranks): weights and optimizer variables. Running statistics (BatchNormalization), which are each rank's
  own while it trains, are replaced by their mean before;
* own (a rank's): the states of Keras 3's random generators (dropout). Keras 2 and tf_keras keep those where nobody reads them: a
  resumed run draws other masks there.

Names begin with a variable's place, and have nothing of the names that Keras makes up: those count the layers that a process has
made, and a resumed script may have made more of them.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import tensorflow as tf

from dtrain.comm import Array, Communicator
from dtrain.comm._agreement import name_ranks
from dtrain.errors import CheckpointError, CommunicationError, UsageError

_CHUNK_WORDS = 2**16
_CHUNK_FACTOR = 0x9E3779B97F4A7C15
"""Odd; by it a chunk's place counts in a checksum."""


def keras3() -> Any:
    """The loaded Keras, if it is Keras 3 or later, or None."""
    keras = sys.modules.get("keras")
    return keras if keras is not None and int(str(getattr(keras, "__version__", "0")).split(".")[0]) >= 3 else None


def short_name(variable: Any) -> str:
    """``kernel``, of ``dense_3/kernel:0``; without the number of a variable that nobody has named (``variable_3``)."""
    return re.sub(r"(_\d+)+$", "", str(variable.name).rsplit("/", 1)[-1].split(":")[0])


def read(variables: Sequence[Any]) -> list[Array]:
    """Copies of their values."""
    return [np.array(variable.numpy()) for variable in variables]


def assign(variables: Sequence[Any], values: Sequence[Array]) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def optimizer_variables(model: Any) -> list[Any]:
    """All of them, made where the optimizer has not trained yet. Raises UsageError for a model that is not compiled or built."""
    optimizer = getattr(model, "optimizer", None)
    if optimizer is None:
        raise UsageError("the model is not compiled; call model.compile(optimizer, loss) first")
    if not model.built:
        raise UsageError(
            "the model has no weights before it sees data, and all ranks must begin with the same: give it an Input layer, or "
            "call model.build(input_shape) before fit"
        )
    if hasattr(optimizer, "build"):
        if not getattr(optimizer, "built", False):
            optimizer.build(model.trainable_variables)
    else:  # tf.keras.optimizers.legacy
        optimizer._create_all_weights(model.trainable_variables)
    variables = optimizer.variables
    found = list(variables() if callable(variables) else variables)
    # Keras 2 does not count the learning rate among them, which callbacks lower and a resumed run must find lowered.
    rate = optimizer.learning_rate
    if hasattr(rate, "assign") and not any(rate is variable for variable in found):
        found.append(rate)
    return found


def generator_states(model: Any) -> list[Any]:
    """The states of Keras 3's random generators; none on Keras 2."""
    return [variable for variable in model.variables if short_name(variable) == "seed_generator_state"]


def capture(model: Any) -> tuple[dict[str, Array], dict[str, Array]]:
    """(shared, own) for ``Checkpointer.save``."""
    parts = [*_parts(model), ("generator", *_plainly(generator_states(model)))]
    model_part, optimizer_part, own = (dict(zip(_names(part, n), read(v), strict=True)) for part, n, v in parts)
    return {**model_part, **optimizer_part}, own


def restore(model: Any, shared: Mapping[str, Array], own: Mapping[str, Array] | None) -> None:
    """Put back what :func:`capture` returned. Raises CheckpointError where the model or optimizer is another one."""
    for part, short_names, variables in _parts(model):
        _restore(part, short_names, variables, shared)
    if own is not None:
        _restore("generator", *_plainly(generator_states(model)), own)


def _parts(model: Any) -> list[tuple[str, list[str], list[Any]]]:
    """What is shared: the part, its variables' short names, and the variables."""
    slots = optimizer_variables(model)
    return [("model", *_plainly(model.weights)), ("optimizer", _slot_names(model, slots), slots)]


def _plainly(variables: Sequence[Any]) -> tuple[list[str], list[Any]]:
    return [short_name(variable) for variable in variables], list(variables)


def _slot_names(model: Any, slots: Sequence[Any]) -> list[str]:
    """``kernel_momentum``, of Keras 3's ``sequential_1_dense_1_kernel_momentum``: the path of what it is for, and the slot."""
    owners = {v.path.replace("/", "_"): short_name(v) for v in model.variables if hasattr(v, "path")}
    names = []
    for slot in slots:
        owner = name = str(slot.name)
        while owner and owner not in owners:
            owner = owner.rpartition("_")[0]
        names.append(owners[owner] + name[len(owner) :] if owner else short_name(slot))
    return names


def _names(part: str, short_names: Sequence[str]) -> list[str]:
    return [f"{part}/{index:04d}/{name}" for index, name in enumerate(short_names)]


def _restore(part: str, short_names: Sequence[str], variables: Sequence[Any], tensors: Mapping[str, Array]) -> None:
    names = _names(part, short_names)
    there = [name for name in tensors if name.startswith(f"{part}/")]
    if odd := sorted(set(names) ^ set(there)):
        raise CheckpointError(
            f"the checkpoint is of another {part}: only one of the two has {', '.join(odd[:5])}; resume with the "
            "script that saved it"
        )
    for name, variable in zip(names, variables, strict=True):
        if tuple(variable.shape) != tensors[name].shape:
            raise CheckpointError(f"{name} has shape {tensors[name].shape} in the checkpoint, and {tuple(variable.shape)} here")
    assign(variables, [tensors[name] for name in names])


def broadcast_state(model: Any, comm: Communicator) -> None:
    """Give all ranks rank 0's weights and optimizer variables. Collective.

    Raises CommunicationError on all ranks, naming those that differ, where they have not the same variables.
    """
    slots = optimizer_variables(model)  # first: it says what a model without weights needs
    variables = [*model.weights, *slots]
    values = read(variables)
    if comm.size > 1:
        comm.broadcast_(values)
        if comm.rank != 0:
            assign(variables, values)


def average_statistics(model: Any, comm: Communicator) -> None:
    """Replace running statistics by their mean over the ranks. Collective."""
    statistics = [v for v in model.non_trainable_weights if np.dtype(v.numpy().dtype).kind == "f"]
    if comm.size > 1 and statistics:
        values = read(statistics)
        comm.allreduce_mean_(values)
        assign(statistics, values)


def refuse_unsynchronized(model: Any) -> None:
    """Raise UsageError for a BatchNormalization that is to be synchronized, which Keras does over tf.distribute alone."""
    for layer in model._flatten_layers():
        is_normalization = any(cls.__name__.startswith("BatchNormalization") for cls in type(layer).__mro__)
        if is_normalization and getattr(layer, "synchronized", False):
            raise UsageError(
                f"layer {layer.name}: BatchNormalization(synchronized=True) synchronizes over tf.distribute, and not over these "
                "ranks; use horovod.tensorflow.SyncBatchNormalization() (after horovod.tensorflow.init()), or leave out "
                "synchronized"
            )


@lru_cache(maxsize=1)
def _multipliers() -> Any:
    """Odd numbers, the same on all ranks: a word that changes changes its product."""
    return np.random.default_rng(0).integers(0, 2**64, _CHUNK_WORDS, dtype=np.uint64) | np.uint64(1)


def _checksum(variable: Any) -> tuple[int, int]:
    """Two sums, modulo 2**64, of a variable's bytes, eight at a time, each times a number of its place: 99 MB in 25 to 50 ms (a
    BLAKE3 of a copy: 300). The second is of the upper halves alone, whose highest bits (a sign) weigh alike in the first.
    """
    try:
        # As it lies in TensorFlow's own memory. Not on a GPU, and not of types that NumPy does not know (bfloat16).
        octets = np.frombuffer(memoryview(tf.convert_to_tensor(variable)).cast("B"), np.uint8)
    except (BufferError, TypeError, ValueError):
        octets = np.frombuffer(np.ascontiguousarray(variable.numpy()).tobytes(), np.uint8)
    whole = len(octets) // 8 * 8
    words = octets[:whole].view(np.uint64)
    multipliers = _multipliers()
    whole_words = upper = int.from_bytes(octets[whole:].tobytes(), "little")
    for start in range(0, len(words), _CHUNK_WORDS):
        chunk = words[start : start + _CHUNK_WORDS]
        whole_words = (whole_words * _CHUNK_FACTOR + int(np.dot(chunk, multipliers[: len(chunk)]))) % 2**64
        upper = (upper * _CHUNK_FACTOR + int(np.dot(chunk >> np.uint64(32), multipliers[: len(chunk)]))) % 2**64
    return whole_words, upper


def check_in_step(model: Any, comm: Communicator, step: int) -> None:
    """Raise CommunicationError on all ranks unless all have the same trainable weights, by checksums. Collective."""
    if comm.size == 1:
        return
    digests = comm.allgather_obj([_checksum(variable) for variable in model.trainable_variables])
    if all(digest == digests[0] for digest in digests):
        return
    # The weights that most ranks have are taken for right; where two are as many, rank 0's side.
    common = max(digests, key=digests.count)
    odd = [rank for rank, digest in enumerate(digests) if digest != common]
    raise CommunicationError(
        f"after step {step} the weights of {name_ranks(odd)} differ from those of the other ranks: they train apart. Is the "
        "optimizer a DistributedOptimizer, or the tape a DistributedGradientTape, and does every rank make the same steps?"
    )


def read_learning_rate(optimizer: Any) -> float:
    """The learning rate now. Raises UsageError for a schedule, which nobody can set."""
    value = optimizer.learning_rate
    if callable(value) and not hasattr(value, "assign"):
        raise UsageError("the optimizer's learning rate follows a schedule of its own; give it a number to have it changed here")
    return float(np.asarray(value))
