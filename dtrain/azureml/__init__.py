"""Control scripts and training scripts written for Azure ML's SDK v1, over dtrain's launchers, run folders and registry.

``dtrain azureml submit.py``, ``python -m dtrain.azureml submit.py``, or ``%load_ext dtrain.azureml`` in a notebook make
``import azureml.core`` and the rest resolve to this package, unless the real SDK is installed. docs/azureml.md lists the names.
"""

from __future__ import annotations

from typing import Any

from dtrain.azureml.finder import install
from dtrain.azureml.old_code import mend_chainer

__all__ = ["install", "load_ipython_extension"]


def load_ipython_extension(_shell: Any) -> None:
    """What ``%load_ext dtrain.azureml`` calls."""
    install()
    mend_chainer()
