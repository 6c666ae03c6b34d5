"""Scripts that use Horovod and know nothing of dtrain, started by ``dtrain run --launcher horovod``."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.contract.tensorflow_ranks import HERE, KERAS, assert_close, dtrain_run, run_python, weights

SCRIPT = str(HERE / "horovod_script.py")

pytestmark = [pytest.mark.needs("horovod", "tensorflow", "mpi"), pytest.mark.timeout(300)]

# Sums of float32 in another order differ in their last bits: 6e-8 was seen after five steps with SGD and weights of about 1. fp16
# has 11 bits, so gradients differ by 5e-4 of themselves, which five steps of Adam with 0.01 make less than 1e-4: 2e-5 was seen.
# Ranks that train alone are 1e-2 and more apart.
TOLERANCES = {"fit": 1e-6, "tape": 1e-6, "passes": 1e-6, "embedding": 1e-6, "sync_batch_norm": 1e-5, "adam_fp16": 2e-4}


@pytest.mark.parametrize("keras", KERAS)
def test_same_weights_on_all_ranks_and_as_one_process(tmp_path: Path, keras: str) -> None:
    for ranks in (1, 2):
        done = dtrain_run(tmp_path, ranks, SCRIPT, str(tmp_path), *TOLERANCES, **KERAS[keras])
        assert done.returncode == 0, done.stdout + done.stderr
    for case, tolerance in TOLERANCES.items():
        alone, first, second = (weights(tmp_path, case, *which) for which in ((1, 0), (2, 0), (2, 1)))
        # Each rank keeps batch statistics of its own, unless they are synchronised.
        assert_close(first, second, 0, f"{case}, rank 0 and rank 1")
        assert_close(alone, first, tolerance, f"{case}, one process and two")


DIFFERENT = """
import sys
import horovod.tensorflow.keras as hvd
import numpy as np
import tensorflow as tf
hvd.init()
keras = tf.keras
units = 3 + (hvd.rank() if sys.argv[1] == "shape" else 0)
layers = 1 + (hvd.rank() if sys.argv[1] == "count" else 0)
model = keras.Sequential([keras.layers.Input((3,)), *(keras.layers.Dense(units) for _ in range(layers)), keras.layers.Dense(1)])
model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD()), "mse")
model.fit(np.zeros((4, 3)), np.zeros((4, 1)), verbose=0)
"""


@pytest.mark.parametrize(
    ("difference", "words"),
    [
        ("shape", "trainable variable 0 is kernel (3, 3) float32 on rank 0 and kernel (3, 4) float32 on rank 1"),
        ("count", "rank 0 has 4 trainable variables, rank 1 has 6"),
    ],
)
def test_models_that_differ_are_named_and_nobody_waits(tmp_path: Path, difference: str, words: str) -> None:
    (tmp_path / "different.py").write_text(DIFFERENT)
    done = dtrain_run(tmp_path, 2, "--source", ".", "different.py", difference)
    assert done.returncode == 1
    assert words in done.stderr, done.stderr


LEAVES = """
import sys
import horovod.tensorflow.keras as hvd
import numpy as np
import tensorflow as tf
hvd.init()
if sys.argv[1] == "exits":
    for step in range(10**4):
        hvd.allreduce(tf.ones(3), name="gradients")
        if step == 3 and hvd.rank() == 1:
            sys.exit(0)
model = tf.keras.Sequential([tf.keras.layers.Input((3,)), tf.keras.layers.Dense(1)])
model.compile(hvd.DistributedOptimizer(tf.keras.optimizers.SGD()), "mse")
samples = 8 if hvd.rank() == 1 else 80_000
model.fit(np.zeros((samples, 3)), np.zeros((samples, 1)), batch_size=2, verbose=0)
"""


@pytest.mark.parametrize(("controller", "how"), [("mpi", "exits"), ("gloo", "has fewer steps")])
def test_a_rank_that_leaves_while_others_exchange_is_the_first(tmp_path: Path, controller: str, how: str) -> None:
    """Horovod shuts down in the others, whose exceptions come before its end; that of `fit` has the reason in a later line."""
    (tmp_path / "leaves.py").write_text(LEAVES)
    done = dtrain_run(tmp_path, 2, "--controller", controller, "--source", ".", "leaves.py", how)
    assert done.returncode == 1
    left = "rank 1 on {0}: left with exit code 0 while others still needed it; then rank 0 on {0}: Horovod has been shut down"
    assert f"first to fail was {left.format(os.uname().nodename)}\n" in done.stderr, done.stderr


STALLED = """
import time
import horovod.tensorflow as hvd
import tensorflow as tf
hvd.init()
if hvd.rank() == 1:
    time.sleep(300)
hvd.allreduce(tf.ones(3), name="gradients_of_layer_1")
"""


def test_a_stall_ends_and_says_what_was_waited_for(tmp_path: Path) -> None:
    (tmp_path / "stalled.py").write_text(STALLED)
    short = {"HOROVOD_STALL_CHECK_TIME_SECONDS": "1", "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "2"}
    done = dtrain_run(tmp_path, 2, "--source", ".", "stalled.py", **short)
    assert done.returncode != 0
    assert "gradients_of_layer_1" in done.stdout + done.stderr


REFUSED = """
import horovod.keras
import horovod.tensorflow.keras as hvd
import numpy as np
import tensorflow as tf
hvd.init()
keras = tf.keras
def told(action):
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
def model(optimizer, **options):
    made = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(1)])
    made.compile(optimizer, "mse", **options)
    return made
def warm(momentum, **options):
    warmup = hvd.callbacks.LearningRateWarmupCallback(0.2, warmup_epochs=2, verbose=1, **options)
    made = model(hvd.DistributedOptimizer(keras.optimizers.SGD(0.2, momentum=momentum)))
    rates = []
    seen = keras.callbacks.LambdaCallback(on_batch_begin=lambda batch, logs: rates.append(float(made.optimizer.learning_rate)))
    made.fit(np.zeros((8, 3)), np.zeros((8, 1)), batch_size=2, epochs=3, verbose=0, callbacks=[warmup, seen])
    np.testing.assert_allclose(rates, [0.2 / hvd.size() * (min(e, 8) / 4 * (hvd.size() - 1) / 2 + 1) for e in range(1, 9)]
                               + [0.2] * 4, rtol=1e-6)
if [int(part) for part in tf.__version__.split(".")[:2]] >= [2, 16]:
    assert "hvd.load_model does not work with the Keras of" in told(lambda: hvd.load_model("m.keras"))
print("told", told(lambda: warm(0.9)))
warm(0.0)
warm(0.9, momentum_correction=False)
# A partial tape divides what stays local by the number of ranks, as Horovod has it, and averages the other layer's gradients.
local, shared = keras.layers.Dense(1, use_bias=False), keras.layers.Dense(1, use_bias=False)
for layer in (local, shared):
    layer.build((None, 3))
x = tf.fill([2, 3], hvd.rank() + 1.0)
with tf.GradientTape() as plain:
    total = tf.reduce_sum(local(x) + shared(x))
tape = horovod.tensorflow.PartialDistributedGradientTape(plain, local_layers=[local])
ours, mean = (gradient.numpy().ravel().tolist() for gradient in
              tape.gradient(total, [local.trainable_weights[0], shared.trainable_weights[0]]))
assert (ours, mean) == ([hvd.rank() + 1.0] * 3, [3.0] * 3), (ours, mean)
partial = lambda: horovod.keras.PartialDistributedOptimizer(keras.optimizers.SGD(), local_layers=[local])
state = lambda: hvd.elastic.KerasState(model(keras.optimizers.SGD())).save()
if getattr(keras, "__version__", "2")[0] == "3":
    assert "use hvd.PartialDistributedGradientTape" in told(partial)
    assert "KerasState does not work with Keras 3" in told(state)
    assert "XLA does not compile" in told(lambda: model(hvd.DistributedOptimizer(keras.optimizers.SGD()), jit_compile=True))
    twice = hvd.DistributedOptimizer(keras.optimizers.SGD())
    assert "wrap an optimizer once" in told(lambda: hvd.DistributedOptimizer(twice))
    old = model(twice, experimental_run_tf_function=False)
    old.fit(np.ones((4, 3)), np.ones((4, 1)), verbose=0)
    if hvd.rank() == 0:
        old.save("saved.keras")
        plain = keras.models.load_model("saved.keras")
        assert type(plain.optimizer) is keras.optimizers.SGD
    scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())
    assert "cannot be accumulated" in told(lambda: hvd.DistributedOptimizer(scaled, backward_passes_per_step=2))
    keras.mixed_precision.set_global_policy("mixed_float16")
    sgd = keras.optimizers.SGD()
    assert "cannot be accumulated" in told(lambda: model(hvd.DistributedOptimizer(sgd, backward_passes_per_step=2)))
    half = model(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)))
    scaler = half.optimizer
    assert type(scaler).__name__ == "LossScaleOptimizer" and type(scaler.inner_optimizer) is keras.optimizers.SGD
    # rank 1 overflows in its first step: no rank may apply it, and none may wait for another
    before = half.get_weights()
    half.fit(np.full((4, 3), 6e4 if hvd.rank() == 1 else 1.0), np.zeros((4, 1)), batch_size=4, verbose=0)
    assert all((a == b).all() for a, b in zip(before, half.get_weights())), (before, half.get_weights())
else:
    assert told(partial) is None and told(state) is None
"""


@pytest.mark.parametrize("keras", KERAS)
def test_what_is_refused_says_what_to_use_and_what_is_not_works(tmp_path: Path, keras: str) -> None:
    (tmp_path / "refused.py").write_text(REFUSED)
    done = dtrain_run(tmp_path, 2, "--source", ".", "refused.py", **KERAS[keras])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "pass momentum_correction=False" in done.stdout
    assert "finished gradual learning rate warmup to 0.2." in done.stdout


TENSORFLOW_1 = """
import horovod.tensorflow as hvd
import tensorflow as tf
hvd.init()
w = tf.get_variable("w", [2], initializer=tf.constant_initializer(hvd.rank() + 1.0))
step = tf.train.get_or_create_global_step()
optimizer = hvd.DistributedOptimizer(tf.train.GradientDescentOptimizer(0.1))
train = optimizer.minimize(tf.reduce_sum(tf.square(w - 4.0 * hvd.rank())), global_step=step)
with tf.train.MonitoredTrainingSession(hooks=[hvd.BroadcastGlobalVariablesHook(0)]) as session:
    before = session.run(w)
    session.run(train)
    print("from", before, "to", session.run(w))
"""


def test_a_script_of_tensorflow_1_broadcasts_its_variables(tmp_path: Path) -> None:
    """By the hook of Horovod's own samples. The losses of ranks 0 and 1 have the gradients 2 and -6 at rank 0's variable, 1."""
    (tmp_path / "train.py").write_text(TENSORFLOW_1)
    done = dtrain_run(tmp_path, 2, "--source", ".", "--tf1", "train.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("from [1. 1.] to [1.2 1.2]") == 2


def test_one_rank_needs_no_mpirun(tmp_path: Path) -> None:
    """Which elsewhere says where MPI's library lies."""
    (tmp_path / "alone.py").write_text("import horovod.tensorflow as hvd\nhvd.init()\nprint('of', hvd.size())\n")
    done = run_python(tmp_path, "-m", "dtrain.cli", "run", "--launcher", "local", "alone.py", LD_LIBRARY_PATH="")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "of 1" in done.stdout
