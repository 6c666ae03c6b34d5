"""What ``fit`` needs on many ranks: one beginning, averaged and recorded metrics, checkpoints, and a check of the weights."""

from __future__ import annotations

import logging
import os
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import tensorflow as tf

from dtrain.comm._agreement import name_ranks
from dtrain.errors import CheckpointError, CommunicationError, UsageError
from dtrain.progress import PROGRESS
from dtrain.tensorflow import state
from dtrain.tensorflow.optimizer import refuse_in_cluster

if TYPE_CHECKING:
    from dtrain.checkpoint import Restored
    from dtrain.run import Run

logger = logging.getLogger(__name__)

FORMAT = "dtrain.tensorflow/1"


@dataclass(kw_only=True)
class _Progress:
    """What the ``fit``s of one run have done in this process: a later one goes on from those before, and from their steps.

    Only the ``fit`` that saved a checkpoint goes on from it. Those before it are done again: what they left to the script (a
    fold's score, another model, layers to unfreeze) is in no checkpoint.
    """

    fits: int = 0
    steps: int = 0
    has_looked: bool = False
    """Whether a checkpoint was looked for: once, by the first that may resume."""
    awaited: Path | None = None
    """The folder of the checkpoint that was found, until the ``fit`` that saved it is reached."""
    awaited_fit: int = 0


_progress: weakref.WeakKeyDictionary[Run, _Progress] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """What :func:`callbacks` does, and when; checks itself."""

    resume: Literal["auto", "never"] | int = "auto"
    """``auto``: from the newest checkpoint that verifies, if there is one; a number: from that step; ``never``: from none. A job
    that is started again within its run (``--max-restarts``) goes on from the newest that it has saved, whatever is said here.
    """
    checkpoint_every: int | Literal["never"] = 1
    """So many epochs; the last of ``fit``'s is saved in any case, also of one that a callback stops."""
    check_every: int = 100
    """So many steps from one comparison of the ranks' weights to the next; the first is after the first step."""
    warmup_epochs: float = 0.0
    """Over so many epochs the learning rate rises from its ``size``-th part to what the optimizer was given."""

    def __post_init__(self) -> None:
        if self.resume not in ("auto", "never") and not _is_count(self.resume, least=0):
            raise UsageError(f"resume={self.resume!r} is not allowed; use 'auto', 'never' or a step's number")
        if self.checkpoint_every != "never" and not _is_count(self.checkpoint_every, least=1):
            raise UsageError(f"checkpoint_every={self.checkpoint_every!r} is not allowed; use a number of epochs, or 'never'")
        if not _is_count(self.check_every, least=1):
            raise UsageError(f"check_every={self.check_every!r} is not allowed; use a number of steps, at least 1")
        if not 0 <= self.warmup_epochs < float("inf"):
            raise UsageError(f"warmup_epochs={self.warmup_epochs!r} is not allowed; use 0 or more")


def _is_count(value: object, *, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def callbacks(run: Run, **options: Any) -> list[Any]:
    """Callbacks for ``model.fit(..., callbacks=[*dtrain.tensorflow.callbacks(run), ...])``; put them first.

    The options are the fields of :class:`dtrain.tensorflow.FitOptions`: ``resume`` (``"auto"``, ``"never"`` or a step),
    ``checkpoint_every`` (epochs, or ``"never"``), ``check_every`` (steps from one comparison of the ranks' weights to the next)
    and ``warmup_epochs`` (of a rising learning rate).

    All ranks take rank 0's weights, or those of the checkpoint that is resumed, from whose epoch ``fit`` then goes on; where a
    script calls ``fit`` several times, the one that saved it does, and those before are done again. At an epoch's end each rank
    records its own metrics, and the callbacks after these see the means over ranks. Running statistics (BatchNormalization) are
    each rank's own while it trains, and their mean when it is validated, saved, and done. Every rank must make the same number
    of steps in an epoch. Raises CommunicationError out of ``fit``, on all ranks, when the ranks' steps (where Keras knows them)
    or weights differ; UsageError for ``BatchNormalization(synchronized=True)``, which knows of tf.distribute alone.
    """
    refuse_in_cluster(run, "callbacks()")
    try:
        chosen = FitOptions(**options)
    except TypeError as error:
        raise UsageError(f"callbacks: {error}; there are {', '.join(FitOptions.__dataclass_fields__)}") from error
    return [DataParallel(run, chosen)]


def first_checkpoint(run: Run, options: FitOptions) -> Restored | None:
    """What training goes on from, by ``options.resume``, or None. Collective."""
    saved = _find(run, options)
    if saved is not None:
        _announce(run, f"resumed from step {saved.step} ({saved.path})")
    return saved


def _find(run: Run, options: FitOptions) -> Restored | None:
    # What it was told is where to begin, and it has begun.
    has_begun = bool(run.layout.attempt) and bool(run.comm.bcast_obj(run.checkpoints.steps()))
    if options.resume == "never" and not has_begun:
        return None
    saved = run.checkpoints.restore("newest" if has_begun or isinstance(options.resume, str) else options.resume)
    if saved is None and run.rank == 0 and run.resume_from is not None:
        logger.warning("%s has no checkpoint to resume from: training begins anew", run.resume_from.id)
    return saved


def _announce(run: Run, line: str) -> None:
    """Print, on rank 0; seen without any logging configured: whether a run began anew is what one looks for."""
    if run.rank == 0:
        os.write(1, f"{line}\n".encode())


class Marks(tf.keras.callbacks.Callback):
    """Every batch is progress, of training, evaluation and prediction alike; what does none for long is taken for hung."""

    def __init__(self) -> None:
        super().__init__()
        self._supports_tf_logs = True  # on Keras 2: do not fetch a batch's metrics for us, nor refuse us on parameter servers

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        PROGRESS.mark()

    def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
        PROGRESS.mark()

    def on_predict_batch_end(self, batch: int, logs: Any = None) -> None:
        PROGRESS.mark()


class DataParallel(Marks):
    """The callback of :func:`callbacks`."""

    def __init__(self, run: Run, options: FitOptions, *, validation_samples: int | None = None) -> None:
        """``validation_samples`` of this rank weigh its validation metrics; None: all ranks weigh alike."""
        super().__init__()
        self._run, self._options = run, options
        self._validation_samples = validation_samples
        self.first_epoch = 0
        self._epoch = 0
        self._steps = 0
        self._fit = 0
        self._prepared = False
        self._unchecked = True
        self._full_rate: float | None = None
        self._ended = self._saved = 0
        """The epochs that have ended, and those when the last checkpoint was made."""

    def prepare(self, model: Any) -> None:
        """Give all ranks the same beginning: rank 0's, or that of a checkpoint. Collective; once, before any training."""
        self._prepared = self._unchecked = True
        if self._run.size > 1:
            state.refuse_unsynchronized(model)
        if self._options.warmup_epochs:
            self._full_rate = state.read_learning_rate(model.optimizer)
        state.broadcast_state(model, self._run.comm)
        done = _progress.setdefault(self._run, _Progress())
        self._fit, done.fits = done.fits, done.fits + 1
        if not done.has_looked:
            self._look(model, done)
        elif done.awaited is not None:
            self._await(model, done)
        self._steps = done.steps
        if self.first_epoch and self.first_epoch >= self._options.warmup_epochs:
            self._full_rate = None  # the rate is what it was when the checkpoint was made

    def _look(self, model: Any, done: _Progress) -> None:
        """Look for a checkpoint: once in a process, by the first ``fit`` that may resume."""
        saved = _find(self._run, self._options)
        done.has_looked = self._options.resume != "never" or saved is not None
        if saved is None:
            return
        done.awaited, done.awaited_fit = saved.path, int(saved.meta.get("fit", 0))
        if self._options.resume in ("auto", "never") and done.awaited_fit < self._fit:
            done.awaited = None  # of a fit before, which has just been done
        elif done.awaited_fit > self._fit:
            del saved  # its arrays
            self._await(model, done)
        else:
            self._go_on(model, done, saved)

    def _await(self, model: Any, done: _Progress) -> None:
        """Go on from the checkpoint that was found if this ``fit`` saved it; those before it are done again."""
        assert done.awaited is not None
        if self._fit < done.awaited_fit:
            _announce(
                self._run,
                f"the checkpoint {done.awaited} is of the script's fit number {done.awaited_fit + 1}: "
                f"number {self._fit + 1} is done again",
            )
        else:
            # By its folder: fits that were done again have saved steps, too.
            saved = self._run.checkpoints.restore(done.awaited)
            assert saved is not None
            if int(saved.meta.get("fit", 0)) != self._fit:
                raise CheckpointError(
                    f"{saved.path} was of the script's fit number {self._fit + 1}, and an earlier one, done again, made so many "
                    "steps that it replaced it; the fits before the resumed one must make the same steps again"
                )
            self._go_on(model, done, saved)

    def _go_on(self, model: Any, done: _Progress, saved: Restored) -> None:
        """Take a checkpoint's state, and its place."""
        done.awaited = None
        _announce(self._run, f"resumed from step {saved.step} ({saved.path})")
        state.restore(model, saved.shared, saved.own)
        self.first_epoch = int(saved.meta["epochs"])
        done.steps = max(done.steps, saved.step)  # more where the fits before have got more epochs: steps do not go back

    def on_train_begin(self, logs: Any = None) -> None:
        self._check_same_steps()
        if not self._prepared:
            self.prepare(self.model)
        self._prepared = False  # for the next fit: one that an exception ends calls no on_train_end
        self._ended = self._saved = self.first_epoch
        if self._options.warmup_epochs and not self.params.get("steps"):
            raise UsageError("warmup_epochs needs to know the steps of an epoch; pass steps_per_epoch to fit")
        if self.first_epoch:
            # Where Keras's own BackupAndRestore says so: Keras 3 and Keras 2.
            if hasattr(self.model, "_training_state"):
                self.model._training_state = _Start(self.first_epoch)
            else:
                self.model._initial_epoch = self.first_epoch

    def _check_same_steps(self) -> None:
        """Raise CommunicationError on all ranks unless all make the same steps; a rank that makes more waits for ever."""
        by_rank = self._run.comm.allgather_obj(self.params.get("steps"))
        known = sorted({int(steps) for steps in by_rank if steps is not None})  # None: a dataset that does not know its length
        if len(known) < 2:
            return
        told = [f"{n} on {name_ranks([rank for rank, steps in enumerate(by_rank) if steps == n])}" for n in known]
        raise CommunicationError(
            f"the ranks make different numbers of steps in an epoch: {', '.join(told)}; give every rank as many batches "
            f"(dataset.take({known[0]}), batch(..., drop_remainder=True)), or pass steps_per_epoch={known[0]} to fit"
        )

    def on_train_end(self, logs: Any = None) -> None:
        if self._options.checkpoint_every != "never" and self._ended > self._saved:  # stopped early
            self._save()
        else:
            state.average_statistics(self.model, self._run.comm)  # where no checkpoint has done so
        self.first_epoch = 0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._epoch, self._batches = epoch, 0
        # Keras has read where to begin, and a later fit is to begin where it says itself.
        if self.first_epoch and hasattr(self.model, "_training_state"):
            self.model._training_state = None
        elif self.first_epoch:
            self.model._initial_epoch = 0

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if self._full_rate is None:
            return
        size, over = self._run.size, self._options.warmup_epochs
        done = self._epoch + (batch + 1) / self.params["steps"]
        if done < over:
            self.model.optimizer.learning_rate = self._full_rate * (1 + (size - 1) * done / over) / size
        else:
            # Once: from here on it is whoever's.
            self.model.optimizer.learning_rate = self._full_rate
            self._full_rate = None

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        super().on_train_batch_end(batch, logs)
        before = self._steps
        self._steps += batch + 1 - self._batches  # several with steps_per_execution
        _progress[self._run].steps = self._steps
        self._batches = batch + 1
        every = self._options.check_every
        if self._unchecked or before // every != self._steps // every:
            self._unchecked = False
            state.check_in_step(self.model, self._run.comm, self._steps)

    def on_test_begin(self, logs: Any = None) -> None:
        state.average_statistics(self.model, self._run.comm)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        logs = {} if logs is None else logs
        mine = {name: float(np.asarray(value)) for name, value in logs.items() if np.size(value) == 1}
        self._run.log_row(self._steps, **mine, epoch=epoch + 1)
        logs.update(self._means(mine))
        self._ended, every = epoch + 1, self._options.checkpoint_every
        if every != "never" and ((epoch + 1) % every == 0 or epoch + 1 == self.params["epochs"]):
            self._save()

    def _save(self) -> None:
        state.average_statistics(self.model, self._run.comm)
        shared, own = state.capture(self.model)
        self._run.checkpoints.save(self._steps, shared, own, {"format": FORMAT, "epochs": self._ended, "fit": self._fit})
        self._saved = self._ended

    def _means(self, mine: dict[str, float]) -> dict[str, float]:
        shares = self._run.comm.allgather_obj((mine, self._validation_samples))
        for rank, (other, _) in enumerate(shares):
            if other.keys() != shares[0][0].keys():
                odd = ", ".join(sorted(other.keys() ^ shares[0][0].keys()))
                raise CommunicationError(
                    f"only one of ranks 0 and {rank} has the metrics {odd}; pass the same to compile and fit"
                )
        means = {}
        for name in mine:
            weights = [samples if name.startswith("val_") and samples else 1 for _, samples in shares]
            means[name] = float(np.average([share[name] for share, _ in shares], weights=weights))
        return means


class _Start:
    """Tells Keras 2's ``fit`` at which epoch to begin."""

    def __init__(self, epoch: int) -> None:
        self._epoch = epoch

    def maybe_load_initial_counters_from_ckpt(self, steps: Any, initial_epoch: int, mode: Any) -> tuple[int, int]:
        return max(self._epoch, initial_epoch), 0
