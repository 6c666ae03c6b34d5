"""What is to be done once a module has been imported, whoever imports it and whenever."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType


class AfterImport(importlib.abc.MetaPathFinder):
    """Calls a function with a module right after that was executed, and before its importer sees it.

    It only listens: who finds and loads the module is left to the other finders.
    """

    def __init__(self, then: Mapping[str, Callable[[ModuleType], None]]) -> None:
        self._then = then

    def install(self) -> None:
        """Listen from now on; modules that are loaded already are dealt with at once."""
        sys.meta_path.insert(0, self)
        for name, then in self._then.items():
            if (module := sys.modules.get(name)) is not None:
                then(module)

    def come_first(self) -> None:
        """Be asked before finders that came later: a package may put one of its own in front."""
        sys.meta_path.remove(self)
        sys.meta_path.insert(0, self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        then = self._then.get(fullname)
        if then is None:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((found for finder in others if (found := finder.find_spec(fullname, path, target))), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _LoadThen(spec.loader, then)
        return spec


class _LoadThen(importlib.abc.Loader):
    """Another loader, and what to do once it has executed the module."""

    def __init__(self, loader: importlib.abc.Loader, then: Callable[[ModuleType], None]) -> None:
        self._loader, self._then = loader, then

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._then(module)
