"""Distributed training of a Keras model, assembled: device, data, updates, validation, record, checkpoints, resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtrain.tensorflow import cluster
from dtrain.tensorflow.ranks import RankPart
from dtrain.tensorflow.work import Work, check_model_path, train_options

if TYPE_CHECKING:
    from dtrain.run import Run


class Trainer:
    """Trains a Keras model on all ranks of ``run``, or on the parameter servers and workers of its cluster.

    ``build_model()`` returns a compiled Keras model; it is called after the device is chosen and the random generators are
    seeded. ``train`` and ``test`` (or None) are pairs (inputs, targets) of arrays, or of structures of arrays, that every
    process has whole. The options are those of :class:`dtrain.tensorflow.TrainOptions`, as keywords: ``epochs`` and
    ``batch_size`` must be given. Every process makes one, with the same arguments.

    *Ranks* train as one process would: the same seed and batch size give the same weights. Making a Trainer is collective. A
    step is a batch of ``batch_size`` samples of all ranks together. An epoch is as many whole batches as the samples make, in a
    new order each time; what is left over is left out. Dropout draws differently on every rank.

    *A cluster with parameter servers* (``dtrain run --launcher parameter_server --chief``) trains asynchronously: a step is one
    worker's batch of ``batch_size`` samples, applied to the weights on the servers as soon as it is done, with gradients of
    weights that may be some steps old. So more workers make more steps a second, not larger ones, and no run repeats another.
    Servers and workers stay in the constructor until the job ends. The chief goes on: an epoch is as many steps as whole
    batches the samples make, whoever computes them. Each worker draws from all samples in an order of its own, so that
    in one epoch some are seen twice and others not at all, and none is lost with a worker. After each epoch the chief validates
    and records; in a job with an evaluator that validates instead, the newest checkpoint each time.

    *Workers without servers* (``--launcher multi_worker``) train in step, as ranks do; worker 0 (or a chief) validates.

    In clusters Keras is tf_keras or Keras 2.
    """

    def __init__(self, build_model: Callable[[], Any], train: Any, test: Any | None = None, *, run: Run, **options: Any) -> None:
        work = Work(build_model, train, test, train_options(options))
        self._run = run
        self._part = RankPart(run, work) if run.role == "rank" else cluster.join(run, work)
        self.model = self._part.model
        """The Keras model; on ranks with a distributed optimizer, on a chief with its variables on the servers."""

    def run(self) -> dict[str, float]:
        """Train to the end, from the checkpoint if there is one to resume; return the last epoch's metrics. Collective, once.

        An evaluator follows, and returns what the last epoch's checkpoint was worth, or the last of a chief that is done.
        """
        return self._part.run()

    def save_model(self, path: str | Path = "model.keras") -> Path:
        """Write the model, whole or not at all. Collective; returns the path.

        A relative path is inside the run's outputs. A name that ends with ``.keras`` or ``.h5`` is for
        ``keras.models.load_model``; without an ending it is a SavedModel folder, for ``tf.saved_model.load`` and servers (of
        Keras 3: of inference alone, its ``Model.export``). What is there already is replaced. Rank 0 writes. What is saved is a
        plain Keras model; loading it needs neither Horovod, nor a cluster, nor dtrain. Raises UsageError for another ending,
        WorkspaceError on all ranks when the model cannot be saved.
        """
        check_model_path(path)
        target = self._run.outputs / path
        self._part.save_model(target)
        return target
