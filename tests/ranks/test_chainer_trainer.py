"""Training and validation over ranks of any number: expected values follow from rank and size, or from one process."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

if any(importlib.util.find_spec(package) is None for package in ("mpi4py", "chainer")):
    # not importorskip, which would import Chainer before dtrain.chainer
    pytest.skip("needs mpi4py and chainer", allow_module_level=True)

import dtrain.chainer

# isort: split
import chainer
import chainer.functions as F
import chainer.links as L

from dtrain.chainer.device import choose_device
from dtrain.chainer.evaluator import GlobalEvaluator
from dtrain.chainer.iterator import GlobalBatchIterator
from dtrain.chainer.trainer import broadcast_model
from dtrain.chainer.updater import Exchange, GlobalBatchUpdater, average_gradients, average_statistics_
from dtrain.checkpoint import Checkpointer
from dtrain.comm import Communicator
from dtrain.errors import MissingDependency, NotRunnable, WorkspaceError

pytestmark = [pytest.mark.mpi, pytest.mark.needs("mpi", "chainer")]


class FakeRun:
    """A run without a run folder."""

    def __init__(self, comm: Communicator, outputs: Path) -> None:
        self.comm, self.outputs, self.rank, self.size = comm, outputs, comm.rank, comm.size
        self.resume_from = None
        (outputs / "checkpoints").mkdir(parents=True, exist_ok=True)
        self.checkpoints = Checkpointer(outputs / "checkpoints", comm)
        self.rows: list[dict[str, Any]] = []

    def log_row(self, step: int, **values: Any) -> None:
        self.rows.append({"step": step, **values})


class Mean(chainer.Chain):
    """Its loss is the mean of w * x; so the gradient of w is the mean of x."""

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.w = chainer.Parameter(np.ones((), np.float32))
            self.unused = chainer.Parameter(np.zeros(2, np.float32))
        self.statistic = np.zeros(3, np.float32)
        self.register_persistent("statistic")
        self.count = np.zeros(1, np.int64)
        self.register_persistent("count")

    def forward(self, x: Any) -> Any:
        loss = F.mean(self.w * x)
        chainer.report({"loss": loss, "value": F.mean(x)}, self)
        return loss


def numbers(count: int) -> list[np.ndarray]:
    return [np.float32(index + 1).reshape(1)[0:1] for index in range(count)]


@pytest.mark.parametrize("batch", [1, 3, 10])
def test_gradient_is_the_mean_over_samples_whatever_the_shares(comm: Communicator, batch: int) -> None:
    model, data = Mean(), numbers(11)
    optimizer = chainer.optimizers.SGD(1.0).setup(model)
    iterator = GlobalBatchIterator(data, batch, rank=comm.rank, size=comm.size, shuffle=False)
    GlobalBatchUpdater(iterator, optimizer, comm=comm).update()
    assert float(model.w.grad) == pytest.approx((1 + batch) / 2, rel=1e-6)
    assert float(model.w.array) == pytest.approx(1 - (1 + batch) / 2, rel=1e-6)
    np.testing.assert_array_equal(model.unused.grad, np.zeros(2))


def test_gradients_that_share_memory_or_are_read_only(comm: Communicator) -> None:
    model = chainer.Chain(a=chainer.Chain(), b=chainer.Chain())
    for link in (model.a, model.b):
        with link.init_scope():
            link.w = chainer.Parameter(np.zeros((2, 3), np.float32))
    frozen = np.full((2, 3), comm.rank, np.float32)
    frozen.flags.writeable = False
    for make in (frozen.copy, lambda: frozen, lambda: np.broadcast_to(np.float32(comm.rank), (2, 3))):
        for weight in (1, 2):
            model.a.w.grad = model.b.w.grad = make()
            average_gradients(model, comm, Exchange(), weight=weight)
            if comm.size > 1:
                model.a.w.grad[...] += 1  # as a hook may do; not also in the other
            np.testing.assert_allclose(model.b.w.grad, np.full((2, 3), weight * (comm.size - 1) / 2), rtol=1e-6)


def test_statistics_become_means_and_counts_rank_0s(comm: Communicator) -> None:
    model = Mean()
    model.statistic[...], model.count[...] = comm.rank, 10 + comm.rank
    average_statistics_(model, comm)
    np.testing.assert_array_equal(model.statistic, np.full(3, (comm.size - 1) / 2))
    assert model.count[0] == 10


def test_every_rank_takes_rank_0s_model(comm: Communicator) -> None:
    model = Mean()
    model.w.array[...], model.statistic[...], model.count[...] = 5 + comm.rank, comm.rank, comm.rank
    broadcast_model(model, comm)
    assert (float(model.w.array), model.statistic[0], model.count[0]) == (5, 0, 0)


@pytest.mark.parametrize("count", [1, 3, 10])
def test_validation_is_over_samples_with_uneven_and_empty_shares(comm: Communicator, count: int) -> None:
    model = Mean()
    seen: list[float] = []

    def converter(batch: list[np.ndarray], device: Any = None) -> np.ndarray:
        seen.extend(float(sample[0]) for sample in batch)
        return np.stack(batch)

    evaluator = GlobalEvaluator(numbers(count), model, comm, batch_size=2, converter=converter)
    reporter = chainer.Reporter()
    with reporter:
        means = evaluator()
    assert means == {
        "validation/main/loss": pytest.approx((1 + count) / 2),
        "validation/main/value": pytest.approx((1 + count) / 2),
    }
    assert reporter.observation == means
    assert len(set(comm.allgather_obj(tuple(means.items())))) == 1
    assert sorted(sample for part in comm.allgather_obj(seen) for sample in part) == [index + 1 for index in range(count)]


def test_ranks_end_with_the_same_weights_and_their_own_dropout(comm: Communicator, shared_path: Path) -> None:
    run = FakeRun(comm, shared_path)
    masks: list[float] = []

    class Noisy(chainer.Chain):
        def __init__(self) -> None:
            super().__init__()
            with self.init_scope():
                self.l1 = L.Linear(5, 4)  # with weights now, each rank its own
                self.norm = L.BatchNormalization(4)

        def forward(self, x: Any) -> Any:
            if chainer.config.train:
                masks.append(np.random.rand())
            return self.norm(self.l1(x))

    np.random.seed(comm.rank)  # whatever was drawn before
    data = np.random.RandomState(0).randn(13, 5).astype(np.float32)
    pairs = chainer.datasets.TupleDataset(data, np.arange(13, dtype=np.int32) % 4)
    model = L.Classifier(Noisy())
    trainer = dtrain.chainer.Trainer(
        model, chainer.optimizers.Adam(), pairs, pairs, run=run, epochs=2, batch_size=2 * comm.size + 1
    )
    trainer.run()
    entries: dict[str, np.ndarray] = {}
    path = trainer.save_model()
    with np.load(path) as file:
        entries.update({name: file[name] for name in file.files})
    for name, param in model.namedparams():
        np.testing.assert_array_equal(param.array, entries[name[1:]], err_msg=name)
    np.testing.assert_array_equal(model.predictor.norm.avg_mean, entries["predictor/norm/avg_mean"])
    assert len(set(comm.allgather_obj(masks[0]))) == comm.size
    assert [row["step"] for row in run.rows] == list(range(1, len(run.rows) + 1))
    assert len(set(comm.allgather_obj(len(run.rows)))) == 1


def test_model_that_cannot_be_written_is_an_error_on_all_ranks(comm: Communicator, shared_path: Path) -> None:
    trainer = dtrain.chainer.Trainer(
        Mean(), chainer.optimizers.SGD(), numbers(9), run=FakeRun(comm, shared_path), epochs=1, batch_size=4
    )
    (shared_path / "taken").write_text("")
    comm.barrier()
    with pytest.raises(WorkspaceError, match="cannot be written"):
        trainer.save_model("taken/model.npz")


def test_gpu_without_one_is_a_clear_error_on_all_ranks(comm: Communicator) -> None:
    if chainer.backends.cuda.available:
        pytest.skip("there is a GPU")
    assert choose_device("auto", comm).xp is np
    with pytest.raises((MissingDependency, NotRunnable), match="device='gpu' was asked for, and rank 0 on "):
        choose_device("gpu", comm)
