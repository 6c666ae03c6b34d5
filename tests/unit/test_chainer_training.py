"""Device choice, evaluation, state and the Trainer, on one rank."""

from __future__ import annotations

import importlib.util
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

if importlib.util.find_spec("chainer") is None:  # not importorskip, which would import Chainer before dtrain.chainer
    pytest.skip("needs chainer", allow_module_level=True)

import dtrain.chainer

# isort: split
import chainer
import chainer.functions as F
import chainer.links as L
from chainer.training import extensions, updaters

from dtrain.chainer.device import FoundGpus, check_gpus
from dtrain.chainer.evaluator import add_observation, combine
from dtrain.chainer.extensions import metric_names
from dtrain.checkpoint import Checkpointer
from dtrain.comm.local import LocalCommunicator
from dtrain.errors import CheckpointError, DtrainError, MissingDependency, NotRunnable, UsageError


@dataclass
class FakeRun:
    """A run without a run folder; rows are kept."""

    outputs: Path
    earlier: Path | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        self.comm = LocalCommunicator()
        self.resume_from = None if self.earlier is None else type("Layout", (), {"id": self.earlier.name})
        earlier = None if self.earlier is None else self.earlier / "checkpoints"
        self.outputs.mkdir(exist_ok=True)
        (self.outputs / "checkpoints").mkdir(exist_ok=True)
        self.checkpoints = Checkpointer(self.outputs / "checkpoints", self.comm, resume_from=earlier)

    def log_row(self, step: int, **values: Any) -> None:
        self.rows.append({"step": step, **values})


class Network(chainer.Chain):
    def __init__(self, units: int = 5) -> None:
        super().__init__()
        with self.init_scope():
            self.l1 = L.Linear(None, units)
            self.norm = L.BatchNormalization(units)
            self.l2 = L.Linear(None, 3)

    def forward(self, x: Any) -> Any:
        return self.l2(F.dropout(F.relu(self.norm(self.l1(x))), 0.2))


def make_data(count: int = 22) -> Any:
    x = np.random.RandomState(0).randn(count, 4).astype(np.float32)
    return chainer.datasets.TupleDataset(x, np.argmax(x[:, :3], axis=1).astype(np.int32))


def make_trainer(run: FakeRun, **options: Any) -> Any:
    chosen: dict[str, Any] = {"epochs": 2, "batch_size": 8, "units": 5, "test": make_data(7)} | options
    model = L.Classifier(Network(chosen.pop("units")))
    optimizer = chosen.pop("optimizer", None) or chainer.optimizers.Adam()
    return dtrain.chainer.Trainer(model, optimizer, make_data(), chosen.pop("test"), run=run, **chosen)


def arrays_of(model: Any) -> dict[str, np.ndarray]:
    entries: dict[str, np.ndarray] = {}
    model.serialize(chainer.serializers.DictionarySerializer(entries))
    return {name: np.array(value) for name, value in entries.items()}


def assert_equal_models(one: Any, other: Any) -> None:
    first, second = arrays_of(one), arrays_of(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name)


def gpu(rank: int, of: int, count: int, first: str = "A", missing: str = "") -> FoundGpus:
    return FoundGpus(host="h", local_rank=rank, local_size=of, count=count, first=first, missing=missing)


@pytest.mark.parametrize(
    ("kind", "found", "expected"),
    [
        ("auto", [gpu(0, 1, 0, missing="CuPy cannot be imported")], False),
        ("auto", [gpu(0, 2, 2), gpu(1, 2, 2)], True),
        ("gpu", [gpu(0, 2, 1, "A"), gpu(1, 2, 1, "B")], True),  # the launcher shows each rank its own
        ("gpu", [gpu(0, 1, 0, missing="CuPy cannot be imported")], (MissingDependency, r"pip install 'dtrain\[cuda12\]'")),
        ("gpu", [gpu(0, 1, 0, missing="CUDA finds no GPU")], (NotRunnable, "nvidia-smi")),
        ("auto", [gpu(0, 2, 1), gpu(1, 2, 0, missing="CUDA finds no GPU")], (UsageError, "rank 1 on h has no GPU")),
        ("auto", [gpu(rank, 3, 2) for rank in range(3)], (UsageError, r"3 ranks on h exceed its 2 GPU")),
        ("gpu", [gpu(0, 2, 1), gpu(1, 2, 1)], (UsageError, r"2 ranks on h exceed its 1 GPU")),
    ],
)
def test_gpus_are_taken_one_a_rank_or_refused_with_the_numbers(kind: str, found: list[FoundGpus], expected: Any) -> None:
    if isinstance(expected, bool):
        assert check_gpus(kind, found) is expected
        assert not expected or len({(each.index(), each.first) for each in found}) == len(found)
    else:
        with pytest.raises(expected[0], match=expected[1]):
            check_gpus(kind, found)


def test_means_are_over_samples_whatever_the_shares() -> None:
    shares: list[dict[str, tuple[float, int]]] = [{}, {}, {}]
    for share, batches in zip(shares, [[[1.0, 1.0, 1.0]], [[5.0], [2.0, 2.0]], []], strict=True):
        for batch in batches:
            add_observation(share, {"loss": np.float32(np.mean(batch)), "shape": np.zeros(3)}, len(batch))
    assert combine(shares) == {"loss": pytest.approx(12 / 6)}


def test_metric_names() -> None:
    observed = {
        "main/loss": np.float32(1),
        "validation/main/accuracy": 0.5,
        "gen/loss": 2,
        "main": 3,
        "text": "no",
        "many": np.zeros(2),
    }
    assert metric_names(observed) == {"loss": 1, "validation/accuracy": 0.5, "gen/loss": 2, "main": 3}
    assert metric_names({"loss": 1, "main/loss": 2}) == {"loss": 1, "main/loss": 2}


def test_trains_records_and_prints_a_line_an_epoch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = FakeRun(tmp_path)
    trainer = make_trainer(run, epochs=3)
    observed = trainer.run()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["epoch 1/3", "epoch 2/3", "epoch 3/3"]
    assert all(words in lines[0] for words in ("loss ", "accuracy ", "validation ", " samples/s"))
    assert [row["step"] for row in run.rows] == list(range(1, 10))  # 3 * 22 samples, 8 a step
    assert {"loss", "accuracy", "samples_per_s", "epoch", "elapsed_s"} <= run.rows[0].keys()
    assert [row["step"] for row in run.rows if "validation/accuracy" in row] == [3, 6, 9]
    assert run.rows[-1]["validation/loss"] == observed["validation/main/loss"]
    assert run.checkpoints.steps() == [3, 6, 9]


def test_validation_is_what_the_saved_model_gives_on_all_samples(tmp_path: Path) -> None:
    trainer = make_trainer(FakeRun(tmp_path))
    observed = trainer.run()
    path = trainer.save_model("models/final.npz")
    assert path == tmp_path / "models" / "final.npz"
    assert [p.name for p in path.parent.iterdir()] == ["final.npz"]
    loaded = L.Classifier(Network())
    chainer.serializers.load_npz(str(path), loaded)
    with chainer.using_config("train", False):
        loss = loaded(*chainer.dataset.concat_examples(make_data(7)[:]))
    assert observed["validation/main/loss"] == pytest.approx(float(loss.array), rel=1e-5)


def test_log_every_keeps_means_over_the_steps_between(tmp_path: Path) -> None:
    each, third = FakeRun(tmp_path / "1"), FakeRun(tmp_path / "3")
    make_trainer(each, epochs=3).run()
    make_trainer(third, epochs=3, log_every=3).run()
    assert [row["step"] for row in third.rows] == [3, 6, 9]
    for row in third.rows:
        expected = np.mean([other["loss"] for other in each.rows if row["step"] - 3 < other["step"] <= row["step"]])
        assert row["loss"] == pytest.approx(expected)


def test_seed_decides_weights_and_order(tmp_path: Path) -> None:
    found = []
    for number, seed in enumerate([4, 4, 5]):
        np.random.seed(number)  # whatever was drawn before
        trainer = make_trainer(FakeRun(tmp_path / str(number)), seed=seed, test=None)
        trainer.run()
        found.append(arrays_of(trainer.model)["predictor/l1/W"])
    np.testing.assert_array_equal(found[0], found[1])
    assert np.abs(found[0] - found[2]).max() > 0.01


def resumed(tmp_path: Path, make: Any) -> tuple[Any, Any, FakeRun]:
    """(a trainer that ran straight, one that resumed at its half) of what ``make(run, epochs)`` makes."""
    straight = make(FakeRun(tmp_path / "straight"), 4)
    straight.run()
    make(FakeRun(tmp_path / "half"), 2).run()
    np.random.seed(99)
    run = FakeRun(tmp_path / "rest", earlier=tmp_path / "half")
    rest = make(run, 4)
    rest.run()
    assert run.rows[0]["step"] > 1
    return straight, rest, run


def test_resumed_float16_with_loss_scaling_is_bit_for_bit(tmp_path: Path) -> None:
    def make(run: FakeRun, epochs: int) -> Any:
        with chainer.using_config("dtype", chainer.mixed16):
            optimizer = chainer.optimizers.MomentumSGD(0.1)
            optimizer.use_fp32_update()
            model = L.Classifier(Network())
            optimizer.setup(model).loss_scaling()
            return dtrain.chainer.Trainer(
                model, optimizer, make_data(), run=run, epochs=epochs, batch_size=8, converter=to_half, checkpoint_every=2
            )

    straight, rest, _ = resumed(tmp_path, make)
    assert straight.model.predictor.l1.W.dtype == np.float16
    assert_equal_models(straight.model, rest.model)


def to_half(batch: Any, device: Any = None) -> Any:
    x, t = chainer.dataset.concat_examples(batch, device)
    return x.astype(np.float16), t


def test_resumed_learning_rate_that_the_users_code_changes_and_logs_of_extensions(tmp_path: Path) -> None:
    def make(run: FakeRun, epochs: int) -> Any:
        optimizer = chainer.optimizers.MomentumSGD(0.1)
        trainer = make_trainer(run, epochs=epochs, optimizer=optimizer)
        trainer.loop.extend(lambda _: setattr(optimizer, "lr", optimizer.lr * 0.8), name="fall", trigger=(2, "iteration"))
        trainer.loop.extend(extensions.ExponentialShift("momentum", 0.9), trigger=(3, "iteration"))
        trainer.loop.extend(extensions.LogReport(trigger=(4, "iteration")))
        return trainer

    straight, rest, _ = resumed(tmp_path, make)
    assert_equal_models(straight.model, rest.model)
    logs = [[entry["main/loss"] for entry in trainer.loop.get_extension("LogReport").log] for trainer in (straight, rest)]
    assert len(logs[0]) == 2
    assert logs[0] == logs[1]


def test_hyperparameter_that_the_user_changes_at_the_resume_is_the_users(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_trainer(FakeRun(tmp_path / "a"), optimizer=chainer.optimizers.SGD(0.1)).run()
    optimizer = chainer.optimizers.SGD(0.05)
    make_trainer(FakeRun(tmp_path / "b", earlier=tmp_path / "a"), optimizer=optimizer, epochs=3).run()
    assert optimizer.lr == 0.05
    assert "lr of optimizer 'main' begins with 0.05" in caplog.text


def test_resume_with_no_more_epochs_than_were_done_trains_no_further(tmp_path: Path) -> None:
    first = make_trainer(FakeRun(tmp_path / "a"), epochs=3, checkpoint_every=1)
    first.run()
    run = FakeRun(tmp_path / "b", earlier=tmp_path / "a")
    second = make_trainer(run, epochs=2)
    second.run()
    assert run.rows == []
    assert_equal_models(first.model, second.model)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            {"units": 6},
            r"another model: updater/model:main/predictor/l1/W is float32\[5, 4\] in the checkpoint and float32\[6, 4\]",
        ),
        ({"optimizer": "momentum"}, "updater/optimizer:main/predictor/l1/W/v|has no"),
        ({"seed": 1}, "seed=0"),
        ({"resume": 77}, "step 77"),
    ],
)
def test_resume_of_something_else_is_refused(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    make_trainer(FakeRun(tmp_path / "a"), optimizer=chainer.optimizers.SGD(0.1)).run()
    if "optimizer" in change:
        change = {"optimizer": chainer.optimizers.MomentumSGD(0.1)}
    with pytest.raises(CheckpointError, match=named):
        make_trainer(FakeRun(tmp_path / "b", earlier=tmp_path / "a"), epochs=3, **change).run()


def test_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    run = FakeRun(tmp_path)
    run.checkpoints.save(1, {"w": np.zeros(3)}, meta={"mine": 1})
    with pytest.raises(CheckpointError, match=r"not a checkpoint of dtrain\.chainer"):
        make_trainer(run).run()


def test_resume_never_and_nothing_to_resume_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_trainer(FakeRun(tmp_path / "a"), checkpoint_every="never").run()
    run = FakeRun(tmp_path / "b", earlier=tmp_path / "a")
    make_trainer(run).run()
    assert run.rows[0]["step"] == 1
    assert "a has no checkpoint to resume from: training begins at step 0" in caplog.text
    make_trainer(FakeRun(tmp_path / "c", earlier=tmp_path / "b"), resume="never").run()
    assert "resume='never': the checkpoints of b are not used" in caplog.text


def test_extension_that_the_checkpoint_does_not_know_begins_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_trainer(FakeRun(tmp_path / "a")).run()
    trainer = make_trainer(FakeRun(tmp_path / "b", earlier=tmp_path / "a"), epochs=3)
    trainer.loop.extend(extensions.LogReport())
    trainer.run()
    assert len(trainer.loop.get_extension("LogReport").log) == 1
    assert "no state of extension 'LogReport'" in caplog.text


def test_meta_of_a_checkpoint_is_plain_json(tmp_path: Path) -> None:
    run = FakeRun(tmp_path)
    make_trainer(run).run()
    saved = run.checkpoints.restore()
    assert saved is not None
    assert json.loads(json.dumps(saved.meta)) == saved.meta


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"epoch": 3}, r"no option 'epoch' \(did you mean epochs\?\)"),
        ({"epochs": 0}, "epochs=0"),
        ({"batch_size": True}, "batch_size=True"),
        ({"batch_size": 23}, "batch_size=23 exceeds the 22 training samples"),
        ({"device": "tpu"}, "device='tpu'"),
        ({"resume": "yes"}, "resume='yes'"),
        ({"checkpoint_every": 0}, "checkpoint_every=0"),
        ({"log_every": 0}, "log_every=0"),
        ({"seed": -1}, "seed=-1"),
        ({"test": []}, "validation set is empty"),
    ],
)
def test_options_check_themselves(tmp_path: Path, options: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        make_trainer(FakeRun(tmp_path), **options)


def test_refuses_what_cannot_be_trained(tmp_path: Path) -> None:
    run = FakeRun(tmp_path)
    with pytest.raises(UsageError, match=r"must be a chainer\.Link"):
        dtrain.chainer.Trainer(lambda x: x, chainer.optimizers.SGD(), make_data(), run=run, epochs=1, batch_size=2)
    with pytest.raises(UsageError, match="needs epochs"):
        dtrain.chainer.Trainer(L.Classifier(Network()), chainer.optimizers.SGD(), make_data(), run=run, batch_size=2)
    other = chainer.optimizers.SGD().setup(L.Classifier(Network()))
    with pytest.raises(UsageError, match="another model"):
        dtrain.chainer.Trainer(L.Classifier(Network()), other, make_data(), run=run, epochs=1, batch_size=2)


def test_extend_works_with_chainers_own_parts_and_only_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def make(run: FakeRun, epochs: int) -> Any:
        dtrain.chainer.seed_random(1)
        model = L.Classifier(Network())
        updater = updaters.StandardUpdater(
            chainer.iterators.SerialIterator(make_data(), 8), chainer.optimizers.Adam().setup(model)
        )
        trainer = chainer.training.Trainer(updater, (epochs, "epoch"), out=run.outputs)
        dtrain.chainer.extend(trainer, run, checkpoint_every=2)
        trainer.extend(extensions.LogReport())
        trainer.model = model
        return trainer

    straight, rest, run = resumed(tmp_path, make)
    assert_equal_models(straight.model, rest.model)
    assert {"loss", "accuracy", "samples_per_s", "epoch", "elapsed_s"} <= run.rows[0].keys()
    with pytest.raises(DtrainError, match="already extended"):
        dtrain.chainer.extend(rest, run)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
