"""Chainer on dtrain. Import it before ``chainer`` and ``chainermn``: it makes them work on today's NumPy, Python and CuPy.

Chainer itself, and MPI, are imported when a name below is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dtrain.chainer import compatibility

compatibility.install()

if TYPE_CHECKING:
    from dtrain.chainer.communicator import create_communicator as create_communicator
    from dtrain.chainer.extensions import extend as extend
    from dtrain.chainer.random_state import seed_random as seed_random
    from dtrain.chainer.trainer import Trainer as Trainer

_EXPORTS = {
    "create_communicator": "dtrain.chainer.communicator",
    "extend": "dtrain.chainer.extensions",
    "seed_random": "dtrain.chainer.random_state",
    "Trainer": "dtrain.chainer.trainer",
}

__all__ = [*_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)
