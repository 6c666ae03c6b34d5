"""Distributed training: take the training script you already have, run it on many processes, keep what came out of it.

In a script::

    import dtrain
    run = dtrain.init()
    run.log("loss", 0.1, step=1)

Frameworks are plugged in by ``dtrain.chainer`` and ``dtrain.tensorflow``. Nothing heavy is imported before it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dtrain import errors as errors
    from dtrain.registry import Registry as Registry
    from dtrain.run import Run as Run
    from dtrain.run import init as init

__version__ = "0.1.0"

_WHERE = {"init": "dtrain.run", "Run": "dtrain.run", "Registry": "dtrain.registry"}

__all__ = ["Registry", "Run", "__version__", "init"]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'dtrain' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
