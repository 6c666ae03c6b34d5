"""What a script gets that imports a name which only Azure has: an object that can be kept, and raises as soon as it is used.

Old scripts import at their top what they need on other paths. A script that catches the failure of an import asks by it whether
the name is there, though, and is answered: it is not.
"""

from __future__ import annotations

import ast
import itertools
import linecache
from collections.abc import Iterator
from types import FrameType, ModuleType
from typing import Any, NoReturn

from dtrain.azureml import names
from dtrain.azureml.errors import TABLE, NoSuchModule, NoSuchName, UserErrorException

_CATCHES = ("ImportError", "ModuleNotFoundError", "Exception", "BaseException")
_OF_IMPORT = ("<frozen importlib._bootstrap>", "<frozen importlib._bootstrap_external>")


def refusal(fullname: str) -> str | None:
    """What is said of a name or module that only Azure has, and of all that is below such a module; None for others."""
    parent, _, name = fullname.rpartition(".")
    parts = fullname.split(".")
    above = (".".join(parts[:count]) for count in range(len(parts), 1, -1))
    reason = next((names.REFUSED_MODULES[each] for each in above if each in names.REFUSED_MODULES), None)
    reason = reason or names.REFUSED.get(parent, {}).get(name)
    return None if reason is None else f"{fullname} is not available without Azure: {reason} ({TABLE})"


class Refused(ModuleType):
    """A name or module that only Azure has. It has a place in ``sys.modules``, and can be named, printed and compared with None.

    All else raises: an attribute NoSuchName, the rest UserErrorException, with the words of :func:`refusal`.
    """

    def __getattr__(self, name: str) -> NoReturn:
        if name == "__all__":  # `from x import *`: no AttributeError, of which Python would make "no names at all"
            raise NoSuchModule(f"{_words(self)}: import * gives no names of it", name=self.__name__)
        if name.startswith("__") or name.startswith(("_repr_", "_ipython_")):  # what Python, and a notebook, ask anything for
            raise AttributeError(f"{self!r} has no attribute {name!r}")
        raise NoSuchName(_words(self))

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("__") and not isinstance(value, Refused):  # which are set by the import of what is below
            raise NoSuchName(_words(self))
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        return f"<{self.__name__}: not available without Azure>"


def _words(refused: Refused) -> str:
    words = refusal(refused.__name__)
    assert words is not None
    return words


def _refuse(self: Refused, *_: Any, **__: Any) -> NoReturn:
    raise UserErrorException(_words(self))


_TYPE_USES = ("instancecheck", "subclasscheck", "mro_entries")  # the last one: class Mine(name)
_USES = ("bool", "call", "contains", "delitem", "enter", "exit", "getitem", "iter", "len", "setitem", *_TYPE_USES)
for _use in _USES:
    setattr(Refused, f"__{_use}__", _refuse)


def can_be_kept(fullname: str, importer: FrameType) -> bool:
    """Whether ``importer`` is given a :class:`Refused` of that name: where an import statement asks, and nobody catches it.

    Others are told at once: ``importlib`` and ``find_spec``, which ask by name, and a statement whose text cannot be seen.
    """
    return refusal(fullname) is not None and not _within(fullname, names.WORK_BY_IMPORT) and not _is_caught(importer)


def _within(fullname: str, modules: frozenset[str]) -> bool:
    return any(fullname == each or fullname.startswith(f"{each}.") for each in modules)


def _is_caught(frame: FrameType | None) -> bool:
    """Whether the import that ``frame`` is at stands in a ``try`` that catches its failure, or an import that led to it does."""
    frame, first = _out_of_importlib(frame), True
    while frame is not None:
        path = _import_at(frame)
        if path is None:
            return first
        if _stands_in_try(path):
            return True
        if frame.f_code.co_name != "<module>":
            return False
        frame, first = _out_of_importlib(frame.f_back), False
    return False


def _out_of_importlib(frame: FrameType | None) -> FrameType | None:
    while frame is not None and frame.f_code.co_filename in _OF_IMPORT:
        frame = frame.f_back
    return frame


def _import_at(frame: FrameType) -> list[ast.AST] | None:
    """The import statement that a frame is at, below all that it stands in; None for another statement, or one without a text."""
    try:
        tree = ast.parse("".join(linecache.getlines(frame.f_code.co_filename, frame.f_globals)))
    except (SyntaxError, ValueError):
        return None
    return next(_imports_on(tree, frame.f_lineno, []), None)


def _imports_on(node: ast.AST, line: int, above: list[ast.AST]) -> Iterator[list[ast.AST]]:
    path = [*above, node]
    if isinstance(node, ast.Import | ast.ImportFrom):
        if node.lineno <= line <= (node.end_lineno or node.lineno):
            yield path
        return
    for child in ast.iter_child_nodes(node):
        yield from _imports_on(child, line, path)


def _stands_in_try(path: list[ast.AST]) -> bool:
    """Whether the last statement of ``path`` is in the body of a ``try`` or ``with suppress(...)`` that catches ImportError."""
    for outer, inner in reversed(list(itertools.pairwise(path))):
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return False
        if isinstance(outer, ast.Try) and inner in outer.body and any(_catches(each.type) for each in outer.handlers):
            return True
        if isinstance(outer, ast.With) and any(_suppresses(each.context_expr) for each in outer.items):
            return True
    return False


def _suppresses(called: ast.expr) -> bool:
    return isinstance(called, ast.Call) and _last_name(called.func) == "suppress" and any(map(_catches, called.args))


def _catches(kind: ast.expr | None) -> bool:
    """Whether a handler of that kind hears of an ImportError; None: of everything."""
    if isinstance(kind, ast.Tuple):
        return any(map(_catches, kind.elts))
    return kind is None or _last_name(kind) in _CATCHES


def _last_name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
