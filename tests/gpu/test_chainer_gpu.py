"""What only a GPU can show: `make gpu-check`. One GPU is enough; each figure is compared with NumPy's."""

from __future__ import annotations

import importlib.util
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

from dtrain.chainer.staging import Staging, cupy_memory
from dtrain.checkpoint import Checkpointer
from dtrain.comm.local import LocalCommunicator

pytestmark = pytest.mark.gpu


class Network(chainer.Chain):
    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.convolution = L.Convolution2D(1, 4, 3, pad=1)
            self.norm = L.BatchNormalization(4)
            self.out = L.Linear(None, 3)

    def forward(self, x: Any) -> Any:
        return self.out(F.relu(self.norm(self.convolution(x))))


class OneRank:
    """As much of a Run as the Trainer uses."""

    rank, size, resume_from = 0, 1, None

    def __init__(self, outputs: Path, earlier: Path | None = None) -> None:
        (outputs / "checkpoints").mkdir(parents=True)
        self.outputs, self.comm = outputs, LocalCommunicator()
        resume_from = None if earlier is None else earlier / "checkpoints"
        self.checkpoints = Checkpointer(outputs / "checkpoints", self.comm, resume_from=resume_from)

    def log_row(self, step: int, **values: Any) -> None:
        assert all(isinstance(value, float) for value in values.values())


def data() -> Any:
    x = np.random.RandomState(0).randn(40, 1, 6, 6).astype(np.float32)
    return chainer.datasets.TupleDataset(x, (x.mean(axis=(1, 2, 3)) > 0).astype(np.int32))


def train(outputs: Path, device: str, *, epochs: int = 3, earlier: Path | None = None) -> dict[str, np.ndarray]:
    dtrain.chainer.seed_random(0)
    model = L.Classifier(Network())
    trainer = dtrain.chainer.Trainer(
        model,
        chainer.optimizers.MomentumSGD(0.05),
        data(),
        data(),
        run=OneRank(outputs, earlier),  # type: ignore[arg-type]
        epochs=epochs,
        batch_size=16,
        device=device,
    )
    trainer.run()
    assert (next(model.params()).device.xp is np) == (device == "cpu")
    with np.load(trainer.save_model()) as saved:
        return dict(saved)


def test_gpu_trains_to_the_weights_of_the_cpu(tmp_path: Path) -> None:
    cpu, gpu = train(tmp_path / "cpu", "cpu"), train(tmp_path / "gpu", "gpu")
    assert cpu.keys() == gpu.keys()
    for name, value in cpu.items():
        # float32 sums in another order, through 8 steps of momentum.
        np.testing.assert_allclose(gpu[name], value, rtol=1e-3, atol=1e-4, err_msg=name)


def test_a_resumed_run_goes_on_on_the_gpu(tmp_path: Path) -> None:
    straight = train(tmp_path / "straight", "gpu", epochs=4)
    train(tmp_path / "half", "gpu", epochs=2)
    resumed = train(tmp_path / "resumed", "gpu", epochs=4, earlier=tmp_path / "half")
    for name, value in straight.items():
        # Convolution's gradients may be summed in any order on a GPU, so equal only up to rounding.
        np.testing.assert_allclose(resumed[name], value, rtol=1e-3, atol=1e-4, err_msg=name)


def test_device_arrays_of_any_layout_go_through_the_host_and_back() -> None:
    import cupy

    base = cupy.arange(60, dtype=cupy.float32).reshape(6, 10)
    arrays = [
        base.copy(),
        base[::2, 1::3].copy(order="F"),
        base.T.copy()[::-1],
        cupy.zeros((0, 3), cupy.float32),
        cupy.array(2.5),
    ]
    arrays += [cupy.arange(4, dtype=cupy.float16), cupy.arange(3, dtype=cupy.float64)]
    expected = [2 * array.get() for array in arrays]
    staging = Staging(cupy_memory())
    for _ in range(2):  # the second time through the buffers of the first

        def double(flats: Any) -> None:
            for flat in flats:
                assert isinstance(flat, np.ndarray)
                flat *= 2

        staging.exchange(arrays, [], double)
        for array, value in zip(arrays, expected, strict=True):
            np.testing.assert_array_equal(array.get(), value)
        expected = [2 * value for value in expected]


def test_chainermn_communicator_averages_gradients_on_the_gpu() -> None:
    communicator = dtrain.chainer.create_communicator(LocalCommunicator())
    model = L.Linear(3, 2)
    model.to_gpu()
    model.cleargrads()
    for param in model.params():
        param.grad = param.xp.full_like(param.array, 4)
    communicator.multi_node_mean_grad(model)
    for param in model.params():
        assert param.xp is not np
        np.testing.assert_array_equal(param.grad.get(), 4)
