"""Makes ``import azureml.core`` and its like resolve to dtrain's, where the real ones are not installed."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import logging
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from dtrain import __version__, switches
from dtrain.azureml import names
from dtrain.azureml.errors import TABLE, NoSuchImport, NoSuchModule, NoSuchName
from dtrain.azureml.refused import Refused, can_be_kept, refusal
from dtrain.errors import did_you_mean, nearest

logger = logging.getLogger(__name__)

_TOP = "azureml"
_IMPORTABLE = os.path.join("dtrain", "azureml", "importable")


class AzureFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds and makes the modules of :data:`names.MODULES`; their names are loaded when first asked for. What only Azure has is a
    :class:`Refused`, also a name of such a module: `from x import y` asks for ``x.y`` as for a module."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] != _TOP:
            return None
        if fullname not in names.MODULES and not can_be_kept(fullname, importer := sys._getframe(1)):
            if importer.f_back is not None and importer.f_back.f_globals.get("__name__") == "importlib.util":
                return None  # its find_spec() asks, and is answered as Python answers it; an import has more frames of importlib
            raise _no_import(fullname)
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        if spec.name not in names.MODULES:
            return Refused(spec.name)
        return _AzureModule(spec.name, f"dtrain's {spec.name}: see dtrain.azureml")

    def exec_module(self, module: ModuleType) -> None:
        """Nothing: names come when they are asked for."""


class _AzureModule(ModuleType):
    def __getattr__(self, name: str) -> Any:
        module = self.__name__
        if name == "__all__":
            asks = sys._getframe(1)  # to anything but an unguarded `import *` the names that work are told
            kept = [each for each in names.REFUSED.get(module, {}) if can_be_kept(f"{module}.{each}", asks)]
            return sorted({*names.MODULES[module], *kept})
        if name in ("VERSION", "__version__"):
            return names.SDK_VERSION + f"+dtrain{__version__}"
        if name.startswith("__"):
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        if (where := names.MODULES[module].get(name)) is not None:
            home, _, attribute = where.partition(":")
            value = getattr(importlib.import_module(home), attribute)
            setattr(self, name, value)
            return value
        if f"{module}.{name}" in names.MODULES:
            return importlib.import_module(f"{module}.{name}")
        # No ImportError, which hasattr() and pickle's search of all modules would not take for an answer; `from x import y` asks
        # the finder next, and is told the same by that.
        raise NoSuchName(_no_name(module, name))

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *names.MODULES[self.__name__]})


def _no_name(module: str, name: str) -> str:
    """What is said of a name that one of our modules has not."""
    refused = refusal(f"{module}.{name}")
    if refused is not None:
        return refused
    known = sorted(names.MODULES[module])
    below = [last for last, each in _by_last_part(module).items() if each == f"{module}.{last}"]
    near = did_you_mean(name, [*known, *names.REFUSED.get(module, {}), *below])
    return f"dtrain's {module} has no {name!r}{near}; it has {', '.join(known) or 'no names'} ({TABLE})"


def _by_last_part(parent: str) -> dict[str, str]:
    """All modules, refused ones too, by the last part of their names; of several that end so the one right below ``parent``."""
    modules = sorted({*names.MODULES, *names.REFUSED_MODULES}, key=lambda each: (each.rpartition(".")[0] == parent, each))
    return {each.rpartition(".")[2]: each for each in modules}


def _no_import(fullname: str) -> NoSuchImport:
    """The error for a module that we have not, or a name: `from x import y` asks for ``x.y`` as for a module.

    Its ``name`` is not ``fullname``: Python would drop it, and say in its own words that y cannot be imported.
    """
    parent, _, name = fullname.rpartition(".")
    if (words := refusal(fullname)) is not None:
        return NoSuchImport(words, name=parent) if name in names.REFUSED.get(parent, {}) else NoSuchModule(words, name=parent)
    if names.MODULES.get(parent):
        return NoSuchImport(_no_name(parent, name), name=parent)
    meant = _by_last_part(parent)
    near = "" if (last := nearest(name, meant)) is None else f" (did you mean {meant[last]}?)"
    return NoSuchModule(
        f"dtrain has no module {fullname!r}{near}; it has {', '.join(sorted(names.MODULES))} ({TABLE})", name=parent
    )


def real_sdk() -> str | None:
    """Where the real ``azureml.core`` is installed; None when it is not. Imports at most its empty parent package."""
    path = list(sys.path)
    sys.path[:] = without_importable(path)
    finders = [finder for finder in sys.meta_path if isinstance(finder, AzureFinder)]
    ours = {name: sys.modules.pop(name) for name in list(sys.modules) if isinstance(sys.modules[name], _AzureModule | Refused)}
    for finder in finders:
        sys.meta_path.remove(finder)
    try:
        found = importlib.util.find_spec(f"{_TOP}.core") if importlib.util.find_spec(_TOP) is not None else None
    except ImportError:
        found = None
    finally:
        sys.path[:] = path
        if finders:
            sys.meta_path[:0] = finders
            sys.modules.update(ours)
    return None if found is None else found.origin or f"{_TOP}.core"


def install(*, force: bool = False) -> bool:
    """Make ``azureml`` dtrain's in this process, in Pythons that it starts, and in its jobs. A second call does nothing.

    Where the real SDK is installed that stays, unless ``force``, and False is returned, with a warning. Also False with ``force``
    when modules of the real one are loaded already: half of each would fit together nowhere.
    """
    if any(isinstance(finder, AzureFinder) for finder in sys.meta_path):
        return True
    real = real_sdk()
    if real is not None and not force:
        logger.warning("the real azureml.core is installed (%s) and is used; --force uses dtrain's in its place", real)
        return False
    loaded = [name for name in sys.modules if name == f"{_TOP}.core" or name.startswith(f"{_TOP}.core.")]
    if loaded:
        logger.warning("the real %s is loaded already; start with `dtrain azureml --force SCRIPT` instead", loaded[0])
        return False
    sys.modules.pop(_TOP, None)
    sys.meta_path.insert(0, AzureFinder())
    os.environ.update(switches.azureml_switch(force=force))
    _reach_children()
    return True


def _reach_children() -> None:
    """Let Pythons that this process starts find our module ``azureml``: by PYTHONPATH, or multiprocessing's copy of sys.path."""
    folder = os.path.join(os.path.dirname(__file__), "importable")
    sys.path[:] = [*without_importable(sys.path), folder]
    given = os.environ.get("PYTHONPATH")
    entries = without_importable(given.split(os.pathsep)) if given else []  # an empty entry would be the current folder
    os.environ["PYTHONPATH"] = os.pathsep.join([*entries, folder])


def without_importable(path: Sequence[str]) -> list[str]:
    """The folders of a search path but those with our module ``azureml``, of this dtrain or another environment's."""
    return [folder for folder in path if not str(folder).endswith(_IMPORTABLE)]  # a script may have put a Path there
