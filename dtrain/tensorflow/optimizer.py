"""For ``fit``, or a loop of one's own: an optimizer and a tape that average gradients over the ranks of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dtrain import install
from dtrain.env import other_world
from dtrain.errors import MissingDependency, UsageError
from dtrain.progress import PROGRESS

if TYPE_CHECKING:
    from dtrain.run import Run

COMPRESSIONS = ("none", "fp16")


def refuse_in_cluster(run: Run, what: str) -> None:
    """Raise UsageError in a task of a TensorFlow cluster: those exchange through tf.distribute, and Horovod knows none; and in a
    worker of an elastic job: what a rank agrees on with the others when it begins, one that joins later would wait for."""
    if run.elastic:
        raise UsageError(
            f"{what} is for ranks that stay, and this is an elastic job: use hvd.elastic.run, its State, and "
            "hvd.DistributedOptimizer or hvd.DistributedGradientTape of horovod.tensorflow"
        )
    if run.role != "rank":
        raise UsageError(
            f"{what} averages over ranks by Horovod, and this is {run.role} {run.index} of a TensorFlow cluster, whose tasks "
            "exchange through tf.distribute: use its strategy, or start with `dtrain run --launcher horovod`"
        )


def start_horovod(run: Run) -> Any:
    """Return ``horovod.tensorflow``, started, with the ranks of ``run``. Collective.

    Raises MissingDependency without Horovod, RankError when it sees other ranks than the run.
    """
    try:
        import horovod.tensorflow as hvd
    except ImportError as error:
        raise MissingDependency(f"{run.size} ranks average by Horovod ({error}); run: {install.HOROVOD}") from error
    hvd.init()
    if (hvd.size(), hvd.rank()) != (run.size, run.rank):
        raise other_world(run.size, hvd.size(), "Horovod")
    return hvd


def DistributedOptimizer(
    optimizer: Any,
    run: Run,
    *,
    compression: str = "none",
    backward_passes_per_step: int = 1,
    sparse_as_dense: bool = False,
) -> Any:
    """Make ``optimizer`` (of Keras 2, tf_keras or Keras 3) apply the mean of all ranks' gradients; changes it, and returns it.

    All ranks make one; then each update is collective, whichever way the gradients come: ``fit``, ``minimize``, or
    ``apply_gradients`` in a ``train_step`` or a loop of one's own. Those of a DistributedGradientTape are averaged once more, to
    the same. With Keras 2 ``apply_gradients(..., skip_gradients_aggregation=True)`` applies what it is given.

    ``compression="fp16"`` halves what travels. With ``backward_passes_per_step`` above 1, gradients of so many batches are
    averaged on each rank before the ranks exchange and update: as one update of so many times the batch; those of embeddings
    become dense then. Learning-rate schedules count updates, but on Keras 3 batches, as its ``gradient_accumulation_steps``
    has it. Sparse gradients (of embeddings) travel as what they are, unless ``sparse_as_dense``. XLA
    (``jit_compile=True``), and accumulation where the loss is scaled (mixed_float16), are refused. For one rank without
    accumulation nothing is changed. An optimizer of TensorFlow 1 gets Horovod's wrapper, which averages in ``minimize`` and
    ``compute_gradients`` only.
    """
    _check(compression, backward_passes_per_step)
    refuse_in_cluster(run, "DistributedOptimizer")
    if run.size == 1 and backward_passes_per_step == 1:
        return optimizer
    if run.size == 1 and hasattr(optimizer, "gradient_accumulation_steps") and not hasattr(optimizer, "inner_optimizer"):
        optimizer.gradient_accumulation_steps = backward_passes_per_step
        return optimizer
    hvd = start_horovod(run)
    from dtrain.tensorflow import averaging, averaging_keras2

    chosen = getattr(hvd.Compression, compression)
    reduction = averaging.Reduction(compression=chosen, sparse_as_dense=sparse_as_dense)
    if averaging.is_keras3_optimizer(optimizer):
        return averaging.distribute(optimizer, reduction, backward_passes=backward_passes_per_step)
    if averaging_keras2.is_keras2_optimizer(optimizer) and hvd._executing_eagerly():
        return averaging_keras2.distribute(optimizer, reduction, backward_passes=backward_passes_per_step)
    # Of TensorFlow 1, or in its graphs.
    return hvd.DistributedOptimizer(
        optimizer,
        compression=chosen,
        backward_passes_per_step=backward_passes_per_step,
        average_aggregated_gradients=backward_passes_per_step > 1,
        sparse_as_dense=sparse_as_dense,
    )


def DistributedGradientTape(tape: Any, run: Run, *, compression: str = "none", sparse_as_dense: bool = False) -> Any:
    """Wrap a ``tf.GradientTape`` so that ``gradient`` returns the mean of all ranks' gradients; its sources are a flat list.

    With a plain optimizer: a DistributedOptimizer would exchange them once more. An eager call is progress. Within a
    ``tf.function`` ``gradient`` is only traced: a loop of steps in graphs should call ``run.log`` now and then, or it is taken
    for hung.
    """
    _check(compression, 1)
    refuse_in_cluster(run, "DistributedGradientTape")
    if run.size == 1:
        return tape
    hvd = start_horovod(run)
    from dtrain.tensorflow import averaging

    reduction = averaging.Reduction(
        compression=getattr(hvd.Compression, compression), sparse_as_dense=sparse_as_dense, name="tape"
    )
    made = hvd.DistributedGradientTape(tape)
    # In one exchange, and by names of ours.
    made._allreduce_grads = lambda gradients, *_: reduction(gradients)
    gradient = made.gradient

    def marked(*args: Any, **kwargs: Any) -> Any:
        found = gradient(*args, **kwargs)
        PROGRESS.mark()
        return found

    made.gradient = marked
    return made


def _check(compression: str, backward_passes_per_step: int) -> None:
    if compression not in COMPRESSIONS:
        raise UsageError(f"compression={compression!r} is not known; choose one of {', '.join(COMPRESSIONS)}")
    if not isinstance(backward_passes_per_step, int) or backward_passes_per_step < 1:
        raise UsageError(f"backward_passes_per_step={backward_passes_per_step!r} is not allowed; use a whole number, at least 1")
