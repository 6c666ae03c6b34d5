"""Validation by all ranks together: every sample once, and means over samples, not over ranks or batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import chainer
from chainer.dataset import concat_examples
from chainer.dataset.convert import _call_converter
from chainer.training.extension import PRIORITY_WRITER, Extension

from dtrain.chainer.iterator import share_of
from dtrain.chainer.updater import _call, average_statistics_
from dtrain.comm import Communicator
from dtrain.errors import UsageError
from dtrain.progress import PROGRESS

Sums = dict[str, tuple[float, int]]
"""By metric's name: the sum over samples, and how many samples it is of."""


class GlobalEvaluator(Extension):
    """Evaluate ``model`` on ``dataset`` at every epoch's end and report ``validation/main/<name>``, on every rank the same.

    Rank r takes its contiguous share of the samples (it may be empty), in batches of ``batch_size`` samples. Running statistics
    are averaged over the ranks before, in place: so the model that is measured is the one that would be saved.
    """

    default_name = "validation"
    trigger = (1, "epoch")
    priority = PRIORITY_WRITER

    def __init__(
        self,
        dataset: Sequence[Any],
        model: Any,
        comm: Communicator,
        *,
        batch_size: int,
        device: Any = None,
        converter: Any = concat_examples,
    ) -> None:
        if len(dataset) == 0:
            raise UsageError("the validation set is empty; give at least one sample, or None for no validation")
        self.dataset = dataset
        self.model = model
        self.batch_size = batch_size
        self._comm = comm
        self._device = device
        self._converter = converter

    def __call__(self, trainer: Any = None) -> dict[str, float]:
        """Evaluate, report and return the means by name. Collective."""
        reporter = chainer.Reporter()
        prefix = f"{self.name or self.default_name}/main"
        reporter.add_observer(prefix, self.model)
        reporter.add_observers(prefix, self.model.namedlinks(skipself=True))
        average_statistics_(self.model, self._comm)
        with reporter, chainer.using_config("train", False), chainer.no_backprop_mode():
            sums = self._sum_share()
        means = combine(self._comm.allgather_obj(sums))
        chainer.report(means)
        return means

    def _sum_share(self) -> Sums:
        share = share_of(len(self.dataset), self._comm.rank, self._comm.size)
        sums: Sums = {}
        for begin in range(share.start, share.stop, self.batch_size):
            batch = [self.dataset[index] for index in range(begin, min(begin + self.batch_size, share.stop))]
            PROGRESS.mark()
            observation: dict[str, Any] = {}
            with chainer.reporter.report_scope(observation):
                _call(self.model, _call_converter(self._converter, batch, self._device))
            add_observation(sums, observation, len(batch))
        return sums


def add_observation(sums: Sums, observation: Mapping[str, Any], count: int) -> None:
    """Add the means that a link reported over a batch of ``count`` samples; what is not a scalar is left out."""
    for name, value in observation.items():
        value = getattr(value, "array", value)  # a Variable
        if getattr(value, "size", 1) == 1 and not isinstance(value, str):
            total, samples = sums.get(name, (0.0, 0))
            sums[name] = (total + float(value) * count, samples + count)


def combine(shares: Sequence[Sums]) -> dict[str, float]:
    """Means over the samples of all shares; summed in rank order in double precision, so every rank gets the same bits."""
    totals: Sums = {}
    for share in shares:
        for name, (total, count) in share.items():
            before, samples = totals.get(name, (0.0, 0))
            totals[name] = (before + total, samples + count)
    return {name: total / samples for name, (total, samples) in sorted(totals.items())}
