"""ChainerMN's parts, without its faults, for :class:`~dtrain.chainer.communicator.DtrainCommunicator`.

Scripts call them by ChainerMN's names (``chainermn.create_multi_node_optimizer(optimizer, communicator)``):
:mod:`dtrain.chainer.compatibility` sends calls with one of our communicators here. Signatures are ChainerMN's. All ranks call
them, and they block until all have.
"""

from __future__ import annotations

import copy
import logging
import os
import types
from collections.abc import Callable
from typing import Any

import chainer
import numpy as np
from chainer.dataset import Converter, convert
from chainer.datasets import DictDataset, ImageDataset, LabeledImageDataset, SubDataset, TransformDataset, TupleDataset
from chainer.training.extensions import Evaluator
from chainermn.datasets.scatter import _scatter_index
from chainermn.extensions.checkpoint import _MultiNodeCheckpointer
from chainermn.optimizers import _MultiNodeOptimizer
from numpy.typing import NDArray

from dtrain.chainer.communicator import DtrainCommunicator
from dtrain.errors import CheckpointError, CommunicationError, UsageError

log = logging.getLogger(__name__)


# Optimizer


def create_multi_node_optimizer(
    actual_optimizer: Any, communicator: DtrainCommunicator, double_buffering: bool = False, zero_fill: bool = True
) -> MultiNodeOptimizer:
    """Make ``actual_optimizer`` apply the mean of all ranks' gradients. Raises UsageError for ``double_buffering``."""
    if double_buffering:
        raise UsageError("double_buffering=True is for ChainerMN's own communicator 'pure_nccl'; leave it out with dtrain's")
    return MultiNodeOptimizer(actual_optimizer, communicator, zero_fill)


class MultiNodeOptimizer(_MultiNodeOptimizer):
    """Every update trains, the first one too: ChainerMN's spends it, after a resume as well, on broadcasting the weights.

    Rank 0's weights go to all ranks when the optimizer meets its model, and once more before the first update, for a script that
    loads them on rank 0 only. Layers that learn their input size in the first forward pass get theirs from an extra pass in
    test mode, which neither draws dropout nor counts for batch statistics.
    """

    def __init__(self, actual_optimizer: Any, communicator: DtrainCommunicator, zero_fill: bool) -> None:
        super().__init__(actual_optimizer, communicator, zero_fill)
        # object's: the class sends what is set to the actual optimizer
        object.__setattr__(self, "_started", False)
        if actual_optimizer.target is not None:
            self._share()

    def setup(self, link: Any) -> MultiNodeOptimizer:
        super().setup(link)
        self._share()
        return self

    def update(self, lossfun: Callable[..., Any] | None = None, *args: Any, **kwds: Any) -> None:
        """As ``chainer.Optimizer.update``; collective. Without ``lossfun`` the gradients must be there."""
        first = not self._started
        object.__setattr__(self, "_started", True)
        if lossfun is None:
            self._average_given(first)
        else:
            self._average(first, lossfun, args, kwds)
        self.actual_optimizer.update(None, *args, **kwds)

    def _average(self, first: bool, lossfun: Callable[..., Any], args: tuple[Any, ...], kwds: dict[str, Any]) -> None:
        if first:
            self._share()
            if self.communicator.size > 1 and not all(sized for _, sized in self.target_params):
                with chainer.using_config("train", False), chainer.no_backprop_mode():
                    lossfun(*args, **kwds)
                self._share()
        self._differentiate(lossfun, args, kwds)
        self.communicator.multi_node_mean_grad(self.target, self.zero_fill)
        # The exchange was refused unless all ranks have the same parameters: so all find new ones now, or none does.
        if self.is_changed(self.target) and self._share():
            self._differentiate(lossfun, args, kwds)
            self.communicator.multi_node_mean_grad(self.target, self.zero_fill)

    def _average_given(self, first: bool) -> None:
        if (first or self.is_changed(self.target)) and self._share():
            # Only rank 0's gradients belong to the weights that all have now, and nothing here can make the others anew.
            log.warning("the ranks' weights differed, so this update is rank 0's; pass lossfun to update()")
            self.communicator.bcast_grad(self.target)
        else:
            self.communicator.multi_node_mean_grad(self.target, self.zero_fill)

    def _differentiate(self, lossfun: Callable[..., Any], args: tuple[Any, ...], kwds: dict[str, Any]) -> None:
        loss = lossfun(*args, **kwds)
        if getattr(self, "_use_cleargrads", True):
            self.target.cleargrads()
        else:
            self.target.zerograds()
        loss.backward(loss_scale=self.actual_optimizer._loss_scale)

    def _share(self) -> bool:
        """Give all ranks rank 0's weights; return whether that changed them on any rank."""
        self.is_changed(self.target)  # notes which parameters have their shape
        comm = self.communicator
        if comm.size == 1:
            return False
        noted = comm.inner.allgather_obj(self.target_params)
        for rank, params in enumerate(noted):
            if params != noted[0]:
                odd = sorted({name for name, _ in set(params) ^ set(noted[0])})
                raise CommunicationError(
                    f"the model of rank {rank} differs from rank 0's: only one has, or has initialized, {', '.join(odd)}; "
                    "make the same model on all ranks"
                )
        before = [param.array.copy() for _, param in sorted(self.target.namedparams()) if param.array is not None]
        comm.bcast_data(self.target)
        after = [param.array for _, param in sorted(self.target.namedparams()) if param.array is not None]
        return any(comm.inner.allgather_obj(any(bool((a != b).any()) for a, b in zip(before, after, strict=True))))


# Evaluator


def create_multi_node_evaluator(actual_evaluator: Any, communicator: DtrainCommunicator) -> Any:
    """Make ``actual_evaluator.evaluate()`` return, on all ranks, the means over the samples of all ranks; returns it.

    ChainerMN's averages the ranks' means, and Chainer's those of its batches, whatever their sizes. Ours counts samples, so a
    short batch, an unequal share or an empty one changes nothing. An evaluator with an ``evaluate`` of its own is weighed by
    the samples that went through its converter.
    """
    actual_evaluator._mn_original_evaluate = actual_evaluator.evaluate
    actual_evaluator._mn_communicator = communicator
    actual_evaluator.evaluate = types.MethodType(_evaluate, actual_evaluator)
    return actual_evaluator


class _Tally(Converter):
    """Stands in for an evaluator's converter and, where that is Chainer's own, for its function, to count samples."""

    def __init__(self, converter: Any, function: Callable[..., Any]) -> None:
        self._converter = converter
        self._function = function
        self._batch_samples = 0
        self.samples = 0
        self.weights: dict[str, Any] = {}

    def __call__(self, batch: Any, device: Any = None) -> Any:
        self._batch_samples = len(batch)
        self.samples += len(batch)
        return convert._call_converter(self._converter, batch, device)

    def evaluate_batch(self, *args: Any, **kwargs: Any) -> None:
        """Call the function, then give each value it reported its batch's size as weight, in the way DictSummary takes."""
        self._function(*args, **kwargs)
        observation = chainer.get_current_reporter().observation
        for name, value in observation.items():
            if not isinstance(value, tuple):
                observation[name] = value = (value, self._batch_samples)
            self.weights[name] = self.weights.get(name, 0) + value[1]


def _evaluate(self: Any) -> dict[str, Any]:
    """The ``evaluate`` of a multi-node evaluator."""
    converter, function = self.converter, self.eval_func
    tally = _Tally(converter, function or self._targets["main"])
    own_loop = type(self).evaluate is not Evaluator.evaluate
    self.converter = tally
    if not own_loop:
        self.eval_func = tally.evaluate_batch
    try:
        # Chainer's iterators divide by the size of their dataset, and a share may be empty.
        means = {} if _is_empty(self._iterators.get("main")) else self._mn_original_evaluate()
    finally:
        self.converter, self.eval_func = converter, function
    weights = dict.fromkeys(means, tally.samples) if own_loop else tally.weights
    mine = {name: (_plain(mean), float(_plain(weights[name]))) for name, mean in means.items()}
    return _merge(self._mn_communicator.inner.allgather_obj(mine))


def _is_empty(iterator: Any) -> bool:
    dataset = getattr(iterator, "dataset", None)
    return dataset is not None and len(dataset) == 0


def _plain(value: Any) -> Any:
    """A value on the host: a number, or an array."""
    value = chainer.backends.cuda.to_cpu(chainer.as_array(value)) if hasattr(value, "dtype") else value
    return value.item() if getattr(value, "ndim", None) == 0 else value


def _merge(shares: list[dict[str, tuple[Any, float]]]) -> dict[str, Any]:
    merged = {}
    for name in sorted({name for share in shares for name in share}):
        found = [share[name] for share in shares if name in share]
        total = sum(weight for _, weight in found)
        if total == 0:
            log.warning("%s: its evaluator does not use its converter, so there are no samples to count; ranks weigh alike", name)
            found, total = [(mean, 1.0) for mean, _ in found], float(len(found))
        merged[name] = sum(mean * weight for mean, weight in found if weight) / total
    return merged


# Dataset


def scatter_dataset(
    dataset: Any,
    comm: DtrainCommunicator,
    root: int = 0,
    shuffle: bool = False,
    seed: int | None = None,
    max_buf_len: int | None = None,
    *,
    force_equal_length: bool = True,
) -> SubDataset:  # long because the signature is ChainerMN's
    """Give each rank its share of ``root``'s dataset (others' are ignored); the shares are ChainerMN's for the same seed.

    Only the share is sent, where the dataset is an array, a list or tuple, one of Chainer's TupleDataset, DictDataset,
    SubDataset, TransformDataset, ImageDataset or LabeledImageDataset, or made of those. Another is sent whole: only it knows
    its examples, and reading them all to send them may be far more than its description. With ``force_equal_length`` (the
    default, which equal numbers of updates need) shares may overlap by one example; without, every example is in one share,
    as evaluation wants it. ``max_buf_len`` is accepted and not needed.
    """
    if not 0 <= root < comm.size:
        raise UsageError(f"root={root} is not a rank; ranks are 0 to {comm.size - 1}")
    shares: list[Any] | None = None
    plan: Any = None
    if comm.rank == root:
        order = np.random.RandomState(seed).permutation(len(dataset)) if shuffle else np.arange(len(dataset))
        bounds = [(begin, end) for _, begin, end in _scatter_index(len(dataset), comm.size, force_equal_length)]
        whole = _take(dataset, order[:0]) is None
        plan = (dataset, order, bounds) if whole else None
        shares = None if whole else [order[begin:end] for begin, end in bounds]
    plan = comm.bcast_obj(plan, root=root)
    if plan is not None:
        dataset, order, bounds = plan
        return SubDataset(dataset, *bounds[comm.rank], order)
    share = comm.scatter_obj(None if shares is None else (_take(dataset, indices) for indices in shares), root)
    return SubDataset(share, 0, len(share))


def _take(dataset: Any, indices: NDArray[np.int64]) -> Any:
    """A dataset of those examples only, or None where the dataset is of a kind that we cannot cut."""
    kind = type(dataset)  # exact: a subclass may look at more than the example it is asked for
    if kind is np.ndarray:
        return dataset[indices]
    if kind in (list, tuple):
        return kind([dataset[i] for i in indices])
    if kind is SubDataset:
        inner = dataset._start + indices
        return _take(dataset._dataset, inner if dataset._order is None else np.asarray(dataset._order)[inner])
    if kind is TransformDataset:
        taken = _take(dataset._dataset, indices)
        return None if taken is None else TransformDataset(taken, dataset._transform)
    if kind is TupleDataset:
        columns = [_take(column, indices) for column in dataset._datasets]
        return None if any(column is None for column in columns) else TupleDataset(*columns)
    if kind is DictDataset:
        named = {name: _take(column, indices) for name, column in dataset._datasets.items()}
        return None if any(column is None for column in named.values()) else DictDataset(**named)
    if kind in (ImageDataset, LabeledImageDataset):
        name = "_paths" if kind is ImageDataset else "_pairs"
        cut = copy.copy(dataset)
        setattr(cut, name, [getattr(dataset, name)[i] for i in indices])
        return cut
    return None


# Checkpointer


def create_multi_node_checkpointer(
    name: str, comm: DtrainCommunicator, cp_interval: int = 5, gc_interval: int = 5, path: str | None = None
) -> MultiNodeCheckpointer:
    """ChainerMN's checkpointer (a file a rank, on the same number of ranks); ``run.checkpoints`` restores on any number."""
    return MultiNodeCheckpointer(name, comm, cp_interval, gc_interval, path)


class MultiNodeCheckpointer(_MultiNodeCheckpointer):
    def maybe_load(self, trainer: Any, optimizer: Any = None, path: str | None = None) -> None:
        """Load the newest checkpoint that all ranks have, if there are any.

        Raises CheckpointError on all ranks where there are some, but none by this number of ranks: ChainerMN starts anew then.
        """
        folder = self.path or path or trainer.out
        names = os.listdir(folder) if os.path.isdir(folder) else []
        parsed = [each for each in map(self._parse_filename, names) if each is not None]
        writers: dict[int, set[int]] = {}
        for found in self.comm.inner.allgather_obj([(rank, iteration) for _, rank, iteration in parsed]):
            for rank, iteration in found:
                writers.setdefault(iteration, set()).add(rank)
        if writers and set(range(self.comm.size)) not in writers.values():
            newest = max(writers)
            raise CheckpointError(
                f"checkpoint {self.name!r} in {folder}: the newest, of iteration {newest}, has files of ranks "
                f"{', '.join(map(str, sorted(writers[newest])))}, and there are {self.comm.size} ranks; start with those, "
                "use run.checkpoints, which restores on any number, or remove the files to start anew"
            )
        super().maybe_load(trainer, optimizer, path)


# Links


def get_communication_backend(comm: DtrainCommunicator, communication_backend: str = "auto") -> str:
    """For MultiNodeBatchNormalization: always ``mpi``, by which ChainerMN means the communicator's own exchange."""
    if communication_backend not in ("auto", "mpi"):
        raise UsageError(f"communication_backend={communication_backend!r} is not there; use 'auto' or 'mpi'")
    return "mpi"
