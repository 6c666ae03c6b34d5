"""What ``import azureml`` finds in a Python that a rank or a control script starts; it gives way to dtrain's, or the real one."""

from __future__ import annotations

import importlib
import sys

from dtrain import switches
from dtrain.azureml.finder import install, without_importable

sys.path[:] = without_importable(sys.path)
del sys.modules[__name__]
if mode := switches.azureml_mode():  # none in the ranks of a `dtrain run` without --azureml that such a process starts
    install(force=mode == "force")
importlib.import_module(__name__)  # the importer of this module is given that one
