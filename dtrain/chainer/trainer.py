"""Data-parallel training of a Chainer model, assembled: device, data, updates, validation, record, checkpoints, resume."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import chainer
from chainer.dataset import concat_examples
from chainer.dataset.convert import _call_converter

from dtrain.chainer.device import DEVICES, choose_device
from dtrain.chainer.evaluator import GlobalEvaluator
from dtrain.chainer.extensions import RecordOptions, StopAfter, attach
from dtrain.chainer.iterator import GlobalBatchIterator
from dtrain.chainer.random_state import seed_random
from dtrain.chainer.updater import Exchange, GlobalBatchUpdater, _call, average_statistics_, persistent_arrays
from dtrain.errors import UsageError, WorkspaceError, did_you_mean
from dtrain.files import atomic_file

if TYPE_CHECKING:
    from dtrain.run import Run

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainOptions(RecordOptions):
    """How :class:`Trainer` trains, and what it records; checks itself."""

    epochs: int
    """Training ends when this many have been done in all, those before a resume included."""
    batch_size: int
    """Samples in a step, of all ranks together."""
    device: str = "auto"
    """``auto``, ``cpu`` or ``gpu``; see :func:`dtrain.chainer.device.choose_device`."""
    converter: Any = concat_examples
    """Makes a list of samples into the model's arguments (Chainer's protocol)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("epochs", "batch_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UsageError(f"{name}={value!r} is not allowed; use a whole number, at least 1")
        if self.device not in DEVICES:
            raise UsageError(f"device={self.device!r} is not known; choose one of {', '.join(DEVICES)}")


class Trainer:
    """Trains ``model`` on all ranks of ``run`` as one process would: the same seed and batch size give the same weights.

    ``model`` is a link that returns its loss and may report more (such as ``chainer.links.Classifier``); ``optimizer`` a plain
    Chainer optimizer, set up with it or not yet; ``train`` and ``test`` (or None) are datasets that every rank can index in
    whole. The options are those of :class:`TrainOptions`, as keywords: ``epochs`` and ``batch_size`` must be given.

    Every rank makes one, with the same arguments; that is collective. Layers whose sizes are left to Chainer get their weights
    here, from ``seed``; weights that were made before are kept (``dtrain.chainer.seed_random`` before makes those
    reproducible); then all ranks take rank 0's. Afterwards each rank draws random numbers (dropout) of its own, which follow
    from ``seed`` and its rank.

    The gradients are averaged over the samples of the step. Running statistics (BatchNormalization) are each rank's own while
    it trains and become their mean over ranks before every validation and in the model that is saved: that one was measured.

    ``trainer.loop`` is the ``chainer.training.Trainer`` inside, for extensions of one's own.
    """

    def __init__(
        self, model: Any, optimizer: Any, train: Sequence[Any], test: Sequence[Any] | None = None, *, run: Run, **options: Any
    ) -> None:
        chosen = _options(options)
        comm = run.comm
        _check(model, optimizer, train, chosen)
        if chosen.batch_size < run.size and run.rank == 0:
            logger.warning("batch_size=%d is less than %d ranks: some compute nothing in each step", chosen.batch_size, run.size)
        self._run = run
        self.model = model
        device = choose_device(chosen.device, comm)
        if optimizer.target is None:
            optimizer.setup(model)
        seed_random(chosen.seed)
        initialize(model, train, chosen.converter)
        model.to_device(device)
        broadcast_model(model, comm)
        seed_random(chosen.seed, 1, comm.rank)
        iterator = GlobalBatchIterator(train, chosen.batch_size, rank=comm.rank, size=comm.size, seed=chosen.seed)
        updater = GlobalBatchUpdater(iterator, optimizer, comm=comm, device=device, converter=chosen.converter)
        self.loop = chainer.training.Trainer(updater, StopAfter(chosen.epochs), out=str(run.outputs))
        if test is not None:
            batch = max(1, iterator.local_batch_size)
            self.loop.extend(GlobalEvaluator(test, model, comm, batch_size=batch, device=device, converter=chosen.converter))
        record = {field.name: getattr(chosen, field.name) for field in dataclasses.fields(RecordOptions)}
        attach(self.loop, run, RecordOptions(**record))

    def run(self) -> dict[str, float]:
        """Train to the end, from the checkpoint if there is one to resume; return the last step's observation. Collective,
        once.
        """
        self.loop.run(show_loop_exception_msg=False)
        values = {name: getattr(value, "array", value) for name, value in self.loop.observation.items()}
        return {name: float(v) for name, v in values.items() if hasattr(v, "__float__") and getattr(v, "size", 1) == 1}

    def save_model(self, path: str | Path = "model.npz") -> Path:
        """Write the weights and statistics for ``chainer.serializers.load_npz``, whole or not at all. Collective; returns the
        path.

        A relative path is inside the run's outputs. Rank 0 writes. Raises WorkspaceError on all ranks when it cannot.
        """
        run = self._run
        target = run.outputs / path
        average_statistics_(self.model, run.comm)
        problem = None
        if run.rank == 0:
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                with atomic_file(target) as file:
                    chainer.serializers.save_npz(file, self.model, compression=False)
            except OSError as error:
                problem = f"the model cannot be written to {target}: {error.strerror or error}"
        problem = run.comm.bcast_obj(problem)
        if problem is not None:
            raise WorkspaceError(problem)
        return target


def _options(given: dict[str, Any]) -> TrainOptions:
    fields = {field.name: field for field in dataclasses.fields(TrainOptions)}
    for name in given.keys() - fields.keys():
        raise UsageError(f"Trainer has no option {name!r}{did_you_mean(name, fields)}; it has {', '.join(fields)}")
    missing = [name for name, field in fields.items() if field.default is dataclasses.MISSING and name not in given]
    if missing:
        raise UsageError(f"Trainer needs {' and '.join(missing)}")
    return TrainOptions(**given)


def _check(model: Any, optimizer: Any, train: Sequence[Any], options: TrainOptions) -> None:
    if not isinstance(model, chainer.Link):
        raise UsageError(
            f"the model must be a chainer.Link that returns its loss, not {type(model).__name__}; L.Classifier makes one"
        )
    if optimizer.target is not None and optimizer.target is not model:
        raise UsageError("the optimizer is set up with another model; give the Trainer the one that optimizer.setup() got")
    if options.batch_size > len(train):
        raise UsageError(f"batch_size={options.batch_size} exceeds the {len(train)} training samples; lower it")


def initialize(model: Any, dataset: Sequence[Any], converter: Any = concat_examples) -> None:
    """Give shapes and first weights to layers that leave their sizes to Chainer, by one look at the first sample.

    On all ranks the same, no communication; does nothing to a model that is complete. Ranks may otherwise meet their first
    sample at different steps, or never. Raises UsageError naming parameters that are still without a shape.
    """
    if all(param.is_initialized for param in model.params()):
        return
    with chainer.using_config("train", False), chainer.no_backprop_mode():
        _call(model, _call_converter(converter, [dataset[0]], model.device))
    missing = [name for name, param in sorted(model.namedparams()) if not param.is_initialized]
    if missing:
        raise UsageError(
            f"{', '.join(missing)} took no part in evaluating a sample and have no shape; give these layers their sizes"
        )


def broadcast_model(model: Any, comm: Any) -> None:
    """Replace weights and persistent arrays by rank 0's. Collective; in place."""
    if comm.size > 1:
        arrays = [param.array for _, param in sorted(model.namedparams())]
        Exchange()(comm.broadcast_, arrays + [array for _, array in persistent_arrays(model)])
