"""The SDK's exceptions, as far as its documents name them, and how a name that we do not have is answered.

All are :class:`dtrain.errors.DtrainError` too. The names of the SDK's own hierarchy are kept, so that ``except`` clauses work.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from dtrain.errors import DtrainError, did_you_mean, nearest

TABLE = "docs/azureml.md lists every name"


class AzureMLException(DtrainError):
    """Base of all of them; ``message`` is the text."""

    @property
    def message(self) -> str:
        return str(self)


class UserErrorException(AzureMLException):
    exit_code = 2


class WorkspaceException(AzureMLException):
    exit_code = 2


class ProjectSystemException(WorkspaceException):
    pass


class ComputeTargetException(AzureMLException):
    pass


class ExperimentException(AzureMLException):
    pass


class ExperimentExecutionException(AzureMLException):
    pass


class TrainingException(AzureMLException):
    pass


class RunConfigurationException(AzureMLException):
    exit_code = 2


class RunEnvironmentException(AzureMLException):
    """``Run.get_context(allow_offline=False)`` outside of a job."""


class ActivityFailedException(AzureMLException):
    """A run that failed, from ``wait_for_completion``."""


class WebserviceException(AzureMLException):
    """What older scripts catch where a model is not there; nothing else here raises it."""


class ModelNotFoundException(WebserviceException):
    pass


class AuthenticationException(AzureMLException):
    """Never raised: there is no account to log in to. There for ``except`` clauses, as the next one is."""


class ServiceException(AzureMLException):
    """Never raised: no service is asked."""


class NoSuchName(AzureMLException, AttributeError):
    """A member that this class or module of the SDK's has and we have not, or that it never had."""


class NoSuchImport(AzureMLException, ModuleNotFoundError):
    """A name of an ``azureml`` module that we do not have, from ``from x import y``."""


class NoSuchModule(NoSuchImport):
    """A module of ``azureml`` that we do not have."""


class NoSuchArgument(TypeError):
    """An argument's name that the SDK never had; ``known`` are those that there are, ``refused`` those that only Azure has."""

    def __init__(self, owner: str, name: str, known: Iterable[str], refused: Iterable[str] = ()) -> None:
        self.name, self.known, self.refused = name, list(known), list(refused)
        near = did_you_mean(name, [*self.known, *self.refused])
        super().__init__(f"{owner}() has no argument {name!r}{near}; it has {', '.join(self.known)}")


def members_of(cls: type) -> list[str]:
    """The public members of a class, those of its bases of ours too; not what every exception or object has."""
    return sorted(
        {
            name
            for base in cls.__mro__
            if base.__module__.startswith(__package__ or "dtrain.azureml")
            for name in (*vars(base), *vars(base).get("_fields", ()))
            if not name.startswith("_")
        }
    )


def _refuse(cls: type, name: str) -> NoReturn:
    if name.startswith("__") or name.startswith(("_repr_", "_ipython_")):  # what Python, and a notebook, ask anything for
        raise AttributeError(f"type object {cls.__name__!r} has no attribute {name!r}")
    refused: Mapping[str, str] = getattr(cls, "_refused", {})
    if name in refused:
        raise NoSuchName(f"{cls.__name__}.{name} is not available without Azure: {refused[name]} ({TABLE})")
    if (place := getattr(cls, "_elsewhere", {}).get(name)) is not None:
        raise NoSuchName(f"{cls.__name__} has no {name!r} itself; what is meant is {place} ({TABLE})")
    near = did_you_mean(name, members_of(cls))
    raise NoSuchName(f"dtrain's {cls.__name__} has no {name!r}{near}; it has {', '.join(members_of(cls))} ({TABLE})")


_KINDS = {"workspace": "Workspace", "experiment": "Experiment", "name": "str", "run_id": "str"}
"""What constructors take under these names, whichever class it is, and methods under the first two; by the class's name, for most
are not yet imported."""


def check_kind(owner: str, name: str, value: Any, kind: str) -> None:
    """Raises UserErrorException for a value that is not of the class of that name."""
    if kind not in [base.__name__ for base in type(value).__mro__]:
        text = "a text" if kind == "str" else f"{'an' if kind[0] in 'AE' else 'a'} {kind}"
        raise UserErrorException(f"{owner}() has {name}={value!r:.80}, and takes {text} there")


def _checked(function: Callable[..., Any], *, is_static: bool = False) -> Callable[..., Any]:
    """A constructor or method that looks first at what it is given: unknown and missing names, None where a value is needed, and
    objects of other classes under the names of ``_KINDS``.

    Raises TypeError for a name that it has not, or needs, as Python does, with the nearest that it has; else UserErrorException.
    """
    taken = [each for each in inspect.signature(function).parameters.values() if each.name != "self"]
    home, _, method = function.__qualname__.rpartition(".")
    kinds = _KINDS if method == "__init__" else {name: _KINDS[name] for name in ("workspace", "experiment")}
    is_open = any(each.kind is each.VAR_KEYWORD for each in taken)
    named = [each for each in taken if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
    order = [each.name for each in taken if each.kind is each.POSITIONAL_OR_KEYWORD]
    known = [each.name for each in named]
    needed = [each.name for each in named if each.default is each.empty]
    never_none = {each.name for each in named if each.name in needed and not _takes_none(str(each.annotation))}

    def check(owner: str, args: tuple[Any, ...], given: Mapping[str, Any]) -> None:
        unknown = [name for name in given if name not in known]
        placed = {**dict(zip(order, args, strict=False)), **given}
        missing = [name for name in needed if name not in placed]
        for name in unknown:
            if not is_open or nearest(name, missing) is not None:
                raise NoSuchArgument(owner, name, known)
        if missing:
            raise TypeError(f"{owner}() needs {', '.join(missing)}; it has {', '.join(known)}")
        for each in named:
            value = placed.get(each.name, each.default)
            if each.name in kinds and value is not each.default:
                check_kind(owner, each.name, value, kinds[each.name])
            elif value is None and each.name in never_none:
                raise UserErrorException(f"{owner}() has {each.name}=None, and needs a value there")

    @functools.wraps(function)
    def begin(*args: Any, **given: Any) -> Any:
        called = home if is_static else type(args[0])._called or type(args[0]).__name__
        owner = called if method == "__init__" else f"{called}.{method}"
        check(owner, args if is_static else args[1:], given)
        try:
            return function(*args, **given)
        except NoSuchArgument as error:
            if error.name not in given:
                raise
            raise NoSuchArgument(owner, error.name, dict.fromkeys([*known, *error.known]), error.refused) from None

    return begin


def _takes_none(annotation: str) -> bool:
    return "None" in annotation or annotation in ("Any", "object")


class NamedType(type):
    """Answers for names asked of the class itself (``Model.deploy``)."""

    if not TYPE_CHECKING:

        def __getattr__(cls, name: str) -> NoReturn:
            _refuse(cls, name)


class Named(metaclass=NamedType):
    """A class of the SDK's names.

    ``_refused``: members that only Azure has, each with what to use instead. ``_differs``: members that work differently, each
    with how. Both are shown in docs/azureml.md.
    """

    _refused: ClassVar[Mapping[str, str]] = {}
    _differs: ClassVar[Mapping[str, str]] = {}
    _options: ClassVar[tuple[str, ...]] = ()
    """Names of the constructor's keyword arguments, where those are many."""
    _fields: ClassVar[tuple[str, ...]] = ()
    """Names of the attributes that its methods set."""
    _elsewhere: ClassVar[Mapping[str, str]] = {}
    """Names that scripts look for here, each with where it is: an attribute of a part, say."""
    _called: ClassVar[str | None] = None
    """What errors call it, where scripts make it by another class."""

    if not TYPE_CHECKING:

        def __init_subclass__(cls) -> None:
            for name, member in list(vars(cls).items()):
                if isinstance(member, staticmethod) and not name.startswith("_"):
                    setattr(cls, name, staticmethod(_checked(member.__func__, is_static=True)))
                elif inspect.isfunction(member) and (name == "__init__" or not name.startswith("_")):
                    setattr(cls, name, _checked(member))

        def __getattr__(self, name: str) -> NoReturn:
            _refuse(type(self), name)


class Settings(Named):
    """An object whose attributes scripts set: one that is not among its ``_fields`` is refused, for it would have no effect."""

    _checks: ClassVar[Mapping[str, Callable[[str, Any], Any]]] = {}
    """By a field's name, what raises UserErrorException for a value that cannot be; called with name and value."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_") and name not in self._fields and not isinstance(getattr(type(self), name, None), property):
            _refuse(type(self), name)
        if (check := self._checks.get(name)) is not None:
            check(name, value)
        super().__setattr__(name, value)


def take_options(owner: str, given: Mapping[str, Any], known: Mapping[str, Any], refused: Mapping[str, str]) -> dict[str, Any]:
    """The keyword arguments of a constructor of the SDK: ``known`` with their defaults, overwritten by ``given``.

    One that is ``refused`` may be given when it is None, False or empty, and so asks for nothing. Raises UserErrorException for
    others, and TypeError, as Python does, for one that the SDK never had.
    """
    values = dict(known)
    for name, value in given.items():
        if name in known:
            values[name] = value
        elif name in refused:
            if value:
                raise UserErrorException(f"{owner}({name}={value!r}) is not available without Azure: {refused[name]} ({TABLE})")
        else:
            raise NoSuchArgument(owner, name, known, refused)
    return values
