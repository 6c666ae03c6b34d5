"""A Chainer trainer's state as a checkpoint's tensors and JSON values, and back.

Chainer's own serialization protocol names and enters everything; here it is decided who writes what:

* shared (the same on all ranks): parameters, optimizer state, the position of a GlobalBatchIterator, the count of updates, and
  the mean over ranks of the model's persistent arrays (running statistics);
* own (a rank's): its persistent arrays, other iterators, the states of extensions and triggers, random generators;
* meta (rank 0's, JSON): the scalars and strings of both, so that another number of ranks has something to begin with.

A run resumed on as many ranks gets its own state back and goes on bit for bit. On another number of ranks it gets the shared
state, the mean of the running statistics, rank 0's extension states, the place in the epoch, and freshly seeded random
generators.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from chainer.serializers import DictionarySerializer, NpzDeserializer

from dtrain.chainer.iterator import GlobalBatchIterator
from dtrain.chainer.random_state import capture_random, restore_random, seed_random
from dtrain.chainer.updater import average_arrays_, persistent_arrays
from dtrain.checkpoint import Restored
from dtrain.comm import Array, Communicator
from dtrain.errors import CheckpointError

logger = logging.getLogger(__name__)

Hyperparameters = Mapping[str, Mapping[str, Mapping[str, float]]]
"""``start`` and ``now``: an optimizer's name: a hyperparameter's name: its value."""

FORMAT = "dtrain.chainer/1"
_MEAN = "mean:"
"""Prefix of the mean over ranks of a persistent array, beside each rank's own."""


@dataclass(frozen=True, kw_only=True)
class TrainerState:
    """What ``Checkpointer.save`` takes. Tensors are not copied: they change with the next update."""

    shared: dict[str, Array]
    own: dict[str, Array]
    meta: dict[str, Any]
    own_meta: dict[str, Any]


def capture(trainer: Any, comm: Communicator, start: Mapping[str, Any]) -> TrainerState:
    """Describe the whole state of a ``chainer.training.Trainer``. Collective when its models have persistent arrays.

    ``start``: what :func:`hyperparameters` returned when training began.
    """
    entries: dict[str, Array] = DictionarySerializer().target
    trainer.serialize(DictionarySerializer(entries))
    entries.update(_unserialized(trainer))
    common = _shared_keys(trainer, entries)
    shared, own = _Parts(), _Parts()
    for key, value in entries.items():
        (shared if key in common else own).add(key, value)
    for key, value in _mean_statistics(trainer, comm).items():
        shared.add(_MEAN + key, value)
    random_tensors, random_values = capture_random()
    meta = {
        "format": FORMAT,
        "shared": shared.values,
        "rank_0": own.values,
        "hyperparameters": {"start": dict(start), "now": hyperparameters(trainer)},
        "epoch_details": {name: float(getattr(it, "epoch_detail", 0.0)) for name, it in _iterators(trainer).items()},
    }
    own_meta = {"values": own.values, "random": random_values}
    return TrainerState(shared=shared.tensors, own={**own.tensors, **random_tensors}, meta=meta, own_meta=own_meta)


def restore(trainer: Any, saved: Restored, comm: Communicator, *, seed: int) -> Hyperparameters:
    """Bring ``trainer`` to the state of a checkpoint. Every rank calls it, before its loop begins; no communication.

    ``seed`` renews the random generators when the number of ranks has changed. Returns the hyperparameters of the run that was
    saved, when it began and now, for :func:`restore_hyperparameters` once all extensions are initialized. Raises
    CheckpointError when the checkpoint is of something else, or does not fit the trainer's models, optimizers or dataset.
    """
    meta = saved.meta if isinstance(saved.meta, dict) else {}
    if meta.get("format") != FORMAT:
        raise CheckpointError(
            f"{saved.path} is not a checkpoint of dtrain.chainer (format {meta.get('format')!r}, not {FORMAT!r})"
        )
    entries: dict[str, Any] = dict(saved.shared) | _decode(meta["shared"])
    if saved.own is not None:
        entries |= dict(saved.own) | _decode(saved.own_meta["values"])
    else:
        entries |= _decode(meta["rank_0"])
        entries |= {key[len(_MEAN) :]: value for key, value in saved.shared.items() if key.startswith(_MEAN)}
        entries |= _place_iterators(trainer, meta["epoch_details"])
    _check_models(trainer, entries, saved)
    entries |= _unknown_extensions(trainer, entries, meta["epoch_details"].get("main", 0.0))
    try:
        trainer.serialize(_Deserializer(entries))
    except KeyError as error:
        raise CheckpointError(
            f"{saved.path} has no {error}; the optimizer, iterator or extensions are not those it was written with"
        ) from error
    _restore_unserialized(trainer, entries)
    if saved.own is not None:
        restore_random({key: value for key, value in saved.own.items() if key.startswith("random/")}, saved.own_meta["random"])
    else:
        seed_random(seed, comm.rank, comm.size, saved.step)
        if comm.rank == 0:
            logger.warning(
                "resumed on %d ranks what %d ranks saved at step %d: running statistics begin as the mean of theirs, and random "
                "numbers (dropout) anew; weights, optimizer state and place in the epoch go on",
                *(comm.size, saved.world_size, saved.step),
            )
    hyperparameters: Hyperparameters = meta["hyperparameters"]
    return hyperparameters


class _Parts:
    """Entries divided into tensors and what JSON holds exactly."""

    def __init__(self) -> None:
        self.tensors: dict[str, Array] = {}
        self.values: dict[str, Any] = {}

    def add(self, key: str, value: Array) -> None:
        if value.ndim == 0 and value.dtype.kind in "US":
            self.values[key] = str(value[()])
        elif value.dtype == object and value.ndim == 0 and value[()] is None:
            self.values[key] = None
        elif value.ndim == 0 and (value.dtype.kind in "bi" or (value.dtype == np.float64 and math.isfinite(float(value)))):
            self.values[key] = value.item()
        elif value.dtype.kind in "biuf":
            self.tensors[key] = value
        else:
            raise CheckpointError(
                f"{key} cannot be saved: it is of dtype {value.dtype}; a checkpoint holds numbers, strings and None"
            )


def _decode(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: np.asarray(value) for key, value in values.items()}


class _Deserializer(NpzDeserializer):
    """Chainer's, over a dictionary."""

    def __getitem__(self, key: str) -> _Deserializer:
        return _Deserializer(self.npz, f"{self.path}{key.strip('/')}/")

    def __call__(self, key: str, value: Any) -> Any:
        loaded = super().__call__(key, value)
        # Where there was no array before, the checkpoint's own is handed out, which is not ours to change.
        return np.array(loaded) if loaded is self.npz[self.path + key.lstrip("/")] else loaded


def _unknown_extensions(trainer: Any, entries: Mapping[str, Any], epoch_detail: float) -> dict[str, Any]:
    """Entries of extensions that the checkpoint does not know: their fresh states; their triggers count from here on."""
    fresh: dict[str, Any] = {}
    trainer.serialize(DictionarySerializer(fresh))
    known = {key.split("/")[1] for key in entries if key.startswith(("extensions/", "extension_triggers/"))}
    found = {key: value for key, value in fresh.items() if key.startswith("ext") and key.split("/")[1] not in known}
    for key in found:
        if key.endswith("/previous_iteration"):
            found[key] = entries.get("updater/iteration", found[key])
        elif key.endswith("/previous_epoch_detail"):
            found[key] = np.asarray(epoch_detail)
    for name in sorted({key.split("/")[1] for key in found}):
        logger.warning("the checkpoint has no state of extension %r: it begins anew", name)
    return found


def _iterators(trainer: Any) -> dict[str, Any]:
    """The updater's iterators by name; those of an updater of one's own may not be known."""
    return dict(getattr(trainer.updater, "_iterators", {}))


def _models(trainer: Any) -> dict[str, Any]:
    """Models by the path at which Chainer's updaters serialize them."""
    return {f"updater/model:{name}": optimizer.target for name, optimizer in trainer.updater.get_all_optimizers().items()}


def _shared_keys(trainer: Any, entries: Mapping[str, Array]) -> set[str]:
    keys = {f"{prefix}{path}" for prefix, model in _models(trainer).items() for path, _ in model.namedparams()}
    walks = tuple(f"updater/iterator:{name}/" for name, it in _iterators(trainer).items() if isinstance(it, GlobalBatchIterator))
    for key in entries:
        if key.startswith(("updater/optimizer:", "hidden/", *walks)) or key in ("updater/iteration",):
            keys.add(key)
    return keys


def _mean_statistics(trainer: Any, comm: Communicator) -> dict[str, Array]:
    """Means over ranks of the models' persistent arrays; the models keep theirs."""
    found: dict[str, Array] = {}
    for prefix, model in _models(trainer).items():
        copies = {f"{prefix}{path}": to_host(array) for path, array in persistent_arrays(model)}
        average_arrays_(list(copies.values()), comm)
        found |= copies
    return found


def to_host(array: Any) -> Array:
    """A copy of a NumPy or CuPy array, on the host."""
    copied: Array = np.array(array) if isinstance(array, np.ndarray) else array.get()
    return copied


def _place_iterators(trainer: Any, epoch_details: Mapping[str, float]) -> dict[str, Any]:
    """Entries that bring Chainer's own iterators, whose orders belonged to other ranks, to the same place in the epoch.

    What is left of the epoch is in a fresh order, so some of its samples come twice and others not; from the next epoch on all
    is regular.
    """
    entries: dict[str, Any] = {}
    for name, iterator in _iterators(trainer).items():
        if isinstance(iterator, GlobalBatchIterator):
            continue
        fresh: dict[str, Any] = {}
        iterator.serialize(DictionarySerializer(fresh, f"updater/iterator:{name}/"))
        epoch, fraction = divmod(epoch_details.get(name, 0.0), 1.0)
        length = len(iterator.dataset) if hasattr(iterator, "dataset") else 0
        place: dict[str, float] = {
            "epoch": int(epoch),
            "current_position": int(fraction * length),
            "is_new_epoch": fraction == 0.0,
        }
        place["previous_epoch_detail"] = epoch + int(fraction * length) / max(1, length)
        entries |= fresh | {key: np.asarray(place[key.rpartition("/")[2]]) for key in fresh if key.rpartition("/")[2] in place}
    return entries


def _check_models(trainer: Any, entries: Mapping[str, Any], saved: Restored) -> None:
    """Refuse weights of another model: NumPy would broadcast some of them in silence."""
    for prefix, model in _models(trainer).items():
        here = {f"{prefix}{path}": param for path, param in model.namedparams()}
        there = {key for key in saved.shared if key.startswith(f"{prefix}/")}
        for key in sorted(here.keys() ^ there):
            if key in there or here[key].array is not None:
                where = "the checkpoint" if key in there else "the model"
                raise CheckpointError(f"{saved.path} is of another model: {key} is in {where} only")
        for key in sorted(there):
            array, param = entries[key], here[key]
            if param.array is not None and (array.shape, array.dtype) != (param.shape, param.dtype):
                raise CheckpointError(
                    f"{saved.path} is of another model: {key} is {array.dtype}{list(array.shape)} in the checkpoint and "
                    f"{param.dtype}{list(param.shape)} in the model"
                )


def _unserialized(trainer: Any) -> dict[str, Array]:
    """What Chainer's optimizers change and forget to serialize: float32 copies of float16 weights, and the loss scale."""
    found: dict[str, Array] = {}
    for name, optimizer in trainer.updater.get_all_optimizers().items():
        for path, param in optimizer.target.namedparams():
            master = getattr(param.update_rule, "_fp32_param", None)
            if master is not None:
                found[f"hidden/{name}{path}"] = to_host(master.array)
        if optimizer._loss_scaling_is_dynamic:
            found[f"hidden/{name}:loss_scale"] = np.asarray(float(optimizer._loss_scale))
            found[f"hidden/{name}:loss_scale_nan"] = np.asarray(bool(optimizer._loss_scaling_isnan_ever))
    return found


def _restore_unserialized(trainer: Any, entries: Mapping[str, Any]) -> None:
    for name, optimizer in trainer.updater.get_all_optimizers().items():
        for path, param in optimizer.target.namedparams():
            master = entries.get(f"hidden/{name}{path}")
            if master is not None:
                # Chainer makes the copy at the first update, from weights that are rounded: make it here, whole.
                copy = type(param)(param.device.send(np.array(master)), name=param.name)
                param.update_rule._fp32_param = copy
        if f"hidden/{name}:loss_scale" in entries:
            optimizer._loss_scale = float(entries[f"hidden/{name}:loss_scale"])
            optimizer._loss_scaling_isnan_ever = bool(entries[f"hidden/{name}:loss_scale_nan"])


def hyperparameters(trainer: Any) -> dict[str, dict[str, float]]:
    """Learning rates and other numbers of every optimizer, by its name."""
    found = {}
    for name, optimizer in trainer.updater.get_all_optimizers().items():
        values = optimizer.hyperparam.get_dict() if hasattr(optimizer, "hyperparam") else {}
        found[name] = {key: value for key, value in values.items() if isinstance(value, (bool, int, float))}
    return found


def restore_hyperparameters(trainer: Any, start: Mapping[str, Mapping[str, float]], saved: Hyperparameters) -> None:
    """Chainer does not save these, yet a user's code may change them while it trains (a learning rate that falls).

    One that begins in this run (``start``) as it began in that one goes on from its last value; one that begins otherwise was
    changed by the user. Extensions that shift one take what they find when they are initialized as their first value, so this
    comes after.
    """
    for name, values in start.items():
        before, now = saved["start"].get(name, {}), saved["now"].get(name, {})
        hyperparam = trainer.updater.get_all_optimizers()[name].hyperparam
        for key, value in values.items():
            if key in now and before.get(key) == value:
                setattr(hyperparam, key, now[key])
            elif key in now:
                logger.warning("%s of optimizer %r begins with %s in this run; it was %s", key, name, value, before.get(key))
