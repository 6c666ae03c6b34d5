"""Batch normalisation over the batches of all ranks, for Keras 3: its own ``synchronized=True`` knows of tf.distribute only."""

from __future__ import annotations

from typing import Any

import horovod.tensorflow as hvd
import tensorflow as tf

from dtrain.tensorflow.state import keras3


def keras3_sync_batch_norm() -> Any:
    """The class, or None where ``tf.keras`` is not Keras 3: Horovod's own is right there."""
    keras = keras3()
    if keras is None or tf.keras.layers.BatchNormalization is not keras.layers.BatchNormalization:
        return None

    class SyncBatchNormalization(keras.layers.BatchNormalization):  # type: ignore[name-defined]
        """Statistics are those of the ranks' batches together, which are of equal size."""

        def __init__(self, fused: bool = False, **kwargs: Any) -> None:
            if fused in (True, None):
                raise ValueError("SyncBatchNormalization does not support fused=True.")
            super().__init__(**kwargs)

        def _moments(self, inputs: Any, mask: Any) -> tuple[Any, Any]:
            mean, variance = super()._moments(inputs, mask)
            if hvd.size() == 1:
                return mean, variance
            # The mean of squares can be averaged, a variance cannot.
            both = hvd.allreduce(tf.stack([mean, variance + tf.square(mean)]), op=hvd.Average)
            mean, square = tf.unstack(both)
            return mean, square - tf.square(mean)

    return SyncBatchNormalization
