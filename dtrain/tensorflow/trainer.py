"""Data-parallel training of a Keras model, assembled: device, data, updates, validation, record, checkpoints, resume."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from dtrain.errors import UsageError, WorkspaceError
from dtrain.tensorflow import state
from dtrain.tensorflow.device import DEVICES, choose_device
from dtrain.tensorflow.fit import DataParallel, FitOptions, _is_count
from dtrain.tensorflow.optimizer import COMPRESSIONS, DistributedOptimizer, refuse_in_cluster

if TYPE_CHECKING:
    from dtrain.run import Run


@dataclass(frozen=True, kw_only=True)
class TrainOptions(FitOptions):
    """How :class:`Trainer` trains, and what it records; checks itself."""

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


class Trainer:
    """Trains a model on all ranks of ``run`` as one process would: the same seed and batch size give the same weights.

    ``build_model()`` returns a compiled Keras model; it is called on every rank, after the device is chosen and the random
    generators are seeded. ``train`` and ``test`` (or None) are pairs (inputs, targets) of arrays, or of structures of arrays,
    that every rank has whole. The options are those of :class:`TrainOptions`, as keywords: ``epochs`` and ``batch_size`` must
    be given. Every rank makes one, with the same arguments; that is collective.

    An epoch is as many whole batches as the samples make, in a new order each time; what is left over is left out. Dropout
    draws differently on every rank.
    """

    def __init__(self, build_model: Callable[[], Any], train: Any, test: Any | None = None, *, run: Run, **options: Any) -> None:
        self._options = chosen = _options(options)
        refuse_in_cluster(run, "Trainer")
        self._run = run
        self._train, self._samples = train, _count(train, "train")
        if chosen.batch_size % run.size:
            raise UsageError(f"batch_size={chosen.batch_size} cannot be shared by {run.size} ranks; use a multiple of {run.size}")
        if chosen.batch_size > self._samples:
            raise UsageError(f"batch_size={chosen.batch_size} exceeds the {self._samples} training samples; lower it")
        self._test, self._test_samples = self._share_of(test)
        choose_device(chosen.device, run.comm)
        tf.keras.utils.set_random_seed(chosen.seed)
        self.model = build_model()
        """The Keras model, compiled with a distributed optimizer."""
        if getattr(self.model, "optimizer", None) is None:
            raise UsageError("build_model() must return a compiled model: call model.compile(optimizer, loss) in it")
        if run.size > 1:
            self.model.optimizer = DistributedOptimizer(self.model.optimizer, run, compression=chosen.compression)
            if getattr(self.model, "jit_compile", False):
                self.model.jit_compile = False  # XLA does not compile Horovod's operations
        self._diversify()

    def run(self) -> dict[str, float]:
        """Train to the end, from the checkpoint if there is one to resume; return the last epoch's metrics. Collective, once."""
        chosen, size = self._options, self._run.size
        fit_options = FitOptions(**{field.name: getattr(chosen, field.name) for field in fields(FitOptions)})
        callback = DataParallel(self._run, fit_options, validation_samples=self._test_samples)
        callback.prepare(self.model)
        spec = tf.nest.map_structure(
            lambda array: tf.TensorSpec((chosen.batch_size // size, *array.shape[1:]), array.dtype), self._train
        )
        first = callback.first_epoch
        batches = tf.data.Dataset.from_generator(lambda: self._batches(first), output_signature=spec).prefetch(2)
        history = self.model.fit(
            batches,
            epochs=chosen.epochs,
            steps_per_epoch=self._samples // chosen.batch_size,
            validation_data=self._test,
            validation_batch_size=max(1, chosen.batch_size // size),
            callbacks=[callback, _Progress(self._run, chosen.epochs)],
            verbose=0,
        )
        return {name: values[-1] for name, values in history.history.items()}

    def save_model(self, path: str | Path = "model.keras") -> Path:
        """Write the model for ``keras.models.load_model``, whole or not at all. Collective; returns the path.

        A relative path is inside the run's outputs. Rank 0 writes. Raises WorkspaceError on all ranks when it cannot. What is
        saved is a plain Keras model; loading it needs neither Horovod nor dtrain.
        """
        run = self._run
        target = run.outputs / path
        state.average_statistics(self.model, run.comm)
        problem = None
        if run.rank == 0:
            temporary = target.with_name(f".tmp-{target.name}")
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                self.model.save(temporary)
                os.replace(temporary, target)
            except OSError as error:
                problem = f"the model cannot be written to {target}: {error.strerror or error}"
        problem = run.comm.bcast_obj(problem)
        if problem is not None:
            raise WorkspaceError(problem)
        return target

    def _share_of(self, test: Any | None) -> tuple[Any | None, int | None]:
        """Every ``size``-th sample of ``test`` from this rank's on, and how many these are."""
        if test is None:
            return None, None
        rank, size = self._run.rank, self._run.size
        if (count := _count(test, "test")) < size:
            raise UsageError(f"{count} validation samples are too few for {size} ranks; give each at least one")
        share = tf.nest.map_structure(lambda array: array[rank::size], test)
        return share, len(range(rank, count, size))

    def _diversify(self) -> None:
        """Give every rank random numbers (dropout) of its own, after all have made the same weights."""
        tf.keras.utils.set_random_seed(self._options.seed + self._run.rank)
        for variable in state.generator_states(self.model):
            variable.assign(variable.numpy() + np.array([self._run.rank, 0], dtype=variable.numpy().dtype))

    def _batches(self, first_epoch: int) -> Iterator[Any]:
        """This rank's part of every batch from an epoch on; which samples these are follows from seed, epoch and step alone."""
        total, rank, size = self._options.batch_size, self._run.rank, self._run.size
        for epoch in range(first_epoch, self._options.epochs):
            order = np.random.default_rng([self._options.seed, epoch]).permutation(self._samples)
            for start in range(0, self._samples - total + 1, total):
                mine = order[start : start + total][rank * (total // size) : (rank + 1) * (total // size)]
                yield tf.nest.map_structure(lambda array, mine=mine: array[mine], self._train)


class _Progress(tf.keras.callbacks.Callback):
    """A line an epoch, by rank 0, of means over the ranks."""

    def __init__(self, run: Run, epochs: int) -> None:
        super().__init__()
        self._run, self._epochs = run, epochs

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        if self._run.rank == 0:
            # The one place where dtrain.tensorflow writes any: Keras's own bars would be torn by many ranks.
            told = "  ".join(f"{name} {value:.4g}" for name, value in (logs or {}).items())
            os.write(1, f"epoch {epoch + 1}/{self._epochs}  {told}\n".encode())


def _count(data: Any, name: str) -> int:
    if not isinstance(data, tuple) or len(data) != 2:
        raise UsageError(f"{name} must be a pair (inputs, targets) of arrays, not {type(data).__name__}")
    counts = {len(array) for array in tf.nest.flatten(data)}
    if len(counts) != 1:
        raise UsageError(f"the arrays of {name} have different numbers of samples: {', '.join(map(str, sorted(counts)))}")
    return int(counts.pop())


def _options(given: dict[str, Any]) -> TrainOptions:
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
