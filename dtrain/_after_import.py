"""What is to be done once a module has been imported, whoever imports it and whenever."""

from __future__ import annotations

import importlib.machinery
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.abc import Loader, MetaPathFinder
else:  # importlib.abc takes 6 ms to import, in every rank; nothing asks for the classes
    Loader = MetaPathFinder = object


class AfterImport(MetaPathFinder):
    """Calls a function with a module right after that was executed, and before its importer sees it.

    It only listens: who finds and loads the module is left to the other finders.
    """

    def __init__(self, then: Mapping[str, Callable[[ModuleType], None]]) -> None:
        self._then = then
        self._asking: set[tuple[str, int]] = set()

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
        question = (fullname, threading.get_ident())
        if then is None or question in self._asking:  # asked by another one of our kind, which we are asking
            return None
        self._asking.add(question)
        try:
            finders = [finder.find_spec for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
            spec = next((found for find in finders if (found := find(fullname, path, target))), None)
        finally:
            self._asking.discard(question)
        if spec is not None and spec.loader is not None:
            spec.loader = _LoadThen(spec.loader, then)
        return spec


class _LoadThen(Loader):
    """Another loader, and what to do once it has executed the module.

    The module never sees this one; who only looks for its loader finds all that the other one can do.
    """

    def __init__(self, loader: Loader, then: Callable[[ModuleType], None]) -> None:
        self._loader, self._then = loader, then

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._then(module)
