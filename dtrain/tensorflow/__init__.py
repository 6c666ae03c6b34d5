"""TensorFlow on dtrain. TensorFlow itself is imported when a name below is first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dtrain.tensorflow.parameter_server import serve_if_server as serve_if_server

_EXPORTS = {
    "serve_if_server": "dtrain.tensorflow.parameter_server",
}

__all__ = [*_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)
