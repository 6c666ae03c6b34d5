"""Record, checkpoint, resume and progress for any Chainer ``training.Trainer``."""

from __future__ import annotations

import logging
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from chainer.training.extension import Extension

from dtrain.chainer.iterator import GlobalBatchIterator
from dtrain.chainer.state import Hyperparameters, capture, hyperparameters, restore, restore_hyperparameters
from dtrain.errors import UsageError

if TYPE_CHECKING:
    from dtrain.run import Run

logger = logging.getLogger(__name__)

Resume = Literal["auto", "never"] | int
CheckpointEvery = Literal["epoch", "never"] | int


@dataclass(frozen=True, kw_only=True)
class RecordOptions:
    """What :func:`extend` records, and when; checks itself."""

    resume: Resume = "auto"
    """``auto``: from the newest checkpoint that verifies, if there is one; a number: from that step; ``never``: from none."""
    checkpoint_every: CheckpointEvery = "epoch"
    """At every epoch's end, every so many iterations, or never."""
    log_every: int = 1
    """Iterations per record of metrics; their values are means over these iterations."""
    progress: bool = True
    """Whether rank 0 prints a line an epoch."""
    seed: int = 0
    """Renews the random generators after a resume on another number of ranks."""

    def __post_init__(self) -> None:
        if self.resume not in ("auto", "never") and not _is_count(self.resume, least=0):
            raise UsageError(f"resume={self.resume!r} is not allowed; use 'auto', 'never' or a step's number")
        if self.checkpoint_every not in ("epoch", "never") and not _is_count(self.checkpoint_every, least=1):
            raise UsageError(
                f"checkpoint_every={self.checkpoint_every!r} is not allowed; use 'epoch', 'never' or a number of iterations"
            )
        if not _is_count(self.log_every, least=1):
            raise UsageError(f"log_every={self.log_every!r} is not allowed; use a number of iterations, at least 1")
        if not _is_count(self.seed, least=0):
            raise UsageError(f"seed={self.seed!r} is not allowed; use 0 or more")


def _is_count(value: object, *, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def extend(
    trainer: Any,
    run: Run,
    *,
    resume: Resume = "auto",
    checkpoint_every: CheckpointEvery = "epoch",
    log_every: int = 1,
    progress: bool = True,
) -> None:
    """Make ``trainer`` record its metrics in ``run``, write checkpoints, resume, and print its progress.

    Every rank calls it, before or after the trainer's other extensions are added, and once; it does not block. What is resumed is
    restored when ``trainer.run()`` begins, before any extension is initialized. Works with any updater and iterator; where the
    iterators are not GlobalBatchIterator, their states are each rank's own.

    Metrics: each rank's own, under Chainer's names without ``main``: ``loss``, ``accuracy``, ``validation/loss``; and
    ``samples_per_s`` (of this rank), ``epoch`` (with its fraction) and ``elapsed_s``.
    """
    options = RecordOptions(resume=resume, checkpoint_every=checkpoint_every, log_every=log_every, progress=progress)
    attach(trainer, run, options)


def attach(trainer: Any, run: Run, options: RecordOptions) -> None:
    """:func:`extend` with its options as one value."""
    try:
        trainer.get_extension(_Begin.default_name)
    except ValueError:
        begin = _Begin(run, options)
        trainer.extend(begin, trigger=_always)
        trainer.extend(_End(run, options, begin), trigger=_always)
    else:
        raise UsageError("this trainer is already extended by dtrain; call dtrain.chainer.extend() once")


def _always(_: Any) -> bool:
    return True


class _Begin(Extension):
    """Before all other extensions: restores before they are initialized, and takes the time when an update has ended."""

    default_name = "dtrain_begin"
    priority = 1_000_000

    def __init__(self, run: Run, options: RecordOptions) -> None:
        self._run = run
        self._options = options
        self.start: dict[str, dict[str, float]] = {}
        self.saved: Hyperparameters | None = None
        self.updated_at = 0.0

    def initialize(self, trainer: Any) -> None:
        # Here and not in extend(): extensions may be added after it, and some look at what was restored when they are
        # initialized.
        self.start = hyperparameters(trainer)
        self.saved = resume(trainer, self._run, self._options)

    def __call__(self, trainer: Any) -> None:
        _finish_device_work(trainer)
        self.updated_at = time.perf_counter()


def _finish_device_work(trainer: Any) -> None:
    """Wait for a GPU to do what it was told: without that an update's time would be that of telling it."""
    for optimizer in trainer.updater.get_all_optimizers().values():
        xp = optimizer.target.xp
        if xp is not np:
            xp.cuda.get_current_stream().synchronize()


class _End(Extension):
    """After all other extensions: records what they observed, and saves a state in which every trigger has had its turn."""

    default_name = "dtrain_end"
    priority = -1_000_000

    def __init__(self, run: Run, options: RecordOptions, begin: _Begin) -> None:
        self._run = run
        self._options = options
        self._begin = begin
        self._interval = _Means()
        self._epoch = _Means()

    def initialize(self, trainer: Any) -> None:
        if self._begin.saved is not None:
            restore_hyperparameters(trainer, self._begin.start, self._begin.saved)
        self._ended_at = time.perf_counter()

    def __call__(self, trainer: Any) -> None:
        updater = trainer.updater
        row = metric_names(trainer.observation)
        for sums in (self._interval, self._epoch):
            sums.add(row, _local_samples(trainer), self._begin.updated_at - self._ended_at)
        if updater.iteration % self._options.log_every == 0 or updater.is_new_epoch:
            ours = {"epoch": float(updater.epoch_detail), "elapsed_s": trainer.elapsed_time}
            taken = {"t", "step", *ours}
            observed = {f"observed/{name}" if name in taken else name: value for name, value in self._interval.take().items()}
            self._run.log_row(updater.iteration, **observed, **ours)
        if updater.is_new_epoch:
            means = self._epoch.take()
            if self._options.progress and self._run.rank == 0:
                # Output that the user asked for by the option, and the one place where dtrain.chainer writes any.
                sys.stdout.write(progress_line(trainer, means, self._run.size) + "\n")
                sys.stdout.flush()
        if self._is_due(trainer):
            state = capture(trainer, self._run.comm, self._begin.start)
            self._run.checkpoints.save(updater.iteration, state.shared, state.own, state.meta, state.own_meta)
        self._ended_at = time.perf_counter()

    def _is_due(self, trainer: Any) -> bool:
        every = self._options.checkpoint_every
        if every == "never":
            return False
        if every == "epoch":
            return bool(trainer.updater.is_new_epoch)
        # A run that has ended can be resumed to train on, whatever the interval.
        return trainer.updater.iteration % every == 0 or (
            isinstance(trainer.stop_trigger, StopAfter) and trainer.stop_trigger(trainer)
        )


class StopAfter:
    """Stop trigger: true from the end of that epoch on, also when training is resumed beyond it.

    Chainer's interval trigger fires when its period is *crossed*, so a run resumed with fewer epochs than it has done would go
    on.
    """

    def __init__(self, epochs: int) -> None:
        self._epochs = epochs

    def __call__(self, trainer: Any) -> bool:
        return bool(trainer.updater.epoch >= self._epochs)

    def get_training_length(self) -> tuple[int, str]:
        return self._epochs, "epoch"


class _Means:
    """Sums of what was observed since the last time it was asked for."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._sums: dict[str, Any] = {}
        self._counts: dict[str, int] = {}
        self._samples: int | None = 0
        self._seconds = 0.0

    def add(self, row: dict[str, Any], samples: int | None, seconds: float) -> None:
        for name, value in row.items():
            value = value.astype("float64") if hasattr(value, "astype") else value
            # Left where it is: on a GPU, turning it into a number would wait for the step to end.
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1
        self._samples = None if samples is None or self._samples is None else self._samples + samples
        self._seconds += seconds

    def take(self) -> dict[str, float]:
        """Means by name, and ``samples_per_s`` of this rank where its batches can be counted; begins anew."""
        means = {name: float(value) / self._counts[name] for name, value in self._sums.items()}
        if self._samples is not None and self._seconds > 0:
            means["samples_per_s"] = self._samples / self._seconds
        self._clear()
        return means


def metric_names(observation: dict[str, Any]) -> dict[str, Any]:
    """Scalars of a trainer's observation by dtrain's names: without the part ``main``, unless two would then be one."""
    found: dict[str, Any] = {}
    for name, value in observation.items():
        value = getattr(value, "array", value)  # a Variable
        if isinstance(value, str) or getattr(value, "size", 1) != 1 or not hasattr(value, "__float__"):
            continue
        short = "/".join(part for part in name.split("/") if part != "main")
        found[name if not short or short in found else short] = value
    return found


def _local_samples(trainer: Any) -> int | None:
    """Samples that this rank takes in a step; None when the updater has no iterator that says so."""
    iterator = getattr(trainer.updater, "_iterators", {}).get("main")
    count = getattr(iterator, "local_batch_size", getattr(iterator, "batch_size", None))
    return None if count is None else int(count)


def progress_line(trainer: Any, means: dict[str, float], size: int) -> str:
    """``epoch 3/10  loss 0.123  accuracy 0.97  validation 0.95  4,210 samples/s``, the means being rank 0's of the epoch.

    samples/s are of all ranks, taken as ``size`` times rank 0's unless the iterator knows the whole batch: asking the others
    would be a collective call only to print.
    """
    length, unit = getattr(trainer.stop_trigger, "get_training_length", lambda: (None, None))()
    parts = [f"epoch {trainer.updater.epoch}" + (f"/{length}" if unit == "epoch" else "")]
    parts += [f"{name} {means[name]:.4g}" for name in ("loss", "accuracy") if name in means]
    if "validation/accuracy" in means:
        parts.append(f"validation {means['validation/accuracy']:.4g}")
    elif "validation/loss" in means:
        parts.append(f"validation loss {means['validation/loss']:.4g}")
    if "samples_per_s" in means:
        iterator = trainer.updater.get_iterator("main")
        share = iterator.local_batch_size / iterator.batch_size if isinstance(iterator, GlobalBatchIterator) else 1 / size
        if share > 0:
            parts.append(f"{means['samples_per_s'] / share:,.0f} samples/s")
    return "  ".join(parts)


def resume(trainer: Any, run: Run, options: RecordOptions) -> Hyperparameters | None:
    """Restore what ``options.resume`` says from the run's checkpoints. Collective. Returns what :func:`restore` does, if it did.

    Nothing is passed over in silence: a step that was named and is not there, or checkpoints of which none verifies, are the
    Checkpointer's CheckpointError; a run to resume that ended before its first checkpoint is a warning, because beginning anew
    gives what it would have.
    """
    if options.resume == "never":
        if run.resume_from is not None and run.rank == 0:
            logger.warning("resume='never': the checkpoints of %s are not used", run.resume_from.id)
        return None
    saved = run.checkpoints.restore("newest" if options.resume == "auto" else options.resume)
    if saved is not None:
        if run.rank == 0 and options.progress:
            sys.stdout.write(f"resumed from step {saved.step} ({saved.path})\n")
            sys.stdout.flush()
        return restore(trainer, saved, run.comm, seed=options.seed)
    if run.resume_from is not None and run.rank == 0:
        logger.warning("%s has no checkpoint to resume from: training begins at step 0", run.resume_from.id)
    return None
