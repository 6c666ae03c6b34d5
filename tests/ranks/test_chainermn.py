"""ChainerMN's parts over our communicator, at any number of ranks: expected values follow from rank and size."""

from __future__ import annotations

import importlib.util
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

for package in ("mpi4py", "chainer"):
    if importlib.util.find_spec(package) is None:  # not importorskip, which would import Chainer before dtrain.chainer
        pytest.skip(f"needs {package}", allow_module_level=True)

import dtrain.chainer
from dtrain.chainer import staging
from dtrain.comm.mpi import MpiCommunicator
from dtrain.errors import CheckpointError, CommunicationError, UsageError

import chainer  # isort: skip  # after dtrain.chainer, which adapts it
import chainer.functions as F  # isort: skip
import chainer.links as L  # isort: skip
import chainermn  # isort: skip
from chainer import training  # isort: skip

from dtrain.chainer.communicator import DtrainCommunicator  # isort: skip

pytestmark = [pytest.mark.mpi, pytest.mark.needs("mpi", "chainer")]


def host_memory_as_device(array: Any) -> staging.DeviceMemory:
    """Treats NumPy's arrays as a device's, so that the way of CuPy's is taken without one."""
    return staging.DeviceMemory(
        xp=np,
        pinned_empty=lambda size, dtype: np.empty(size, dtype),
        download=lambda device, host: np.copyto(host, device),
        upload=lambda host, device: np.copyto(device, host),
    )


@pytest.fixture(scope="module", params=["host", "device"])
def comm(request: pytest.FixtureRequest) -> Any:
    inner = MpiCommunicator()
    if request.param == "host":
        made = dtrain.chainer.create_communicator(inner)
    else:
        made = DtrainCommunicator(inner, memory_of=host_memory_as_device)
    yield made
    made.finalize()
    inner.close()


def make_model(seed: int, n_in: int | None = 3) -> chainer.Chain:
    def fill(array: np.ndarray) -> None:  # whenever a layer gets its weights, they are those of the seed
        array[...] = np.random.RandomState(seed).standard_normal(array.shape)

    fill.dtype = None  # type: ignore[attr-defined]  # what Chainer asks of an initializer
    return L.Classifier(chainer.Sequential(L.Linear(n_in, 4, initialW=fill), F.tanh, L.Linear(4, 2, initialW=fill)))


def make_batches(rank: int, size: int, steps: int = 3, each: int = 4) -> list[tuple[np.ndarray, np.ndarray]]:
    """A rank's part of ``steps`` batches of ``size * each`` examples; rank 0 of 1 with ``each`` scaled holds all of them."""
    random = np.random.RandomState(7)
    batches = []
    for _ in range(steps):
        x, t = random.rand(size * each, 3).astype("f"), random.randint(0, 2, size * each).astype("i")
        batches.append((x[rank * each : (rank + 1) * each], t[rank * each : (rank + 1) * each]))
    return batches


def weights(model: chainer.Link) -> list[np.ndarray]:
    return [param.array.copy() for _, param in sorted(model.namedparams())]


def test_ranks_and_objects(comm: Any) -> None:
    rank, size = comm.rank, comm.size
    assert (comm.intra_rank, comm.intra_size, comm.inter_rank, comm.inter_size) == (rank, size, 0, 1)
    assert comm.bcast_obj({"of": rank}, root=size - 1) == {"of": size - 1}
    assert comm.gather_obj(rank) == (list(range(size)) if rank == 0 else None)
    assert comm.allreduce_obj(rank + 1) == size * (size + 1) // 2
    comm.send_obj([rank, "to the next"], (rank + 1) % size, tag=3)
    assert comm.recv_obj((rank - 1) % size) == [(rank - 1) % size, "to the next"]


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int32", "int64", "uint8"])
def test_arrays(comm: Any, dtype: str) -> None:
    rank, size = comm.rank, comm.size
    mine = np.full((2, rank), rank, dtype)  # shapes differ, rank 0's is empty
    everyone = [np.full((2, r), r, dtype) for r in range(size)]
    gathered = comm.gather(mine, root=size - 1)
    for got in [comm.allgather(mine), gathered if rank == size - 1 else everyone]:
        np.testing.assert_array_equal(np.concatenate(got, axis=1), np.concatenate(everyone, axis=1), strict=True)
    total = comm.allreduce(np.array([rank, 1], dtype))
    np.testing.assert_array_equal(total, np.array([size * (size - 1) // 2, size], dtype), strict=True)
    sent = np.array([5, 6], dtype).reshape(2, 1)[::-1]
    np.testing.assert_array_equal(comm.bcast(sent if rank == 0 else None, 0), sent, strict=True)
    exchanged = comm.alltoall(tuple(np.array([10 * rank + r], dtype) for r in range(size)))
    np.testing.assert_array_equal(np.concatenate(exchanged), [10 * r + rank for r in range(size)])
    part = comm.scatter(np.arange(size * 3, dtype=dtype).reshape(size, 3) if rank == 0 else None)
    np.testing.assert_array_equal(part, np.arange(size * 3, dtype=dtype).reshape(size, 3)[rank], strict=True)
    comm.send((np.array(rank, dtype), mine.T), (rank + 1) % size, tag=0)
    number, transposed = comm.recv((rank - 1) % size, tag=0)
    np.testing.assert_array_equal(number, np.array((rank - 1) % size, dtype), strict=True)
    np.testing.assert_array_equal(transposed, everyone[(rank - 1) % size].T, strict=True)


def test_what_root_gives_wrongly_is_refused_on_all_ranks(comm: Any) -> None:
    with pytest.raises(TypeError, match="bcast takes one"):
        comm.bcast("text" if comm.rank == 0 else None, 0)
    with pytest.raises(ValueError, match=f"for {comm.size} ranks"):
        comm.scatter((np.ones(1),) * (comm.size + 1) if comm.rank == 0 else None)
    assert comm.allreduce_obj(1) == comm.size  # and the communicator still works


def test_messages_in_parts(comm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays beyond MPI's count of bytes go in parts; here the bound is 10 bytes."""
    monkeypatch.setattr("dtrain.chainer.messages.PART_BYTES", 10)
    rank, size = comm.rank, comm.size
    exchanged = comm.alltoall([np.arange(100.0) * rank + r for r in range(size)])
    for r in range(size):
        np.testing.assert_array_equal(exchanged[r], np.arange(100.0) * r + rank)


def test_split(comm: Any) -> None:
    part = comm.split(comm.rank % 2, -comm.rank)
    members = [r for r in reversed(range(comm.size)) if r % 2 == comm.rank % 2]
    assert (part.rank, part.size) == (members.index(comm.rank), len(members))
    assert part.allreduce_obj([comm.rank]) == members
    part.finalize()


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_mean_grad(comm: Any, dtype: str) -> None:
    with chainer.using_config("dtype", np.dtype(dtype)):
        model = make_model(0)
    for number, (_, param) in enumerate(sorted(model.namedparams())):
        param.grad = np.full(param.shape, comm.rank + number, dtype)
    comm.multi_node_mean_grad(model)
    for number, (_, param) in enumerate(sorted(model.namedparams())):
        expected = np.full(param.shape, (comm.size - 1) / 2 + number, dtype)
        np.testing.assert_array_equal(param.grad, expected, strict=True)


def test_gradients_go_in_one_exchange(comm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(0)
    calls = []
    exchange = comm.inner.allreduce_mean_
    monkeypatch.setattr(comm.inner, "allreduce_mean_", lambda arrays: (calls.append(len(arrays)), exchange(arrays)))
    comm.multi_node_mean_grad(model, zero_fill=True)
    assert len(calls) == 1


def test_chainermns_own_communicators_keep_chainermns_parts(comm: Any) -> None:
    naive = chainermn.create_communicator("naive")
    optimizer = chainermn.create_multi_node_optimizer(chainer.optimizers.SGD(1.0), naive).setup(make_model(0))
    assert type(optimizer) is chainermn.optimizers._MultiNodeOptimizer
    assert len(chainermn.scatter_dataset(list(range(10)), naive)._dataset) == 10


def test_mean_of_gradients_that_are_none(comm: Any) -> None:
    model = make_model(0)
    model.cleargrads()
    used = model.predictor[0].b
    used.grad = np.broadcast_to(np.float32(comm.rank), used.shape)  # read-only, as the gradient of a sum is
    comm.multi_node_mean_grad(model, zero_fill=False)
    assert [param.grad is None for _, param in sorted(model.namedparams())] == [True, False, True, True]
    np.testing.assert_array_equal(used.grad, np.full(used.shape, (comm.size - 1) / 2, "f"))
    comm.multi_node_mean_grad(model, zero_fill=True)
    assert all(param.grad is not None for param in model.params())


@pytest.mark.parametrize("shapes", ["alike", "different"])
def test_gradients_that_some_ranks_lack_are_refused_by_name(comm: Any, shapes: str) -> None:
    if comm.size == 1:
        pytest.skip("one rank agrees with itself")
    model = chainer.Sequential(L.Linear(2, 2, nobias=True), L.Linear(2, 2 if shapes == "alike" else 3, nobias=True))
    model.cleargrads()
    param = model[1 if comm.rank == comm.size - 1 else 0].W
    param.grad = np.ones_like(param.array)
    with pytest.raises(CommunicationError, match=rf"rank {comm.size - 1} has /1/W .* where rank 0 has /0/W .*zero_fill"):
        comm.multi_node_mean_grad(model)


@pytest.mark.parametrize("n_in", [3, None], ids=["sized", "lazy"])
@pytest.mark.parametrize("optimizer", [lambda: chainer.optimizers.SGD(0.5), chainer.optimizers.Adam], ids=["SGD", "Adam"])
def test_every_update_trains(comm: Any, optimizer: Any, n_in: int | None) -> None:
    """Three updates of N ranks, each with weights of its own at first, equal three of Chainer alone with rank 0's."""
    model = make_model(seed=comm.rank, n_in=n_in)
    ours = chainermn.create_multi_node_optimizer(optimizer(), comm).setup(model)
    alone = make_model(seed=0, n_in=n_in)
    reference = optimizer().setup(alone)
    whole = make_batches(0, 1, each=4 * comm.size)
    for mine, all_of_it in zip(make_batches(comm.rank, comm.size), whole, strict=True):
        ours.update(model, *mine)
        reference.update(alone, *all_of_it)
    assert ours.t == 3
    for got, expected in zip(weights(model), weights(alone), strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5)  # Adam divides by roots of small means of squares
    assert len(set(comm.inner.allgather_obj(pickle.dumps(weights(model))))) == 1


def test_update_without_loss_function(comm: Any) -> None:
    """Gradients of weights that were replaced before the update: rank 0's are used, which are those of the weights."""
    model, alone = make_model(0), make_model(0)
    optimizer = chainermn.create_multi_node_optimizer(chainer.optimizers.SGD(1.0), comm).setup(model)
    for param in model.params():
        param.array += comm.rank
    for link, steps in ((model, comm.rank + 1), (alone, 1)):
        for param in link.params():
            param.grad = np.full(param.shape, steps, "f")
    optimizer.update()
    for got, start in zip(weights(model), weights(alone), strict=True):
        np.testing.assert_array_equal(got, start - 1)


def test_resumed_equals_straight(comm: Any, tmp_path: Path) -> None:
    def start() -> tuple[chainer.Chain, Any]:
        model = make_model(3)
        return model, chainermn.create_multi_node_optimizer(chainer.optimizers.Adam(), comm).setup(model)

    batches = make_batches(comm.rank, comm.size, steps=4)
    straight, optimizer = start()
    for step, batch in enumerate(batches):
        optimizer.update(straight, *batch)
        if step == 1:
            chainer.serializers.save_npz(tmp_path / "model.npz", straight)
            chainer.serializers.save_npz(tmp_path / "optimizer.npz", optimizer)
    resumed, optimizer = start()
    chainer.serializers.load_npz(tmp_path / "model.npz", resumed)
    chainer.serializers.load_npz(tmp_path / "optimizer.npz", optimizer)
    for batch in batches[2:]:
        optimizer.update(resumed, *batch)
    for got, expected in zip(weights(resumed), weights(straight), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_models_that_differ_and_double_buffering_are_refused(comm: Any) -> None:
    with pytest.raises(UsageError, match="double_buffering"):
        chainermn.create_multi_node_optimizer(chainer.optimizers.SGD(), comm, double_buffering=True)
    if comm.size > 1:
        model = chainer.Sequential(*[L.Linear(2, 2) for _ in range(1 + (comm.rank == 1))])
        with pytest.raises(CommunicationError, match=r"rank 1 differs from rank 0's: .*/1/W, /1/b"):
            chainermn.create_multi_node_optimizer(chainer.optimizers.SGD(), comm).setup(model)


class Reports(chainer.Chain):  # type: ignore[misc]
    """Reports the mean of its batch."""

    def forward(self, x: np.ndarray) -> None:
        chainer.report({"value": np.float32(x.mean())}, self)


class OwnLoop(training.extensions.Evaluator):  # type: ignore[misc]
    def evaluate(self) -> dict[str, float]:
        arrays = [
            chainer.dataset.convert._call_converter(self.converter, batch, self.device) for batch in self._iterators["main"]
        ]
        return {"main/value": float(np.concatenate(arrays).mean())} if arrays else {}


@pytest.mark.parametrize("kind", [training.extensions.Evaluator, OwnLoop])
def test_evaluator_weighs_samples(comm: Any, kind: Any) -> None:
    """Shares of 0, 5, 10, ... samples in batches of 3: neither the means of ranks nor those of batches are the mean."""
    share = [np.float32(100 * comm.rank + i) for i in range(5 * comm.rank + 5 * (comm.size == 1))]
    everything = np.concatenate(comm.inner.allgather_obj(np.array(share, dtype=np.float64)))
    evaluator = kind(chainer.iterators.SerialIterator(share, 3, repeat=False, shuffle=False), Reports())
    evaluator = chainermn.create_multi_node_evaluator(evaluator, comm)
    evaluator.name = None
    for _ in range(2):
        if kind is OwnLoop:
            evaluator.get_iterator("main").reset()
        assert evaluator() == {"main/value": pytest.approx(everything.mean(), rel=1e-6)}


def test_generic_evaluator(comm: Any) -> None:
    class Generic(chainermn.extensions.GenericMultiNodeEvaluator):  # type: ignore[misc]
        def calc_local(self, x: np.ndarray) -> float:
            return float(x.sum())

    share = [np.float32(comm.rank)] * (3 * comm.rank + 1)
    evaluator = Generic(comm, chainer.iterators.SerialIterator(share, 2, repeat=False, shuffle=False), Reports())
    result = evaluator(None)
    assert (sum(result) if comm.rank == 0 else result) == (
        sum(r * (3 * r + 1) for r in range(comm.size)) if comm.rank == 0 else None
    )


def double(example: Any) -> Any:
    return 2 * example


DATASETS = {
    "array": np.arange(101.0),
    "list": list(range(101)),
    "tuples": chainer.datasets.TupleDataset(np.arange(101), [str(i) for i in range(101)]),
    "dicts": chainer.datasets.DictDataset(a=np.arange(101), b=list(range(101))),
    "part": chainer.datasets.SubDataset(list(range(200)), 50, 151, np.random.RandomState(0).permutation(200)),
    "transformed": chainer.datasets.TransformDataset(list(range(101)), double),
    "any other": chainer.datasets.ConcatenatedDataset(np.arange(50), np.arange(51)),
}


@pytest.mark.parametrize("name", DATASETS)
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("equal", [True, False])
def test_scatter_dataset(comm: Any, name: str, shuffle: bool, equal: bool) -> None:
    """The shares are ChainerMN's, and hold no example more than that."""
    root = comm.size - 1
    dataset = DATASETS[name]
    given = dataset if comm.rank == root else None
    share = chainermn.scatter_dataset(given, comm, root=root, shuffle=shuffle, seed=5, force_equal_length=equal)
    order = np.random.RandomState(5).permutation(101) if shuffle else np.arange(101)
    lengths = comm.inner.allgather_obj(len(share))
    begin = 101 * comm.rank // comm.size if equal else sum(lengths[: comm.rank])
    assert [str(example) for example in share] == [str(dataset[i]) for i in order[begin : begin + len(share)]]
    assert sum(lengths) == 101 or equal
    assert max(lengths) - min(lengths) <= (0 if equal else 1)
    if name != "any other":
        assert len(share._dataset) == len(share)


def test_scatter_index_and_empty_dataset(comm: Any) -> None:
    bounds = comm.inner.allgather_obj(chainermn.scatter_index(2**40 + 1, comm, force_equal_length=False))
    assert bounds[0][0] == 0
    assert bounds[-1][1] == 2**40 + 1
    assert all(bounds[i][1] == bounds[i + 1][0] for i in range(comm.size - 1))
    assert list(chainermn.datasets.create_empty_dataset(range(3))) == [(), (), ()]


def test_multi_node_batch_normalization(comm: Any) -> None:
    x = np.random.RandomState(1).rand(4 * comm.size, 3).astype("f")
    mine = x[4 * comm.rank : 4 * comm.rank + 4]
    plain = L.BatchNormalization(3)
    ours = chainermn.links.create_mnbn_model(chainer.Sequential(plain), comm)[0]
    assert isinstance(ours, chainermn.links.MultiNodeBatchNormalization)
    np.testing.assert_allclose(ours(mine).array, plain(x).array[4 * comm.rank : 4 * comm.rank + 4], atol=1e-5)
    np.testing.assert_allclose(ours.avg_var, plain.avg_var, atol=1e-2)  # ChainerMN's has no Bessel correction
    with pytest.raises(UsageError, match="nccl"):
        chainermn.links.MultiNodeBatchNormalization(3, comm, communication_backend="nccl")


def test_allreduce_persistent_leaves_integers(comm: Any) -> None:
    link = chainer.Link()
    for name, value in {"mean": np.full(2, comm.rank, "f"), "count": np.full(2, comm.rank), "number": comm.rank}.items():
        link.add_persistent(name, value)
    chainermn.extensions.AllreducePersistent(link, comm)()
    np.testing.assert_array_equal(link.mean, np.full(2, (comm.size - 1) / 2, "f"))
    np.testing.assert_array_equal(link.count, np.full(2, comm.rank))
    assert link.number == comm.rank


def test_observation_aggregator(comm: Any) -> None:
    class FakeTrainer:
        observation: dict[str, Any]
        updater = type("Updater", (), {"iteration": 1})()

    trainer = FakeTrainer()
    trainer.observation = {"loss": chainer.Variable(np.array(comm.rank, "f"))}
    chainermn.extensions.ObservationAggregator(comm, "loss", "mean")(trainer)
    assert float(trainer.observation["mean"]) == (comm.size - 1) / 2


@pytest.mark.parametrize("dtype", ["f", "i"])
def test_multi_node_iterator(comm: Any, dtype: str) -> None:
    root = comm.size - 1
    dataset = chainer.datasets.TupleDataset(np.arange(6, dtype="f").reshape(6, 1), np.arange(6, dtype=dtype))
    iterator = chainer.iterators.SerialIterator(dataset, 2, repeat=False, shuffle=False) if comm.rank == root else None
    iterator = chainermn.iterators.create_multi_node_iterator(iterator, comm, rank_master=root)
    assert [int(t) for batch in iterator for _, t in batch] == list(range(6))


def test_synchronized_iterator(comm: Any) -> None:
    np.random.seed(comm.rank)
    iterator = chainer.iterators.SerialIterator(list(range(20)), 5, shuffle=True)
    iterator = chainermn.iterators.create_synchronized_iterator(iterator, comm)
    drawn = comm.inner.allgather_obj([next(iterator) for _ in range(8)])
    assert all(each == drawn[0] for each in drawn)


def several(outputs: Any) -> Any:
    """Chainer's functions of one output give it bare."""
    return (outputs,) if isinstance(outputs, chainer.Variable) else outputs


def test_collective_functions_and_their_gradients(comm: Any) -> None:
    x = chainer.Variable(np.full((2,), comm.rank + 1, "f"))
    y = F.stack(several(chainermn.functions.allgather(comm, x)))
    np.testing.assert_array_equal(y.array[:, 0], np.arange(1, comm.size + 1))
    F.sum(y).backward()
    np.testing.assert_array_equal(x.grad, np.full(2, comm.size))
    ys = several(chainermn.functions.alltoall(comm, tuple(x + r for r in range(comm.size))))
    np.testing.assert_array_equal([each.array[0] for each in ys], np.arange(1, comm.size + 1) + comm.rank)
    np.testing.assert_array_equal(chainermn.functions.bcast(comm, x, 0).array, [1, 1])
    gathered = chainermn.functions.gather(comm, x, 0)
    scattered = chainermn.functions.scatter(comm, several(gathered) if comm.rank == 0 else x, 0)
    np.testing.assert_array_equal(scattered.array, x.array)


def test_model_over_two_ranks_trains_like_one(comm: Any) -> None:
    """A MultiNodeChainList of two halves, with sends and receives forward and backward, against the model as a whole."""
    if comm.size < 2:
        pytest.skip("a model over two ranks needs two")
    first, second = make_model(0).predictor[0], make_model(0).predictor[2]
    x, t = make_batches(0, 1)[0]
    whole = F.softmax_cross_entropy(second(F.tanh(first(x))), t)
    first.cleargrads(), second.cleargrads()
    whole.backward()
    expected = [weights for link in (first, second) for weights in (link.W.grad.copy(), link.b.grad.copy())]

    class FirstHalf(chainer.Chain):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(l=first)

        def forward(self, x: Any) -> Any:
            return F.tanh(self.l(x))

    if comm.rank < 2:
        halves = chainermn.MultiNodeChainList(comm)
        half, ends = (FirstHalf(), {"rank_out": 1}) if comm.rank == 0 else (second, {"rank_in": 0})
        halves.add_link(half, **ends)
        halves.cleargrads()
        loss = halves(x) if comm.rank == 0 else F.softmax_cross_entropy(halves(), t)
        loss.backward()
        link = (first, second)[comm.rank]
        np.testing.assert_allclose(link.W.grad, expected[2 * comm.rank], atol=1e-6)
        np.testing.assert_allclose(link.b.grad, expected[2 * comm.rank + 1], atol=1e-6)


def test_checkpointer(comm: Any, tmp_path: Path) -> None:
    folder = Path(comm.bcast_obj(str(tmp_path)))
    model = make_model(comm.rank)
    saver = chainermn.create_multi_node_checkpointer("job", comm, path=str(folder))
    saver.save(model, 3)
    comm.inner.barrier()
    loaded = make_model(100)
    chainermn.create_multi_node_checkpointer("job", comm, path=str(folder)).maybe_load(loaded)
    for got, expected in zip(weights(loaded), weights(model), strict=True):
        np.testing.assert_array_equal(got, expected)
    comm.inner.barrier()
    if comm.rank == 0:
        (folder / f"job.{comm.size}.3").write_bytes(b"")  # as if one rank more had written it
    comm.inner.barrier()
    with pytest.raises(CheckpointError, match=f"there are {comm.size} ranks"):
        chainermn.create_multi_node_checkpointer("job", comm, path=str(folder)).maybe_load(make_model(0))
    comm.inner.barrier()


def test_unchanged_script_with_trainer(comm: Any, tmp_path: Path) -> None:
    """The body of ChainerMN's MNIST example, with our communicator."""
    x, _ = make_batches(0, 1, steps=1, each=48)[0]
    train = chainer.datasets.TupleDataset(x, (x.sum(axis=1) > 1.5).astype("i")) if comm.rank == 0 else None
    train = chainermn.scatter_dataset(train, comm, shuffle=True, seed=1)
    model = make_model(comm.rank)
    optimizer = chainermn.create_multi_node_optimizer(chainer.optimizers.Adam(0.02), comm)
    optimizer.setup(model)
    updater = training.StandardUpdater(chainer.iterators.SerialIterator(train, 12), optimizer)
    trainer = training.Trainer(updater, (20, "epoch"), out=str(tmp_path))
    test = chainer.iterators.SerialIterator(train, 12, repeat=False, shuffle=False)
    trainer.extend(chainermn.create_multi_node_evaluator(training.extensions.Evaluator(test, model), comm))
    log = training.extensions.LogReport()
    trainer.extend(log)
    trainer.run()
    losses = [row["validation/main/loss"] for row in log.log]
    assert losses[-1] < losses[0] / 2
    assert all(each == losses for each in comm.inner.allgather_obj(losses))
