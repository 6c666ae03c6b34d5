"""Which samples a rank takes: one global order, of which every rank reads its own share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from chainer.dataset import Iterator
from numpy.typing import NDArray

from dtrain.errors import CheckpointError, UsageError


def share_of(total: int, rank: int, size: int) -> range:
    """The contiguous part of ``range(total)`` that belongs to ``rank`` of ``size``.

    The shares of all ranks make up the whole, in order, and their lengths differ by at most one; with fewer items than ranks
    some shares are empty.
    """
    return range(total * rank // size, total * (rank + 1) // size)


class GlobalBatchIterator(Iterator):
    """This rank's share of every batch of an endless, shuffled walk over ``dataset``; for any Chainer updater.

    ``batch_size`` counts the samples of all ranks together. Sample p of the walk lies in epoch ``p // len(dataset)``, whose order
    is a permutation that follows from ``seed`` and the epoch alone; step k takes samples [kB, (k+1)B) and ``next()`` returns this
    rank's contiguous share of them (a list of ``dataset[i]``, of a length that differs between ranks by at most one, and empty on
    some when B is less than ``size``). A batch may begin in one epoch and end in the next, as with Chainer's SerialIterator.

    So the whole state is one number, the same on all ranks and meaningful for another number of ranks or another batch size.
    Nothing here communicates.
    """

    def __init__(
        self, dataset: Sequence[Any], batch_size: int, *, rank: int = 0, size: int = 1, seed: int = 0, shuffle: bool = True
    ) -> None:
        if batch_size < 1:
            raise UsageError(f"batch_size={batch_size} is not allowed; it is the total over all ranks, at least 1")
        if len(dataset) == 0:
            raise UsageError("the training set is empty; a walk over it needs at least one sample")
        if not 0 <= rank < size:
            raise UsageError(f"rank={rank} is not one of {size} ranks")
        if seed < 0:
            raise UsageError(f"seed={seed} is not allowed; use 0 or more")
        self.dataset = dataset
        self.batch_size = batch_size
        self.rank = rank
        self.size = size
        self.seed = seed
        self.shuffle = shuffle
        self.local_batch_size = len(share_of(batch_size, rank, size))
        """Samples that ``next()`` returns on this rank."""
        self._permutation: tuple[int, NDArray[np.intp]] | None = None
        self.reset()

    def reset(self) -> None:
        """Go back to the first sample of the first epoch."""
        self._position = 0
        self._previous: int | None = None

    def __next__(self) -> list[Any]:
        begin, count = self._position, self.batch_size
        self._previous, self._position = begin, begin + count
        share = share_of(count, self.rank, self.size)
        return [self.dataset[index] for index in self._indices(begin + share.start, begin + share.stop)]

    next = __next__  # Chainer's updaters call next(), and look it up on the class

    def _indices(self, begin: int, end: int) -> list[int]:
        """The dataset's indices of the walk's samples [begin, end)."""
        length, found = len(self.dataset), []
        while begin < end:
            epoch, offset = divmod(begin, length)
            taken = min(end - begin, length - offset)
            found += self._order(epoch)[offset : offset + taken].tolist()
            begin += taken
        return found

    def _order(self, epoch: int) -> NDArray[np.intp]:
        if not self.shuffle:
            epoch = 0
        if self._permutation is None or self._permutation[0] != epoch:
            self._permutation = (
                epoch,
                _permutation(len(self.dataset), self.seed, epoch) if self.shuffle else np.arange(len(self.dataset)),
            )
        return self._permutation[1]

    @property
    def position(self) -> int:
        """Samples that all ranks together have taken so far."""
        return self._position

    @property
    def epoch(self) -> int:
        """Whole epochs taken so far."""
        return self._position // len(self.dataset)

    @property
    def epoch_detail(self) -> float:
        return self._position / len(self.dataset)

    @property
    def previous_epoch_detail(self) -> float | None:
        return None if self._previous is None else self._previous / len(self.dataset)

    @property
    def is_new_epoch(self) -> bool:
        """Whether the last batch ended an epoch."""
        return self._previous is not None and self._previous // len(self.dataset) != self.epoch

    @property
    def repeat(self) -> bool:
        return True

    def serialize(self, serializer: Any) -> None:
        """Save or load the position (Chainer's protocol). Raises CheckpointError when another dataset or order is loaded."""
        for name, value in (("dataset_size", len(self.dataset)), ("seed", self.seed), ("shuffle", int(self.shuffle))):
            saved = int(serializer(name, value))
            if saved != value:
                raise CheckpointError(
                    f"the checkpoint was written with {name}={saved} and this run has {name}={value}; the order of "
                    f"samples cannot be continued: resume with {name}={saved}, or start anew with resume='never'"
                )
        self._position = int(serializer("position", self._position))
        previous = int(serializer("previous_position", -1 if self._previous is None else self._previous))
        self._previous = None if previous < 0 else previous  # Chainer's serializers know no None


def _permutation(length: int, seed: int, epoch: int) -> NDArray[np.intp]:
    # RandomState and SeedSequence are frozen (NEP 19): the order is the same with every NumPy, so a run can be resumed with
    # another.
    generator = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([seed, epoch])))
    order: NDArray[np.intp] = generator.permutation(length)
    return order
