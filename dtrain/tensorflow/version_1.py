"""TensorFlow 1's names, with v2 behaviour off: what ``import tensorflow as tf`` gives to scripts of ``dtrain run --tf1``."""

from __future__ import annotations

import importlib.util
import os

if importlib.util.find_spec("tf_keras") is not None:
    os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")  # tf.layers needs the Keras of that time

import tensorflow.compat.v1 as tf

tf.disable_v2_behavior()

__all__ = ["tf"]
