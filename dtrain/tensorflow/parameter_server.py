"""Servers and workers of a ``ParameterServerStrategy``: the one line by which a script of one's own becomes any of them."""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from dtrain import install
from dtrain.env import RankEnv
from dtrain.errors import CommunicationError, MissingDependency, RankError, UsageError
from dtrain.tensorflow.state import keras3

try:
    import tensorflow as tf
except ImportError as error:
    raise MissingDependency(f"TensorFlow is not installed ({error}); {install.TENSORFLOW} brings it") from error

logger = logging.getLogger(__name__)

USE_TF_KERAS = "Set TF_USE_LEGACY_KERAS=1 (`dtrain run --env TF_USE_LEGACY_KERAS=1 ...`), with tf_keras installed"
KERAS_3_REFUSED = (
    "Keras 3 does not work under ParameterServerStrategy: model.fit fails, and in an own loop its optimizers lose 12 to 19 % of "
    f"their steps. {USE_TF_KERAS}, or use tf.Module"
)

# Keeps the watch on variables until the process ends: it has no end of its own.
_watching = contextlib.ExitStack()


def serve_if_server() -> None:
    """Serve, and never return, when this process is a server or worker of a cluster that a chief leads; else return at once.

    To be called by every task, before anything else of TensorFlow's (after ``dtrain.init()``)::

        run = dtrain.init()
        dtrain.tensorflow.serve_if_server()
        # only the chief, the evaluator, or a process that has no cluster comes here

    A serving task ends with the job: ``dtrain run`` ends it when the chief is done. From here on, the chief's Keras 3 models
    are refused under ParameterServerStrategy: `fit` fails there, and its optimizers lose 12 to 19 % of their steps.

    Raises RankError for a TF_CONFIG that cannot be, or a cluster with servers that no chief leads, and CommunicationError
    when the task's port is taken.
    """
    task = RankEnv.read().task
    if task is None or task.role == "evaluator":
        return
    resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
    jobs = resolver.cluster_spec().as_dict()
    if "ps" not in jobs:
        return  # workers that compute together have nobody to serve
    if "chief" not in jobs:
        raise RankError(
            f"this cluster has {', '.join(sorted(jobs))} and no chief, without which ParameterServerStrategy cannot train; start "
            "it with `dtrain run --launcher parameter_server --chief`. (A TF1-style script needs no such call.)"
        )
    if task.role == "chief":
        if not _watching._exit_callbacks:  # type: ignore[attr-defined]
            _watching.enter_context(tf.variable_creator_scope(_refuse_keras_3))
        return
    if task.role == "ps":
        tf.config.set_visible_devices([], "GPU")  # it holds variables and computes nothing
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a Python handler would wait for join, which never returns
    try:
        server = tf.distribute.Server(resolver.cluster_spec(), job_name=task.role, task_index=task.index, protocol="grpc")
    except tf.errors.OpError as error:
        address = jobs[task.role][task.index]
        raise CommunicationError(f"{task} cannot listen on {address}: {error.message}; is the port taken?") from error
    logger.info("%s serves on %s", task, jobs[task.role][task.index])
    server.join()
    sys.exit(0)


def _refuse_keras_3(next_creator: Callable[..., Any], **options: Any) -> Any:
    """A creator of variables that lets none of Keras 3's come into being under ParameterServerStrategy."""
    under_servers = isinstance(tf.distribute.get_strategy(), tf.distribute.ParameterServerStrategy)
    if under_servers and keras3() is not None and _called_by("keras.src."):
        raise UsageError(KERAS_3_REFUSED)
    return next_creator(**options)


def _called_by(package: str) -> bool:
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith(package):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
