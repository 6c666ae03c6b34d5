"""The table of names in docs/azureml.md, made of the code.

``python -c 'from dtrain.azureml.table import table; print(table())'`` prints it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator

from dtrain.azureml import names
from dtrain.azureml.errors import Named, members_of


def table() -> str:
    """All names as Markdown: modules first, then the members of their classes."""
    lines = ["| name | | |", "|---|---|---|"]
    lines += [f"| {_code(name)} | {state} | {note} |" for name, state, note in rows()]
    return "\n".join(lines)


def rows() -> Iterator[tuple[str, str, str]]:
    """(name, ``works`` or ``works differently`` or ``refused``, how or what to use instead)."""
    classes: dict[type, str] = {}
    for module in sorted({*names.MODULES, *names.REFUSED_MODULES}):
        if module in names.REFUSED_MODULES:
            yield module, "refused", names.REFUSED_MODULES[module]
            continue
        known, refused = names.MODULES[module], names.REFUSED.get(module, {})
        for name in sorted({*known, *refused}):
            full = f"{module}.{name}"
            if name in refused:
                yield full, "refused", refused[name]
                continue
            home, _, attribute = known[name].partition(":")
            found = getattr(importlib.import_module(home), attribute)
            first = classes.setdefault(found, full) if isinstance(found, type) else full
            yield full, "works", "" if first == full else f"the same as {_code(first)}"
    homes = {cls.__module__ for cls in classes}
    bases = {base for cls in classes for base in cls.__mro__}
    parts = {cls for cls in subclasses(Named) - bases if cls.__module__ in homes and not cls.__name__.startswith("_")}
    for cls in sorted({*classes, *parts}, key=lambda each: each.__name__):
        if issubclass(cls, Named):
            yield from _members(cls)


def subclasses(cls: type) -> set[type]:
    """Those of a class, and theirs: also classes that no module of the SDK names, and whose objects are attributes of others."""
    children: list[type] = cls.__subclasses__()
    return {each for child in children for each in (child, *subclasses(child))}


def _members(cls: type[Named]) -> Iterator[tuple[str, str, str]]:
    base = cls.__mro__[1]
    shown: type[Named] = base if base.__name__ in ("ComputeTarget", "Estimator", "HyperDriveConfig", "Run") else Named
    own = [name for name in members_of(cls) if name not in members_of(shown) or name in vars(cls)]
    refused = {name: why for name, why in cls._refused.items() if shown._refused.get(name) != why}
    differs = {name: how for name, how in cls._differs.items() if shown._differs.get(name) != how}
    for name in sorted({*own, *(f"({option}=)" for option in cls._options), *refused, *differs}):
        full = f"{cls.__name__}{name}" if name.startswith("(") else f"{cls.__name__}.{name}"
        if name in refused:
            yield full, "refused", refused[name]
        elif name in differs:
            yield full, "works differently", differs[name]
        else:
            yield full, "works", ""


def _code(text: str) -> str:
    return f"`{text}`"
