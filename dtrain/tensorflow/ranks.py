"""The Trainer's part on a rank: data-parallel training, of batches shared out over the ranks, with Horovod between them."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from dtrain.errors import UsageError, WorkspaceError
from dtrain.tensorflow import state
from dtrain.tensorflow.device import choose_device
from dtrain.tensorflow.fit import DataParallel, FitOptions
from dtrain.tensorflow.optimizer import DistributedOptimizer
from dtrain.tensorflow.work import Work, count_samples, show_epoch, write_model

if TYPE_CHECKING:
    from dtrain.run import Run


class RankPart:
    """What one rank does of a Trainer's work. Every rank has one; what it does is collective."""

    def __init__(self, run: Run, work: Work) -> None:
        self._run, self._work, chosen = run, work, work.options
        if chosen.batch_size % run.size:
            raise UsageError(f"batch_size={chosen.batch_size} cannot be shared by {run.size} ranks; use a multiple of {run.size}")
        self._test, self._test_samples = self._share_of(work.test)
        choose_device(chosen.device, run.comm)
        self.model = work.build()
        if run.size > 1:
            self.model.optimizer = DistributedOptimizer(self.model.optimizer, run, compression=chosen.compression)
            if getattr(self.model, "jit_compile", False):
                self.model.jit_compile = False  # XLA does not compile Horovod's operations
        self._diversify()

    def run(self) -> dict[str, float]:
        chosen, size = self._work.options, self._run.size
        fit_options = FitOptions(**{field.name: getattr(chosen, field.name) for field in fields(FitOptions)})
        callback = DataParallel(self._run, fit_options, validation_samples=self._test_samples)
        callback.prepare(self.model)
        history = self.model.fit(
            self._work.batches(self._run.rank, size, callback.first_epoch),
            epochs=chosen.epochs,
            steps_per_epoch=self._work.steps_per_epoch,
            validation_data=self._test,
            validation_batch_size=max(1, chosen.batch_size // size),
            callbacks=[callback, _Progress(self._run, chosen.epochs)],
            verbose=0,
        )
        return {name: values[-1] for name, values in history.history.items()}

    def save_model(self, target: Path) -> None:
        state.average_statistics(self.model, self._run.comm)
        problem = write_model(self.model, target) if self._run.rank == 0 else None
        problem = self._run.comm.bcast_obj(problem)
        if problem is not None:
            raise WorkspaceError(problem)

    def _share_of(self, test: Any | None) -> tuple[Any | None, int | None]:
        """Every ``size``-th sample of ``test`` from this rank's on, and how many these are."""
        if test is None:
            return None, None
        rank, size = self._run.rank, self._run.size
        if (count := count_samples(test, "test")) < size:
            raise UsageError(f"{count} validation samples are too few for {size} ranks; give each at least one")
        share = tf.nest.map_structure(lambda array: array[rank::size], test)
        return share, len(range(rank, count, size))

    def _diversify(self) -> None:
        """Give every rank random numbers (dropout) of its own, after all have made the same weights."""
        tf.keras.utils.set_random_seed(self._work.options.seed + self._run.rank)
        for variable in state.generator_states(self.model):
            variable.assign(variable.numpy() + np.array([self._run.rank, 0], dtype=variable.numpy().dtype))


class _Progress(tf.keras.callbacks.Callback):
    """A line an epoch, by rank 0, of means over the ranks."""

    def __init__(self, run: Run, epochs: int) -> None:
        super().__init__()
        self._run, self._epochs = run, epochs

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        if self._run.rank == 0:
            show_epoch(epoch + 1, self._epochs, logs or {})
