"""What a :class:`dtrain.tensorflow.Trainer` is given: its options, its data, and how the model is made."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from dtrain.errors import UsageError
from dtrain.tensorflow.device import DEVICES
from dtrain.tensorflow.fit import FitOptions, _is_count
from dtrain.tensorflow.optimizer import COMPRESSIONS
from dtrain.tensorflow.state import keras3

logger = logging.getLogger(__name__)

_KERAS_FILES = (".keras", ".h5")


@dataclass(frozen=True, kw_only=True)
class TrainOptions(FitOptions):
    """How :class:`Trainer` trains, and what it records; checks itself.

    Beside the fields of :class:`FitOptions`: ``epochs``, ``batch_size`` (of all ranks together), ``seed``, ``device`` and
    ``compression``.
    """

    epochs: int
    """Training ends when this many have been done in all, those before a resume included."""
    batch_size: int
    """Samples in a step, of all ranks together; a multiple of the number of ranks."""
    seed: int = 0
    """From it follow the first weights and the order of the samples."""
    device: str = "auto"
    """``auto``, ``cpu`` or ``gpu``; see :func:`dtrain.tensorflow.device.choose_device`."""
    compression: str = "none"
    """``none``, or ``fp16``: gradients travel in half as many bytes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("epochs", 1), ("batch_size", 1), ("seed", 0)):
            if not _is_count(getattr(self, name), least=least):
                raise UsageError(f"{name}={getattr(self, name)!r} is not allowed; use a whole number, at least {least}")
        for name, allowed in (("device", DEVICES), ("compression", COMPRESSIONS)):
            if getattr(self, name) not in allowed:
                raise UsageError(f"{name}={getattr(self, name)!r} is not known; choose one of {', '.join(allowed)}")


@dataclass(frozen=True)
class Work:
    """What is to be trained, on what, and how; the same on every rank or task. Checks itself."""

    build_model: Callable[[], Any]
    train: Any
    test: Any | None
    options: TrainOptions

    def __post_init__(self) -> None:
        if self.options.batch_size > self.samples:
            raise UsageError(f"batch_size={self.options.batch_size} exceeds the {self.samples} training samples; lower it")

    @property
    def samples(self) -> int:
        return count_samples(self.train, "train")

    @property
    def steps_per_epoch(self) -> int:
        return self.samples // self.options.batch_size

    def build(self) -> Any:
        """A compiled model, with the first weights that follow from the seed."""
        tf.keras.utils.set_random_seed(self.options.seed)
        model = self.build_model()
        if getattr(model, "optimizer", None) is None:
            raise UsageError("build_model() must return a compiled model: call model.compile(optimizer, loss) in it")
        return model

    def batches(self, part: int, parts: int, first_epoch: int) -> Any:
        """A dataset of this part of every batch from an epoch to the last; which samples these are follows from seed, epoch and
        step alone.
        """
        total, share = self.options.batch_size, self.options.batch_size // parts

        def generate() -> Iterator[Any]:
            for epoch in range(first_epoch, self.options.epochs):
                order = np.random.default_rng([self.options.seed, epoch]).permutation(self.samples)
                for start in range(part * share, self.samples - total + part * share + 1, total):
                    yield self._take(order[start : start + share])

        spec = tf.nest.map_structure(lambda array: tf.TensorSpec((share, *array.shape[1:]), array.dtype), self.train)
        return tf.data.Dataset.from_generator(generate, output_signature=spec).prefetch(2)

    def _take(self, indices: Any) -> Any:
        return tf.nest.map_structure(lambda array: array[indices], self.train)


def count_samples(data: Any, name: str) -> int:
    if not isinstance(data, tuple) or len(data) != 2:
        raise UsageError(f"{name} must be a pair (inputs, targets) of arrays, not {type(data).__name__}")
    counts = {len(array) for array in tf.nest.flatten(data)}
    if len(counts) != 1:
        raise UsageError(f"the arrays of {name} have different numbers of samples: {', '.join(map(str, sorted(counts)))}")
    return int(counts.pop())


def train_options(given: dict[str, Any]) -> TrainOptions:
    """Options from keywords; raises UsageError, with the nearest right name, for one that is not known."""
    known = {field.name: field for field in fields(TrainOptions)}
    for name in given.keys() - known.keys():
        nearest = difflib.get_close_matches(name, known, n=1)
        raise UsageError(
            f"Trainer has no option {name!r}; " + (f"did you mean {nearest[0]!r}?" if nearest else f"it has {', '.join(known)}")
        )
    missing = [name for name, field in known.items() if field.default is MISSING and name not in given]
    if missing:
        raise UsageError(f"Trainer needs {' and '.join(missing)}")
    return TrainOptions(**given)


def check_model_path(path: str | Path) -> None:
    """Raise UsageError unless the name says in which format a model is to be saved."""
    if Path(path).suffix not in ("", *_KERAS_FILES):
        raise UsageError(
            f"a model cannot be saved as {os.fspath(path)!r}; let the name end with {' or '.join(_KERAS_FILES)}, or with nothing "
            "for a SavedModel folder"
        )


def write_model(model: Any, target: Path) -> str | None:
    """Save a Keras model, whole or not at all; return why it could not be written, or None."""
    temporary, retired = target.with_name(f".tmp-{target.name}"), target.with_name(f".old-{target.name}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove(temporary)
        if target.suffix or keras3() is None:
            model.save(temporary)
        else:
            # It prints every signature to stdout; not every Keras 3 can be told not to.
            quiet = {"verbose": False} if "verbose" in inspect.signature(model.export).parameters else {}
            model.export(temporary, **quiet)
        if target.is_dir():
            _remove(retired)
            os.replace(target, retired)
        os.replace(temporary, target)
        _remove(retired)
    except OSError as error:
        return f"the model cannot be written to {target}: {error.strerror or error}"
    except Exception as error:  # Keras's own, of layers that it cannot save; the other ranks wait to hear of it
        logger.debug("saving %s", target, exc_info=True)
        return f"the model cannot be saved to {target}: {type(error).__name__}: {error}"
    finally:
        with contextlib.suppress(OSError):
            _remove(temporary)
    return None


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def show_epoch(epoch: int, epochs: int, values: dict[str, float]) -> None:
    """Print a line: the one place where dtrain.tensorflow writes any, for Keras's own bars would be torn by many ranks."""
    told = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
    os.write(1, f"epoch {epoch}/{epochs}  {told}\n".encode())
