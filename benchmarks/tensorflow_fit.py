"""One rank of a side of bench_tensorflow.py's part ``allreduce``: tensorflow_fit.py SIDE LAYERS BATCH STEPS WARM_UP FOLDER.

The model, its data and ``fit`` are the same on every side; ``horovod`` is what Horovod's documentation has one write around them,
``dtrain`` what dtrain's has, ``alone`` one process with the whole batch. Each rank writes how long the steps after the first
WARM_UP took, and a hash of its weights; rank 0 its weights.
"""

import hashlib
import json
import resource
import sys
import time
from pathlib import Path

import numpy as np
import tensorflow as tf

RANKS = 2
side, folder = sys.argv[1], Path(sys.argv[6])
layers = [int(units) for units in sys.argv[2].split("-")]
batch, steps, warm_up = (int(number) for number in sys.argv[3:6])

if side == "dtrain":
    import dtrain
    import dtrain.tensorflow

    run = dtrain.init()
    rank, size = run.rank, run.size
elif side == "horovod":
    import horovod.tensorflow.keras as hvd
    from horovod.tensorflow import broadcast_object, grouped_allreduce

    hvd.init()
    rank, size = hvd.rank(), hvd.size()
else:
    rank, size, batch = 0, 1, batch * RANKS

keras = tf.keras
assert side == "alone" or size == RANKS, f"{size} ranks"


class Clock(keras.callbacks.Callback):
    """Takes the time after everything else in a step."""

    def __init__(self):
        super().__init__()
        self._supports_tf_logs = True  # on Keras 2: a batch's metrics are not fetched for it
        self.times = []

    def on_train_batch_end(self, batch, logs=None):
        self.times.append(time.perf_counter())


class Averaged(keras.Sequential):
    """For Keras 3, on which Horovod's optimizer averages nothing: the shortest that is right."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x=x, y=y, y_pred=self(x, training=True))
        self._loss_tracker.update_state(loss, sample_weight=tf.shape(x)[0])
        gradients = tape.gradient(loss, self.trainable_weights)
        self.optimizer.apply(grouped_allreduce(gradients), self.trainable_variables)
        return self.compute_metrics(x, y, None)


def build():
    keras.utils.set_random_seed(0)
    # Smooth: relu makes more of a last bit that differs than hundreds of steps allow a check to forgive.
    hidden = [keras.layers.Dense(units, activation="tanh") for units in layers[1:-1]]
    parts = [keras.layers.Input((layers[0],)), *hidden, keras.layers.Dense(layers[-1])]
    is_keras3 = hasattr(keras, "ops")
    model = Averaged(parts) if is_keras3 and side == "horovod" else keras.Sequential(parts)
    optimizer, options = keras.optimizers.SGD(0.01), {"jit_compile": False}
    if side == "dtrain":
        optimizer = dtrain.tensorflow.DistributedOptimizer(optimizer, run)
    elif side == "horovod" and not is_keras3:
        optimizer, options = hvd.DistributedOptimizer(optimizer), {"experimental_run_tf_function": False}
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True), **options)
    return model


def own_callbacks(model):
    """What belongs to the side: everybody begins with rank 0's weights, and dtrain also watches that they stay the same."""
    if side == "dtrain":
        return dtrain.tensorflow.callbacks(run, checkpoint_every="never")
    if side == "alone":
        return []
    if hasattr(keras, "ops"):
        model.set_weights(broadcast_object(model.get_weights(), root_rank=0))
        return []
    return [hvd.callbacks.BroadcastGlobalVariablesCallback(0)]


def main():
    draw = np.random.RandomState(0)
    different = 16  # batches, repeated; the ranks' shares make those of the one process
    x = draw.rand(different, size, batch, layers[0]).astype("float32")[:, rank]
    y = draw.randint(0, layers[-1], (different, size, batch))[:, rank]
    model, clock = build(), Clock()
    began = [weight.copy() for weight in model.get_weights()]
    data = tf.data.Dataset.from_tensor_slices((x, y)).repeat()
    model.fit(data, steps_per_epoch=warm_up + steps, verbose=0, callbacks=[*own_callbacks(model), clock])
    weights = model.get_weights()
    digest = hashlib.sha256(b"".join(np.ascontiguousarray(weight).tobytes() for weight in weights)).hexdigest()
    record = {
        "steps_per_s": steps / (clock.times[-1] - clock.times[warm_up - 1]),
        "steps_ms": [round(1000 * float(value), 3) for value in np.diff(clock.times)[warm_up - 1 :]],
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "digest": digest,
        "moved": max(float(np.abs(new - old).max()) for new, old in zip(weights, began, strict=True)),
        "gradient_bytes": sum(weight.nbytes for weight in weights),
    }
    if rank == 0:
        np.savez(folder / "weights.npz", *weights)
    (folder / f"rank-{rank}.json").write_text(json.dumps(record))


main()
