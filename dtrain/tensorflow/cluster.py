"""The Trainer's parts in a TensorFlow cluster: a chief with parameter servers, workers that train together, an evaluator."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from dtrain.comm import Array
from dtrain.errors import UsageError, WorkspaceError
from dtrain.tensorflow import state
from dtrain.tensorflow.device import choose_device
from dtrain.tensorflow.fit import FORMAT, Marks, first_checkpoint
from dtrain.tensorflow.optimizer import refuse_in_cluster
from dtrain.tensorflow.parameter_server import KERAS_3_REFUSED, USE_TF_KERAS, serve_if_server
from dtrain.tensorflow.state import keras3
from dtrain.tensorflow.work import TrainOptions, Work, count_samples, show_epoch, write_model

if TYPE_CHECKING:
    from dtrain.run import Run

# What only ranks can do: Horovod's exchange, and what follows it step by step.
_OF_RANKS = ("compression", "warmup_epochs", "check_every")
_MESSAGE_BYTES = 2**31 - 2**24
"""Workers get the data within a message of Protocol Buffers, which end at 2 GiB; some is left for what surrounds it."""


def join(run: Run, work: Work) -> StrategyPart | EvaluatorPart:
    """This task's part. The server of a chief, or its worker, serves here and never returns.

    Raises UsageError for what has no effect, or cannot be, in this task's cluster.
    """
    if run.elastic:
        refuse_in_cluster(run, "dtrain.tensorflow.Trainer")
    jobs = tf.distribute.cluster_resolver.TFConfigClusterResolver().cluster_spec().as_dict()
    _check_keras("ps" in jobs)
    _check(run, work)
    together = "ps" not in jobs and run.role != "evaluator"
    computes = together or run.role == "worker"
    # Who does not compute much leaves the GPUs alone: a chief validates, and would take the memory of a worker's.
    local_rank = run.local_rank if together else run.index
    choose_device(work.options.device if computes else "cpu", run.comm, local_rank=local_rank if computes else None)
    # A cluster does not count its evaluator, which then validates; who launched it does.
    validates = work.test is not None and run.size <= sum(len(addresses) for addresses in jobs.values())
    if together:
        return WorkerPart(run, work, validates=validates)
    serve_if_server()
    if run.role == "evaluator":
        return EvaluatorPart(run, work)
    return ChiefPart(run, work, validates=validates)


def _check_keras(has_servers: bool) -> None:
    model, keras = tf.keras.Model, keras3()  # looked for once tf.keras is loaded
    if keras is not None and model is keras.Model:
        together = f"Keras 3's model.fit fails under MultiWorkerMirroredStrategy. {USE_TF_KERAS}"
        raise UsageError(KERAS_3_REFUSED if has_servers else together)


def _check(run: Run, work: Work) -> None:
    chosen = work.options
    plain = {field.name: field.default for field in fields(TrainOptions)}
    for name in _OF_RANKS:
        if getattr(chosen, name) != plain[name]:
            raise UsageError(
                f"{name}={getattr(chosen, name)!r} has no effect in a TensorFlow cluster, whose tasks exchange through "
                "tf.distribute; leave it out, or start with `dtrain run --launcher horovod`"
            )
    if work.test is not None:
        count_samples(work.test, "test")
    if run.role != "evaluator":
        return
    if work.test is None:
        raise UsageError("the evaluator has nothing to evaluate on: give the Trainer test data, or start without --evaluator")
    if chosen.checkpoint_every == "never":
        raise UsageError(
            "checkpoint_every='never' leaves nothing to the evaluator; choose a number, or start without --evaluator"
        )
    if run.size == 1:
        raise UsageError(
            "the evaluator follows its run's checkpoints, and started by hand it has a run folder of its own; start the cluster "
            "with `dtrain run --launcher parameter_server --chief --evaluator`"
        )


def _check_size(work: Work) -> None:
    """Only a chief sends data; workers without servers, and evaluators, have their own."""
    if (size := sum(np.asarray(array).nbytes for array in tf.nest.flatten(work.train))) > _MESSAGE_BYTES:
        raise UsageError(
            f"train has {size / 2**30:.1f} GiB, and the workers of a cluster take at most {_MESSAGE_BYTES / 2**30:.1f} GiB from "
            "the Trainer; in a loop of your own (dtrain.tensorflow.serve_if_server()) let each worker read its data from files"
        )


class _PlainModel:
    """A model of this process's own, by which the weights of a checkpoint, or of the servers, are evaluated and saved."""

    def __init__(self, work: Work) -> None:
        self.model = work.build()
        self._work = work

    def load(self, shared: Mapping[str, Array]) -> None:
        state.restore(self.model, shared, None)

    def evaluate(self, shared: Mapping[str, Array]) -> dict[str, float]:
        """Load, and return metrics of the whole test data, named as those of ``fit``."""
        self.load(shared)
        assert self._work.test is not None
        inputs, targets = self._work.test
        batch_size = self._work.options.batch_size
        found = self.model.evaluate(inputs, targets, batch_size=batch_size, verbose=0, callbacks=[Marks()], return_dict=True)
        return {f"val_{name}": float(value) for name, value in found.items()}


class StrategyPart:
    """Trains through a strategy; records, and where it leads, validates and saves."""

    def __init__(self, run: Run, work: Work, strategy: Any, *, validates: bool) -> None:
        self._run, self._work, self._strategy = run, work, strategy
        self._leads, self._validates = run.rank == 0, validates
        with strategy.scope():
            self.model = work.build()
        self._plain = _PlainModel(work)
        self._first_epoch = self._first_step = 0

    def run(self) -> dict[str, float]:
        work, chosen = self._work, self._work.options
        saved = first_checkpoint(self._run, chosen)
        if saved is not None:
            with self._strategy.scope():
                state.restore(self.model, saved.shared, None)
            self._first_epoch, self._first_step = int(saved.meta["epochs"]), saved.step
        history = self.model.fit(
            tf.keras.utils.experimental.DatasetCreator(self._batches),
            initial_epoch=self._first_epoch,
            epochs=chosen.epochs,
            steps_per_epoch=work.steps_per_epoch,
            callbacks=[_Epochs(self)],
            verbose=0,
        )
        return {name: values[-1] for name, values in history.history.items()}

    def save_model(self, target: Path) -> None:
        shared = self._state()
        if not self._leads:
            return
        self._plain.load(shared)
        if (problem := write_model(self._plain.model, target)) is not None:
            raise WorkspaceError(problem)

    def end_epoch(self, epochs: int, values: dict[str, Any]) -> None:
        """After so many epochs, with all their steps done: what is due, and recorded in ``values``."""
        chosen = self._work.options
        step = self._first_step + (epochs - self._first_epoch) * self._work.steps_per_epoch
        every = chosen.checkpoint_every
        saves = every != "never" and (epochs % every == 0 or epochs == chosen.epochs)  # an evaluator waits for the last one
        # On all who train together: reading what each keeps for itself (BatchNormalization's statistics) is an exchange.
        shared = self._state() if saves or self._validates else {}
        if self._leads and self._validates:
            # fit holds the scope of its strategy, in which the plain model would be computed by it; a scope is a thread's own.
            with ThreadPoolExecutor(1) as outside:
                values.update(outside.submit(self._plain.evaluate, shared).result())
        self._run.log_row(step, **values, epoch=epochs)
        if self._leads:
            show_epoch(epochs, chosen.epochs, values)
        if self._leads and saves:
            self._run.checkpoints.save(step, shared, meta={"format": FORMAT, "epochs": epochs})

    def _state(self) -> dict[str, Array]:
        with self._strategy.scope():
            return state.capture(self.model)[0]

    def _batches(self, context: Any) -> Any:
        raise NotImplementedError


class ChiefPart(StrategyPart):
    """Has its workers train on parameter servers, each for itself; only the chief comes so far."""

    def __init__(self, run: Run, work: Work, *, validates: bool) -> None:
        _check_size(work)
        resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
        super().__init__(run, work, tf.distribute.ParameterServerStrategy(resolver), validates=validates)
        # As tensors they are sent to the workers; arrays would become constants of a graph, which takes 30 s for 300 MB.
        self._train = tf.nest.map_structure(tf.constant, work.train)

    def _batches(self, context: Any) -> Any:
        """A worker's dataset, without end; called within a graph, which that worker runs.

        The order follows from the seed, the worker, the epoch of the resume and the pass over the data.
        """
        work, chosen = self._work, self._work.options
        worker = tf.cast(tf.distribute.coordinator.experimental_get_current_worker_index(), tf.int64)
        indices = tf.range(work.samples, dtype=tf.int64)
        begin = int(np.random.SeedSequence([chosen.seed, self._first_epoch]).generate_state(1, np.uint32)[0])

        def one_pass(number: Any) -> Any:
            order = tf.random.experimental.stateless_shuffle(indices, tf.stack([begin * 2**20 + worker, number]))
            return tf.data.Dataset.from_tensor_slices(order).batch(chosen.batch_size, drop_remainder=True)

        def gather(mine: Any) -> Any:
            return tf.nest.map_structure(lambda tensor: tf.gather(tensor, mine), self._train)

        return tf.data.Dataset.range(np.iinfo(np.int64).max).flat_map(one_pass).map(gather).prefetch(2)


class WorkerPart(StrategyPart):
    """One of those who train together, step by step, in a cluster without servers."""

    def __init__(self, run: Run, work: Work, *, validates: bool) -> None:
        try:
            strategy = tf.distribute.MultiWorkerMirroredStrategy()
        except RuntimeError as error:
            raise UsageError(
                f"the workers must find each other before TensorFlow computes anything ({error}); make the Trainer first"
            ) from error
        workers = strategy.num_replicas_in_sync
        if work.options.batch_size % workers:
            raise UsageError(
                f"batch_size={work.options.batch_size} cannot be shared by {workers} workers; use a multiple of {workers}"
            )
        super().__init__(run, work, strategy, validates=validates)

    def _batches(self, context: Any) -> Any:
        return self._work.batches(context.input_pipeline_id, context.num_input_pipelines, self._first_epoch)


class _Epochs(Marks):
    """Tells of an epoch's end; a chief does not even know when a single step is done."""

    def __init__(self, part: StrategyPart) -> None:
        super().__init__()
        self._part = part

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        logs = {} if logs is None else logs
        logs.update({name: float(np.asarray(value)) for name, value in logs.items() if np.size(value) == 1})
        self._part.end_epoch(epoch + 1, logs)


class EvaluatorPart:
    """Evaluates the newest checkpoint, again and again, until that of the last epoch, or the last one of a chief that is done."""

    def __init__(self, run: Run, work: Work) -> None:
        self._run, self._work = run, work
        self._plain = _PlainModel(work)
        self.model = self._plain.model

    def run(self) -> dict[str, float]:
        chosen = self._work.options
        values: dict[str, float] = {}
        # A chief that ends early (a stop that its model asks for) leaves no checkpoint of the last epoch.
        for saved in self._run.checkpoints.follow(first_checkpoint(self._run, chosen), until=self._run.is_done):
            epochs = int(saved.meta["epochs"])
            values = self._plain.evaluate(saved.shared)
            self._run.log_row(saved.step, **values, epoch=epochs)
            show_epoch(epochs, chosen.epochs, values)
            if epochs >= chosen.epochs:
                break
        return values

    def save_model(self, target: Path) -> None:
        """The chief's to do."""
