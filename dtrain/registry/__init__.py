"""Models under ``name:version``, kept in a content-addressed store of files that is shared and never rewritten.

Registering needs a run that ended; pulling and verifying need nothing but reading rights. No function here takes a lock.
"""

from __future__ import annotations

from dtrain.registry.records import ModelFile, ModelVersion, Problem
from dtrain.registry.registry import Registry

__all__ = ["ModelFile", "ModelVersion", "Problem", "Registry"]
