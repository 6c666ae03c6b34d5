"""Trains with dtrain.tensorflow: ``tensorflow_script.py FOLDER CASE...``; writes the weights of every rank to the folder."""

import os
import signal
import sys

import numpy as np

import dtrain
import dtrain.errors
import dtrain.tensorflow
from dtrain.progress import PROGRESS

# isort: split
import tensorflow as tf

keras = tf.keras
STEPS, BATCH = 5, 32
run = dtrain.init(experiment="tensorflow")


def data():
    draw = np.random.RandomState(0)
    x = draw.randn(STEPS * BATCH, 6).astype("float32")
    return x, (x @ draw.randn(6, 2) + 0.1 * draw.randn(STEPS * BATCH, 2)).astype("float32")


def share(array):
    parts = array.reshape(STEPS, run.size, BATCH // run.size, *array.shape[1:])
    return parts[:, run.rank].reshape(-1, *array.shape[1:])


def build(seed=1, dropout=0.0):
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.layers.Input((6,)),
            keras.layers.Dense(8, activation="tanh"),
            keras.layers.Dropout(dropout),
            keras.layers.Dense(2),
        ]
    )


def fit(model, optimizer, epochs=1, extra=(), metrics=("mae",), **options):
    model.compile(optimizer, "mse", metrics=list(metrics) or None)
    x, y = data()
    history = model.fit(
        share(x),
        share(y),
        batch_size=BATCH // run.size,
        shuffle=False,
        epochs=epochs,
        verbose=0,
        callbacks=[*dtrain.tensorflow.callbacks(run, **options), *extra],
    )
    return model, history.history


def case_fit():
    """Other weights on every rank before: rank 0's are everybody's."""
    optimizer = dtrain.tensorflow.DistributedOptimizer(keras.optimizers.Adam(0.01), run)
    model, history = fit(build(1 + run.rank), optimizer, checkpoint_every="never")
    assert len(set(run.comm.allgather_obj(history["mae"][0]))) == 1
    return model


def case_passes():
    """Four shares on one rank, two on each of two: one update of the whole batch, as Adam and a schedule count them."""
    x, y = data()
    first, rate = [keras.layers.Dense(4)], 0.01
    if not hasattr(keras, "ops"):
        # Keras 3's schedules count batches, whatever is accumulated; and it has Adam square the parts of a sparse gradient.
        first = [keras.layers.Embedding(20, 4), keras.layers.Flatten()]
        x, rate = np.int32(np.abs(x * 5) % 20), keras.optimizers.schedules.ExponentialDecay(0.05, 2, 0.5)

    def trained(optimizer, rows, batch_size):
        keras.utils.set_random_seed(1)
        layers = [type(layer).from_config(layer.get_config()) for layer in first]
        model = keras.Sequential([keras.layers.Input((6,), dtype=x.dtype), *layers, keras.layers.Dense(2)])
        model.compile(optimizer, "mse")
        model.fit(x[rows], y[rows], batch_size=batch_size, shuffle=False, verbose=0)
        return model

    adam = dtrain.tensorflow.DistributedOptimizer(keras.optimizers.Adam(rate), run, backward_passes_per_step=4 // run.size)
    mine = np.arange(STEPS * BATCH).reshape(-1, run.size, BATCH // 4)[:, run.rank].ravel()
    model = trained(adam, mine, BATCH // 4)
    whole = trained(keras.optimizers.Adam(rate), np.arange(STEPS * BATCH), BATCH)
    for ours, theirs in zip(model.get_weights(), whole.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
    return model


def told(action):
    try:
        action()
    except dtrain.errors.DtrainError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def case_refused():  # two ranks
    """What would be wrong, or an error of XLA's, says so in a line; also where the optimizer is made within the call."""
    wrapped = lambda **options: dtrain.tensorflow.DistributedOptimizer(keras.optimizers.SGD(0.1), run, **options)  # noqa: E731
    model = build()
    assert "XLA does not compile" in told(lambda: model.compile(wrapped(), "mse", jit_compile=True))
    optimizer = wrapped()
    again = told(lambda: dtrain.tensorflow.DistributedOptimizer(optimizer, run))
    assert "wrap an optimizer once" in again, again
    keras.mixed_precision.set_global_policy("mixed_float16")
    half = build()
    assert "cannot be accumulated" in told(lambda: half.compile(wrapped(backward_passes_per_step=2), "mse"))
    half.compile(wrapped(), "mse")
    # Rank 1 overflows: no rank may apply it, and none may wait for another.
    before = half.get_weights()
    half.fit(np.full((4, 6), 6e4 if run.rank else 1.0), np.full((4, 2), 6e4 if run.rank else 1.0), batch_size=4, verbose=0)
    assert all((a == b).all() for a, b in zip(before, half.get_weights(), strict=True))
    keras.mixed_precision.set_global_policy("float32")
    model = keras.Sequential([keras.Sequential([build(), keras.layers.BatchNormalization(synchronized=True)])])
    refused = told(lambda: fit(model, keras.optimizers.SGD(0.1)))
    assert "UsageError: layer batch_norm" in refused, refused
    assert "use horovod.tensorflow.SyncBatchNormalization" in refused, refused
    x, y = data()
    model = build()
    model.compile(wrapped(), "mse")
    few = BATCH * (2 + run.rank)
    refused = told(lambda: model.fit(x[:few], y[:few], batch_size=BATCH, verbose=0, callbacks=dtrain.tensorflow.callbacks(run)))
    assert "CommunicationError: the ranks make different numbers of steps in an epoch: 2 on rank 0, 3 on rank 1" in refused, (
        refused
    )
    assert "dataset.take(2)" in refused
    return model


def case_statistics():
    """Each rank's running statistics become their mean when training ends, though nothing is saved."""
    model = keras.Sequential([keras.layers.Input((6,)), *build().layers, keras.layers.BatchNormalization()])
    optimizer = dtrain.tensorflow.DistributedOptimizer(keras.optimizers.SGD(0.1), run)
    fit(model, optimizer, checkpoint_every="never")
    assert run.size == 1 or np.abs(model.layers[-1].moving_mean).max() > 0
    return model


def case_tape():
    model, optimizer = build(), keras.optimizers.SGD(0.1)

    @tf.function
    def step(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x, training=True) - y))
        tape = dtrain.tensorflow.DistributedGradientTape(tape, run)
        optimizer.apply_gradients(zip(tape.gradient(loss, model.trainable_variables), model.trainable_variables, strict=True))

    x, y = (tf.constant(share(array)) for array in data())
    for index in range(STEPS):
        size = BATCH // run.size
        step(x[index * size : (index + 1) * size], y[index * size : (index + 1) * size])
    before = PROGRESS.read().count
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(model(x))
    dtrain.tensorflow.DistributedGradientTape(tape, run).gradient(loss, model.trainable_variables)
    assert PROGRESS.read().count > before or run.size == 1
    return model


def case_own_loop():
    """Plain gradients given to the optimizer's apply_gradients, eagerly and in a graph."""
    model = build()
    optimizer = dtrain.tensorflow.DistributedOptimizer(keras.optimizers.SGD(0.1, momentum=0.9), run)

    def step(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x, training=True) - y))
        optimizer.apply_gradients(zip(tape.gradient(loss, model.trainable_variables), model.trainable_variables, strict=True))

    x, y = (tf.constant(share(array)) for array in data())
    graph = tf.function(step)
    for index in range(STEPS):
        size = BATCH // run.size
        (graph if index else step)(x[index * size : (index + 1) * size], y[index * size : (index + 1) * size])
    return model


def case_other_names():
    """Rank 0 has made another model and optimizer before: Keras gives its next ones other names than those of other ranks."""
    if run.rank == 0:
        build().compile(keras.optimizers.SGD(0.1), "mse")
    keras.utils.set_random_seed(1)
    layers = [keras.layers.Embedding(20, 4), keras.layers.Flatten(), keras.layers.Dense(4), keras.layers.Dense(2)]
    model = keras.Sequential([keras.layers.Input((6,), dtype="int32"), *layers])
    x, y = data()
    x, y = share(np.int32(np.abs(x * 5) % 20)), share(y)
    optimizer = dtrain.tensorflow.DistributedOptimizer(keras.optimizers.SGD(0.1), run)
    model.compile(optimizer, "mse")
    model.fit(x, y, batch_size=BATCH // run.size, shuffle=False, verbose=0)
    plain = keras.optimizers.SGD(0.1)

    @tf.function
    def step(x, y):
        for _ in range(2):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(model(x, training=True) - y))
            tape = dtrain.tensorflow.DistributedGradientTape(tape, run)
            plain.apply_gradients(zip(tape.gradient(loss, model.trainable_variables), model.trainable_variables, strict=True))

    step(tf.constant(x), tf.constant(y))
    return model


@keras.utils.register_keras_serializable("dtrain_test")
class Slow(keras.optimizers.SGD):
    """An optimizer of the user's own."""


def case_registered():
    """It is saved by the name under which the user registered it, and that loads the user's class."""
    model, _ = fit(build(), dtrain.tensorflow.DistributedOptimizer(Slow(0.1), run), checkpoint_every="never")
    saved = keras.utils.serialize_keras_object(model.optimizer)
    assert saved["registered_name"] == "dtrain_test>Slow", saved
    assert type(keras.utils.deserialize_keras_object(saved)) is Slow
    return model


class TrainStep(keras.Sequential):
    """A train_step as Keras's guide writes one."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(self(x, training=True) - y))
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        return {"mae": loss}


def case_train_step():
    model = TrainStep(build().layers)
    model.build((None, 6))
    optimizer = dtrain.tensorflow.DistributedOptimizer(keras.optimizers.Adam(0.01), run)
    return fit(model, optimizer, metrics=(), checkpoint_every="never", check_every=2)[0]


def case_warmup():
    rates = []
    optimizer = dtrain.tensorflow.DistributedOptimizer(keras.optimizers.SGD(0.1), run)
    model = build()
    seen = keras.callbacks.LambdaCallback(on_train_batch_begin=lambda batch, logs: rates.append(float(optimizer.learning_rate)))
    fit(model, optimizer, epochs=2, extra=[seen], warmup_epochs=1, checkpoint_every="never", resume="never")
    rising = [0.1 * (1 + (run.size - 1) * done / STEPS) / run.size for done in range(1, STEPS)]
    np.testing.assert_allclose(rates, [*rising, *[0.1] * (STEPS + 1)], rtol=1e-6)
    return model


class Die(keras.callbacks.Callback):
    """Kills this rank when it has begun that epoch's third batch."""

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_begin(self, batch, logs=None):
        if os.environ.get("DIE_IN_EPOCH") == str(self.epoch) and batch == 2 and run.rank == run.size - 1:
            os.kill(os.getpid(), signal.SIGKILL)


def case_resumed_fit():
    """Only the dropout of Keras 3 keeps its state in variables."""
    dropout = 0.5 if hasattr(keras, "ops") else 0.0  # which Keras 2 has not
    optimizer = dtrain.tensorflow.DistributedOptimizer(keras.optimizers.Adam(0.01), run)
    return fit(build(1 + run.rank, dropout), optimizer, epochs=4, extra=[Die()])[0]


def case_two_fits():
    """The second trains a layer more, has an optimizer, callbacks and epochs of its own, and goes on with the steps."""
    model = build(1 + run.rank)
    for epochs in (2, 3):
        model.layers[0].trainable = epochs == 3
        optimizer = dtrain.tensorflow.DistributedOptimizer(keras.optimizers.Adam(0.01), run)
        fit(model, optimizer, epochs=epochs, extra=[Die()])
    return model


def case_trainer():
    def build_model():
        model = build(1)
        model.compile(keras.optimizers.Adam(0.01), "mse", metrics=["mae"])
        return model

    x, y = data()
    trainer = dtrain.tensorflow.Trainer(build_model, (x, y), (x[:31], y[:31]), run=run, epochs=4, batch_size=BATCH)
    original = trainer.model.fit
    trainer.model.fit = lambda *args, callbacks, **kwargs: original(*args, callbacks=[*callbacks, Die()], **kwargs)
    metrics = trainer.run()
    trainer.save_model()
    loss, mae = trainer.model.evaluate(x[:31], y[:31], verbose=0)
    # 31 samples are shares of 16 and 15: weighed by them the mean is the whole's.
    np.testing.assert_allclose([metrics["val_loss"], metrics["val_mae"]], [loss, mae], rtol=1e-5)
    return trainer.model


def case_apart():
    """A plain optimizer: nobody averages."""
    return fit(build(), keras.optimizers.SGD(0.1), check_every=2)[0]


def case_shapes():
    model = keras.Sequential([keras.layers.Input((6,)), keras.layers.Dense(2 + run.rank)])
    model.compile("sgd", "mse")
    model.fit(np.zeros((4, 6)), np.zeros((4, 2 + run.rank)), verbose=0, callbacks=dtrain.tensorflow.callbacks(run))
    return model


for name in sys.argv[2:]:
    trained = globals()[f"case_{name}"]()
    arrays = {str(index): weight for index, weight in enumerate(trained.get_weights())}
    np.savez(os.path.join(sys.argv[1], f"{name}-{run.size}-{run.rank}.npz"), **arrays)
