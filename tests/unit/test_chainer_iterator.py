from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest

if importlib.util.find_spec("chainer") is None:  # not importorskip, which would import Chainer before dtrain.chainer
    pytest.skip("needs chainer", allow_module_level=True)

import dtrain.chainer  # noqa: F401  # before chainer

# isort: split
import chainer
from chainer.serializers import DictionarySerializer, NpzDeserializer

from dtrain.chainer.iterator import GlobalBatchIterator, share_of
from dtrain.errors import CheckpointError, UsageError


def save(iterator: Any) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    iterator.serialize(DictionarySerializer(entries))
    return entries


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("total", [0, 1, 6, 7, 20])
def test_shares_make_up_the_whole_and_differ_by_one_at_most(total: int, size: int) -> None:
    shares = [share_of(total, rank, size) for rank in range(size)]
    assert [index for share in shares for index in share] == list(range(total))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize(("length", "batch"), [(10, 4), (10, 5), (7, 3), (3, 4), (1, 1)])
def test_ranks_together_walk_as_one_process_and_every_epoch_holds_each_sample_once(size: int, length: int, batch: int) -> None:
    data = range(100, 100 + length)
    alone = GlobalBatchIterator(data, batch, seed=3)
    ranks = [GlobalBatchIterator(data, batch, rank=rank, size=size, seed=3) for rank in range(size)]
    walk: list[int] = []
    for _ in range(4 * length):
        expected = alone.next()
        parts = [iterator.next() for iterator in ranks]
        assert [len(part) for part in parts] == [iterator.local_batch_size for iterator in ranks]
        assert [sample for part in parts for sample in part] == expected
        walk += expected
    epochs = [walk[start : start + length] for start in range(0, len(walk) - length + 1, length)]
    assert all(sorted(epoch) == list(data) for epoch in epochs)
    assert length < 7 or epochs[0] != epochs[1]


def test_order_is_the_same_for_ever() -> None:
    # Written down when this was made: a checkpoint must go on the same with any later version.
    assert [int(i) for i in GlobalBatchIterator(range(8), 8, seed=0).next()] == [6, 3, 5, 0, 7, 2, 1, 4]
    assert GlobalBatchIterator(range(8), 12, shuffle=False).next() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3]


@pytest.mark.parametrize(("length", "batch"), [(10, 4), (10, 5), (4, 10)])
def test_counts_epochs_as_chainer_does(length: int, batch: int) -> None:
    ours, theirs = GlobalBatchIterator(range(length), batch), chainer.iterators.SerialIterator(range(length), batch)
    for _ in range(12):
        for name in ("epoch", "epoch_detail", "previous_epoch_detail", "is_new_epoch"):
            assert getattr(ours, name) == pytest.approx(getattr(theirs, name)), name
        ours.next(), theirs.next()


@pytest.mark.parametrize("taken", [0, 1, 5])
@pytest.mark.parametrize("size", [1, 3])
def test_resumes_in_the_middle_of_an_epoch_on_any_number_of_ranks(taken: int, size: int) -> None:
    straight = GlobalBatchIterator(range(10), 4, rank=1, size=2, seed=1)
    for _ in range(taken):
        straight.next()
    resumed = [GlobalBatchIterator(range(10), 4, rank=rank, size=size, seed=1) for rank in range(size)]
    for iterator in resumed:
        iterator.serialize(NpzDeserializer(save(straight)))
    assert (resumed[0].previous_epoch_detail, resumed[0].is_new_epoch) == (straight.previous_epoch_detail, straight.is_new_epoch)
    for _ in range(6):
        assert [sample for iterator in resumed for sample in iterator.next()][2:] == straight.next()


@pytest.mark.parametrize(("other", "named"), [(range(11), "dataset_size=10"), (range(10), "seed=1")])
def test_refuses_to_go_on_over_another_walk(other: range, named: str) -> None:
    saved = save(GlobalBatchIterator(range(10), 4, seed=1))
    with pytest.raises(CheckpointError, match=named):
        GlobalBatchIterator(other, 4, seed=1 if len(other) == 11 else 2).serialize(NpzDeserializer(saved))


@pytest.mark.parametrize(
    ("arguments", "named"), [((range(0), 1), "empty"), ((range(3), 0), "batch_size=0"), ((np.arange(3), -1), "batch_size=-1")]
)
def test_refuses_what_cannot_be_walked(arguments: tuple[Any, int], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        GlobalBatchIterator(*arguments)
