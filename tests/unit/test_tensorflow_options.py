"""What of dtrain.tensorflow needs no second rank: what is refused, and what is not loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.needs("tensorflow")

ROOT = Path(__file__).parents[2]


def run_python(folder: Path, code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_nothing_heavy_is_loaded_before_it_is_used(tmp_path: Path) -> None:
    code = "import sys, dtrain.tensorflow; print([n for n in ('tensorflow', 'keras', 'horovod', 'mpi4py') if n in sys.modules])"
    assert run_python(tmp_path, code).strip() == "[]"


REFUSALS = """
import numpy as np
import dtrain
import dtrain.tensorflow
import tensorflow as tf
run = dtrain.init()
keras = tf.keras
x, y = np.zeros((8, 3), np.float32), np.zeros((8, 1), np.float32)
def told(action):
    try:
        action()
    except dtrain.errors.DtrainError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"
import dtrain.errors
def build():
    model = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    return model
def trainer(build=build, train=(x, y), test=None, **options):
    return dtrain.tensorflow.Trainer(build, train, test, run=run, **{"epochs": 1, "batch_size": 4, **options})
assert "did you mean 'batch_size'?" in told(lambda: trainer(batchsize=3))
assert "batch_size=9 exceeds the 8 training samples" in told(lambda: trainer(batch_size=9))
assert "different numbers of samples: 7, 8" in told(lambda: trainer(train=(x, y[:7])))
assert "a pair (inputs, targets)" in told(lambda: trainer(train=x))
assert "device='tpu' is not known" in told(lambda: trainer(device="tpu"))
assert "build_model() must return a compiled model" in told(lambda: trainer(lambda: keras.Sequential([keras.layers.Input((3,))])))
assert "checkpoint_every=0" in told(lambda: dtrain.tensorflow.callbacks(run, checkpoint_every=0))
assert dtrain.tensorflow.TrainOptions(epochs=1, batch_size=4).check_every == dtrain.tensorflow.FitOptions().check_every
assert "UsageError: callbacks:" in told(lambda: dtrain.tensorflow.callbacks(run, chekpoint_every=1))
assert "compression='fp8'" in told(lambda: dtrain.tensorflow.DistributedOptimizer(keras.optimizers.SGD(), run, compression="fp8"))
if not tf.config.list_physical_devices("GPU"):
    assert "NotRunnable: device='gpu' was asked for, and TensorFlow sees no GPU" in told(lambda: trainer(device="gpu"))
# alone everything is there, without Horovod
optimizer = keras.optimizers.SGD()
assert dtrain.tensorflow.DistributedOptimizer(optimizer, run) is optimizer
made = trainer(epochs=2, test=(x, y))
assert made.run()["val_loss"] >= 0 and made.save_model("m.keras").is_file() and run.checkpoints.steps() == [2, 4]
# a model is saved as what its name says, and replaces the one before
for _ in range(2):
    saved = tf.saved_model.load(str(made.save_model("as/folder")))
    served = saved.serve if hasattr(saved, "serve") else lambda inputs: saved(inputs, training=False)
    np.testing.assert_allclose(served(tf.constant(x + 1)), made.model.predict(x + 1, verbose=0), rtol=1e-6)
assert [path.name for path in (run.outputs / "as").iterdir()] == ["folder"]
refused = told(lambda: made.save_model("m.npz"))
assert "UsageError: a model cannot be saved as 'm.npz'; let the name end with .keras or .h5" in refused, refused
class Unsavable(keras.layers.Layer):
    def get_config(self):
        raise ValueError("no configuration")
    def call(self, inputs):
        return inputs
unsavable = keras.Sequential([keras.layers.Input((3,)), Unsavable()])
failed = dtrain.tensorflow.work.write_model(unsavable, run.outputs / "u.keras")
assert "the model cannot be saved to" in failed and "ValueError: no configuration" in failed, failed
assert not [path for path in run.outputs.iterdir() if "u.keras" in path.name]
# a second fit in one process goes on from the first, not from its checkpoint
model = build()
before = model.get_weights()
model.fit(x, y, epochs=1, verbose=0, callbacks=dtrain.tensorflow.callbacks(run, checkpoint_every="never"))
other = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(2), keras.layers.Dense(1)])
other.compile("sgd", "mse")
step = lambda which: dtrain.tensorflow.callbacks(run, resume=which, checkpoint_every="never")
dtrain.tensorflow.fit._progress.clear()
wrong = told(lambda: other.fit(x, y, verbose=0, callbacks=step(4)))
assert "CheckpointError: the checkpoint is of another model: only one of the two has model/0002/kernel" in wrong, wrong
# batches of evaluation and prediction are progress, too
from dtrain.progress import PROGRESS
marks = dtrain.tensorflow.callbacks(run, checkpoint_every="never", resume="never")
for act in (lambda: model.evaluate(x, y, batch_size=2, verbose=0, callbacks=marks),
            lambda: model.predict(x, batch_size=2, verbose=0, callbacks=marks)):
    count = PROGRESS.read().count
    act()
    assert PROGRESS.read().count >= count + 4
# a task of a cluster exchanges through TensorFlow; averaging it over "ranks" would train each alone
class Task:
    role, index, rank, size, elastic = "worker", 1, 1, 2, False
for part in (
    lambda: dtrain.tensorflow.callbacks(Task()),
    lambda: dtrain.tensorflow.DistributedOptimizer(optimizer, Task()),
    lambda: dtrain.tensorflow.DistributedGradientTape(None, Task()),
):
    assert "this is worker 1 of a TensorFlow cluster" in told(part), told(part)
if dtrain.tensorflow.state.keras3():
    cluster = told(lambda: dtrain.tensorflow.Trainer(build, (x, y), run=Task(), epochs=1, batch_size=4))
    assert cluster.startswith("UsageError: Keras 3's model.fit fails under MultiWorker") and "LEGACY_KERAS" in cluster, cluster
# a model made after others has the same names in a checkpoint
def momentum():
    model = build()
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    model.fit(x, x[:, :1] + 1, verbose=0)
    return model
one, other = momentum(), momentum()
shared, own = dtrain.tensorflow.state.capture(one)
dtrain.tensorflow.state.restore(other, shared, own)
assert all(np.array_equal(a, b) for a, b in zip(shared.values(), dtrain.tensorflow.state.capture(other)[0].values(), strict=True))
assert not any("dense" in name or "sequential" in name for name in shared), list(shared)
# the ranks' comparison sees the order of what is the same, chunks included, and signs
def sums(array):
    return dtrain.tensorflow.state._checksum(tf.Variable(array))
matrix = np.random.RandomState(0).randn(1001, 301).astype(np.float32)  # three chunks and an odd number of values
signs = matrix.copy()
signs[0, [1, 3]] *= -1
others = [matrix, matrix[::-1], matrix[:, ::-1], np.roll(matrix.ravel(), 2**17), signs, matrix * np.float32(-1)]
assert len({sums(each) for each in others}) == len(others) and sums(matrix) == sums(matrix.copy())
last = matrix.ravel().copy()
last[-1] += 1
assert sums(last) != sums(matrix.ravel())
assert sums(tf.cast(matrix, tf.bfloat16)) != sums(tf.cast(matrix[::-1], tf.bfloat16))
# only a chief sends data, and so much at most
from dtrain.tensorflow import cluster
class TooMuch:
    train = (np.broadcast_to(np.float32(0), (2**20, 1024)), y)
refused = told(lambda: cluster.ChiefPart(run, TooMuch(), validates=False))
assert "UsageError: train has 4.0 GiB" in refused, refused
# the last epoch is saved in any case
build().fit(x, y, epochs=7, verbose=0, callbacks=dtrain.tensorflow.callbacks(run, checkpoint_every=5, resume="never"))
assert [run.checkpoints.restore(step).meta["epochs"] for step in run.checkpoints.steps()[-2:]] == [5, 7]
# also of one that is stopped, and a fit after one that failed begins where it says itself
class Stop(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        self.model.stop_training = epoch == 3
build().fit(x, y, epochs=9, verbose=0, callbacks=[*dtrain.tensorflow.callbacks(run, checkpoint_every=3, resume="never"), Stop()])
assert [run.checkpoints.restore(step).meta["epochs"] for step in run.checkpoints.steps()[-2:]] == [3, 4]
class Fail(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        raise RuntimeError("out of memory")
dtrain.tensorflow.fit._progress.clear()
model, again = build(), dtrain.tensorflow.callbacks(run)
try:
    model.fit(x, y, epochs=9, verbose=0, callbacks=[*again, Fail()])
except RuntimeError:
    pass
assert len(model.fit(x, y, epochs=3, verbose=0).history["loss"]) == 3
fits = dtrain.tensorflow.fit._progress[run].fits
model.fit(x, y, epochs=1, verbose=0, callbacks=again)
assert dtrain.tensorflow.fit._progress[run].fits == fits + 1
# a job that is started again goes on from its own newest checkpoint, wherever it was told to begin
import dataclasses
first = run.layout
found = lambda resume: dtrain.tensorflow.fit.first_checkpoint(run, dtrain.tensorflow.fit.FitOptions(resume=resume))
oldest, *_, newest = run.checkpoints.steps()
assert found("never") is None and found(oldest).step == oldest
run.layout = dataclasses.replace(first, attempt=1)
assert found("never").step == found(oldest).step == newest
run.layout = first
# a resumed run that is past its warm-up keeps the rate that it had
class Lower(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 5:
            self.model.optimizer.learning_rate = 0.001
def trained(epochs):
    model = build()
    warm = dtrain.tensorflow.callbacks(run, warmup_epochs=1)
    model.fit(x, y, epochs=epochs, verbose=0, batch_size=1, callbacks=[*warm, Lower()])
    return float(np.asarray(model.optimizer.learning_rate))
for step in run.checkpoints.steps():
    import shutil
    shutil.rmtree(run.checkpoints.folder / f"step-{step:09d}")
dtrain.tensorflow.fit._progress.clear()
assert abs(trained(6) - 0.001) < 1e-8
dtrain.tensorflow.fit._progress.clear()
assert abs(trained(8) - 0.001) < 1e-8
import sys
assert "horovod" not in sys.modules
print("done")
"""


def test_refusals_and_training_alone(tmp_path: Path) -> None:
    told = run_python(tmp_path, REFUSALS)
    assert "done" in told
    assert "Saved artifact" not in told  # Keras's, of a SavedModel
    assert "cpu_feature_guard" not in told  # TensorFlow's messages at its start
