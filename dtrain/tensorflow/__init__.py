"""TensorFlow on dtrain: data-parallel training over Horovod, on Keras 3, tf_keras and Keras 2; and parameter servers.

Importing it also mends Horovod's own Keras calls, for scripts that use those: on Keras 3 they would train each rank alone,
without an error (see ``horovod_fix``); the end of synchronous workers of TensorFlow 1 (``sync_replicas``), and that of a chief
(``coordinator_end``). TensorFlow and Horovod are imported when a name below is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dtrain.env import quiet_tensorflow
from dtrain.tensorflow import coordinator_end, horovod_fix, sync_replicas

quiet_tensorflow()
horovod_fix.install()
sync_replicas.install()
coordinator_end.install()

if TYPE_CHECKING:
    from dtrain.tensorflow.device import choose_device as choose_device
    from dtrain.tensorflow.fit import FitOptions as FitOptions
    from dtrain.tensorflow.fit import callbacks as callbacks
    from dtrain.tensorflow.optimizer import DistributedGradientTape as DistributedGradientTape
    from dtrain.tensorflow.optimizer import DistributedOptimizer as DistributedOptimizer
    from dtrain.tensorflow.parameter_server import serve_if_server as serve_if_server
    from dtrain.tensorflow.trainer import Trainer as Trainer
    from dtrain.tensorflow.work import TrainOptions as TrainOptions

_EXPORTS = {
    "DistributedGradientTape": "dtrain.tensorflow.optimizer",
    "DistributedOptimizer": "dtrain.tensorflow.optimizer",
    "FitOptions": "dtrain.tensorflow.fit",
    "callbacks": "dtrain.tensorflow.fit",
    "choose_device": "dtrain.tensorflow.device",
    "serve_if_server": "dtrain.tensorflow.parameter_server",
    "Trainer": "dtrain.tensorflow.trainer",
    "TrainOptions": "dtrain.tensorflow.work",
}

__all__ = [*_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)
