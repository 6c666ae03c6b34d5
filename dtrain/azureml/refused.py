"""What a script gets that imports a name which only Azure has: an object that can be kept, and raises as soon as it is used.

Old scripts import at their top what they need on other paths. A script that catches the failure of an import asks by it whether
the name is there, though, and is answered: it is not.
"""

from __future__ import annotations

import ast
import itertools
import linecache
import os
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from types import FrameType, ModuleType
from typing import Any, NoReturn, Union

from dtrain.azureml import names
from dtrain.azureml.errors import TABLE, NoSuchModule, NoSuchName, UserErrorException

_NAMED = ("ImportError", "ModuleNotFoundError")
_WIDER = ("Exception", "BaseException", "")  # the last one: a bare `except:`
_IMPORTS = (ast.Import, ast.ImportFrom)
_TRIES = (ast.Try, getattr(ast, "TryStar", ast.Try))  # the second one: `except*`, of Python 3.11 on
_LIBRARIES = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
_NOT_THE_SCRIPTS = tuple(os.path.join(path, "") for path in (*_LIBRARIES, os.path.dirname(os.path.dirname(__file__))))
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
    """A name or module that only Azure has. It has a place in ``sys.modules``, and can be named, printed, copied, pickled,
    compared with None and part of an annotation.

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

    def __or__(self, other: Any) -> Any:
        return Union[self, other]  # noqa: UP007  # that would ask this very method; for `pipeline: Pipeline | None`

    def __ror__(self, other: Any) -> Any:
        return Union[other, self]  # noqa: UP007

    def __reduce__(self) -> tuple[Any, ...]:
        return _by_name, (self.__name__,)


def _by_name(fullname: str) -> ModuleType:
    """What a copy or a pickle of a :class:`Refused` comes back as: the one that was imported, where it was."""
    return sys.modules[fullname] if fullname in sys.modules else Refused(fullname)


def _words(refused: Refused) -> str:
    words = refusal(refused.__name__)
    assert words is not None
    return words


def _refuse(self: Refused, *_: Any, **__: Any) -> NoReturn:
    raise UserErrorException(_words(self))


_TYPE_USES = ("instancecheck", "subclasscheck", "mro_entries")  # the last one: class Mine(name)
_USES = ("bool", "call", "contains", "delitem", "enter", "exit", "getitem", "iter", "len", "setitem", *_TYPE_USES)
_BINARY = ("add", "and", "divmod", "floordiv", "lshift", "matmul", "mod", "mul", "pow", "rshift", "sub", "truediv", "xor")
_OTHERS = ("abs", "float", "ge", "gt", "index", "int", "invert", "le", "lt", "neg", "next", "pos")
for _use in (*_USES, *_BINARY, *(f"r{name}" for name in _BINARY), *_OTHERS):
    setattr(Refused, f"__{_use}__", _refuse)


def can_be_kept(fullname: str, importer: FrameType) -> bool:
    """Whether ``importer`` is given a :class:`Refused` of that name: where an import statement asks, and nobody catches it.

    Others are told at once: ``importlib`` and ``find_spec``, which ask by name, and a statement whose text cannot be seen.
    """
    return refusal(fullname) is not None and not _within(fullname, names.WORK_BY_IMPORT) and not _is_caught(importer)


def _within(fullname: str, modules: frozenset[str]) -> bool:
    return any(fullname == each or fullname.startswith(f"{each}.") for each in modules)


def _is_caught(frame: FrameType | None) -> bool:
    """Whether the script catches the failure of the import that ``frame`` is at: there, or at a call or import that led there.

    Around an import `except Exception` is meant for that, too; around a call ImportError has to be named.
    """
    while frame is not None and frame.f_code.co_filename in _OF_IMPORT:
        frame = frame.f_back
    if frame is None:
        return True
    here = next((path for path in _paths(frame) if isinstance(path[-1], _IMPORTS)), None)
    if here is None or _stands_in_try(here, (*_NAMED, *_WIDER), frame.f_globals):
        return True
    while (frame := frame.f_back) is not None:
        if frame.f_code.co_filename.startswith(_NOT_THE_SCRIPTS):
            continue
        path = next(_paths(frame), [])
        kinds = (*_NAMED, *_WIDER) if path and isinstance(path[-1], _IMPORTS) else _NAMED
        if _stands_in_try(path, kinds, frame.f_globals):
            return True
    return False


def _paths(frame: FrameType) -> Iterator[list[ast.AST]]:
    """The statements of the line that a frame is at, each below all that it stands in; none where there is no text."""
    try:
        tree = ast.parse("".join(linecache.getlines(frame.f_code.co_filename, frame.f_globals)))
    except (SyntaxError, ValueError):
        return iter(())
    return _statements_on(tree, frame.f_lineno, [])


def _statements_on(node: ast.AST, line: int, above: list[ast.AST]) -> Iterator[list[ast.AST]]:
    path, below = [*above, node], [each for each in ast.iter_child_nodes(node) if isinstance(each, ast.stmt | ast.ExceptHandler)]
    inside = [each for each in below if each.lineno <= line <= (each.end_lineno or each.lineno)]
    if not inside and isinstance(node, ast.stmt):
        yield path
    for each in inside:
        yield from _statements_on(each, line, path)


def _stands_in_try(path: list[ast.AST], kinds: tuple[str, ...], known: Mapping[str, Any]) -> bool:
    """Whether the last statement of ``path`` is in the body of a ``try``, or ``with suppress(...)``, for one of ``kinds``.

    ``known`` are the module's names, of which a handler may have its exceptions: ``except ERRORS:``.
    """
    for outer, inner in reversed(list(itertools.pairwise(path))):
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef):
            return False
        if isinstance(outer, _TRIES) and inner in outer.body:
            caught = [each.type for each in outer.handlers]
        elif isinstance(outer, ast.With):
            caught = [argument for each in outer.items for argument in _suppressed(each.context_expr)]
        else:
            continue
        if any(_catches(each, kinds, known) for each in caught):
            return True
    return False


def _suppressed(called: ast.expr) -> list[ast.expr]:
    return called.args if isinstance(called, ast.Call) and _last_name(called.func) == "suppress" else []


def _catches(kind: ast.expr | None, kinds: tuple[str, ...], known: Mapping[str, Any]) -> bool:
    """Whether a handler of that kind is for one of ``kinds``; None is the kind of a bare ``except:``."""
    if isinstance(kind, ast.Tuple):
        return any(_catches(each, kinds, known) for each in kind.elts)
    name = "" if kind is None else _last_name(kind)
    named = known.get(name) if isinstance(kind, ast.Name) else None
    each_of = named if isinstance(named, tuple) else (named,)
    return name in kinds or any(isinstance(each, type) and each.__name__ in kinds for each in each_of)


def _last_name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else "?"
