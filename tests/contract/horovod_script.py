"""A script as Horovod's documentation writes one; it does not know of dtrain. ``horovod_script.py FOLDER CASE...``

Each case trains five steps of the whole batch, each rank on its share, and writes the weights of every rank to the folder.
"""

import os
import sys

import horovod.tensorflow as hvd_core
import horovod.tensorflow.keras as hvd
import numpy as np
import tensorflow as tf

keras = tf.keras
STEPS, BATCH = 5, 32


def data():
    draw = np.random.RandomState(0)
    x = draw.randn(STEPS * BATCH, 6).astype("float32")
    return x, (x @ draw.randn(6, 2) + 0.1 * draw.randn(STEPS * BATCH, 2)).astype("float32")


def share(array):
    """This rank's part of every batch, in the order of the batches."""
    parts = array.reshape(STEPS, hvd.size(), BATCH // hvd.size(), *array.shape[1:])
    return parts[:, hvd.rank()].reshape(-1, *array.shape[1:])


def dense():
    keras.utils.set_random_seed(1 + hvd.rank())  # other weights on every rank, to be overwritten
    return keras.Sequential([keras.layers.Input((6,)), keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(2)])


def sgd():
    return keras.optimizers.SGD(0.1)


def fit(model, optimizer, x, y, steps=STEPS, **options):
    model.compile(optimizer, "mse", metrics=["mae"], **options)
    callbacks = [hvd.callbacks.BroadcastGlobalVariablesCallback(0), hvd.callbacks.MetricAverageCallback()]
    history = model.fit(
        share(x), share(y), batch_size=len(share(x)) // steps, shuffle=False, epochs=1, verbose=0, callbacks=callbacks
    )
    return model, history.history["mae"][0]


def case_fit():
    model = dense()
    hvd_core.broadcast_variables(model.variables, root_rank=0)
    return fit(model, hvd.DistributedOptimizer(sgd()), *data())


def case_adam_fp16():
    model = dense()
    hvd_core.broadcast_variables(model.variables, root_rank=0)
    return fit(model, hvd.DistributedOptimizer(keras.optimizers.Adam(0.01), compression=hvd.Compression.fp16), *data())


def case_passes():
    """Two batches summed to one update: as one of twice the learning rate."""
    model = dense()
    hvd_core.broadcast_variables(model.variables, root_rank=0)
    x, y = (array[: 4 * BATCH] for array in data())
    model.compile(hvd.DistributedOptimizer(sgd(), backward_passes_per_step=2), "mse")
    mine = np.arange(4 * BATCH).reshape(4, hvd.size(), -1)[:, hvd.rank()].ravel()
    model.fit(x[mine], y[mine], batch_size=BATCH // hvd.size(), shuffle=False, verbose=0)
    return model, 0.0


def case_tape():
    model, optimizer = dense(), sgd()
    hvd_core.broadcast_variables(model.variables, root_rank=0)

    @tf.function
    def step(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x, training=True) - y))
        tape = hvd_core.DistributedGradientTape(tape)
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return loss

    x, y = (tf.constant(share(array)) for array in data())
    size = BATCH // hvd.size()
    for index in range(STEPS):
        loss = step(x[index * size : (index + 1) * size], y[index * size : (index + 1) * size])
    return model, float(hvd.allreduce(loss))


def case_embedding():
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [keras.layers.Input((3,), dtype="int32"), keras.layers.Embedding(20, 4), keras.layers.Flatten(), keras.layers.Dense(2)]
    )
    draw = np.random.RandomState(0)
    x = draw.randint(0, 20, (STEPS * BATCH, 3)).astype("int32")
    return fit(model, hvd.DistributedOptimizer(sgd()), x, draw.randn(STEPS * BATCH, 2).astype("float32"))


def case_sync_batch_norm():
    keras.utils.set_random_seed(1)
    normalized = hvd_core.SyncBatchNormalization(momentum=0.5)
    model = keras.Sequential([keras.layers.Input((6,)), keras.layers.Dense(8), normalized, keras.layers.Dense(2)])
    return fit(model, hvd.DistributedOptimizer(sgd()), *data())


def main():
    hvd.init()
    for name in sys.argv[2:]:
        model, value = globals()[f"case_{name}"]()
        weights = {str(index): weight for index, weight in enumerate(model.get_weights())}
        np.savez(os.path.join(sys.argv[1], f"{name}-{hvd.size()}-{hvd.rank()}.npz"), value=value, **weights)


main()
