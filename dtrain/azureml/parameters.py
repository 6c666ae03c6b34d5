"""``azureml.train.hyperdrive``: what a sweep tries. Parameter expressions, and the ways to draw settings from them.

A setting is a dict of values by the names of the parameters.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import orjson

from dtrain.azureml.errors import Named, UserErrorException
from dtrain.azureml.values import dict_of

_DRAWS: Mapping[str, Callable[..., float]] = {
    "randint": lambda source, upper: source.randrange(upper),
    "uniform": lambda source, low, high: source.uniform(low, high),
    "loguniform": lambda source, low, high: math.exp(source.uniform(low, high)),
    "normal": lambda source, mu, sigma: source.gauss(mu, sigma),
    "lognormal": lambda source, mu, sigma: math.exp(source.gauss(mu, sigma)),
}
_TRIES = 100
Setting = dict[str, Any]


@dataclass(frozen=True)
class Expression:
    """Values of one parameter: of a ``choice`` its ``values``, else those of a distribution with its ``values`` as arguments.

    ``q`` rounds what is drawn to its multiples; None: not.
    """

    kind: str
    values: tuple[Any, ...]
    q: float | None = None

    def draw(self, source: random.Random) -> Any:
        """One value; by the same ``source`` the same."""
        if self.kind == "choice":
            return source.choice(self.values)
        value = _DRAWS[self.kind](source, *self.values)
        return value if self.q is None else float(f"{round(value / self.q) * self.q:.12g}")


def choice(*options: Any) -> Expression:
    """One of ``options``, or of the list or range that is the only one. Raises UserErrorException for what is no argument."""
    first: Any = options[0] if len(options) == 1 else None
    values = list(first) if hasattr(first, "__iter__") and not isinstance(first, str | bytes | Mapping) else list(options)
    if not values:
        raise UserErrorException("choice() has no options; give them one by one, or as a list")
    return Expression("choice", tuple(map(_plain, values)))


def _plain(value: Any) -> Any:
    """An option as an argument can be: a number or text; a list as its JSON text. And as its run's tag can be, which is JSON."""
    value = value.item() if hasattr(value, "item") else value  # of NumPy's numbers
    if isinstance(value, bool | int | float | str | list | tuple):
        with contextlib.suppress(orjson.JSONEncodeError):
            text = orjson.dumps(value).decode()
            return text if isinstance(value, list | tuple) else value
    raise UserErrorException(f"choice() has {value!r:.80}; a script is given texts, and numbers of up to 64 bits")


def _distribution(kind: str, values: Mapping[str, float]) -> Expression:
    """One of ``_DRAWS`` with its arguments by name; with ``q`` among them that of the name with a q in front."""
    called = f"q{kind}" if "q" in values else kind
    shown = ", ".join(f"{name}={value!r}" for name, value in values.items())
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in values.values()):
        raise UserErrorException(f"{called}({shown}): give numbers")
    low, high = values.get("min_value", 0), values.get("max_value", 0)
    if low > high or values.get("sigma", 1) < 0 or values.get("q", 1) <= 0:
        raise UserErrorException(f"{called}({shown}) has no values: min_value <= max_value, sigma from 0, q above 0")
    return Expression(kind, tuple(value for name, value in values.items() if name != "q"), values.get("q"))


def randint(upper: int) -> Expression:
    """A whole number from 0, below ``upper``."""
    if isinstance(upper, bool) or not isinstance(upper, int) or not 1 <= upper <= 2**64:
        raise UserErrorException(f"randint(upper={upper!r}) is not a whole number from 1 to 2**64")
    return Expression("randint", (upper,))


def uniform(min_value: float, max_value: float) -> Expression:
    """A number between the two."""
    return _distribution("uniform", {"min_value": min_value, "max_value": max_value})


def quniform(min_value: float, max_value: float, q: float) -> Expression:
    """The multiple of ``q`` next to one of :func:`uniform`."""
    return _distribution("uniform", {"min_value": min_value, "max_value": max_value, "q": q})


def loguniform(min_value: float, max_value: float) -> Expression:
    """exp() of a number between the two."""
    return _distribution("loguniform", {"min_value": min_value, "max_value": max_value})


def qloguniform(min_value: float, max_value: float, q: float) -> Expression:
    """The multiple of ``q`` next to one of :func:`loguniform`."""
    return _distribution("loguniform", {"min_value": min_value, "max_value": max_value, "q": q})


def normal(mu: float, sigma: float) -> Expression:
    """A number of the normal distribution with mean ``mu`` and standard deviation ``sigma``."""
    return _distribution("normal", {"mu": mu, "sigma": sigma})


def qnormal(mu: float, sigma: float, q: float) -> Expression:
    """The multiple of ``q`` next to one of :func:`normal`."""
    return _distribution("normal", {"mu": mu, "sigma": sigma, "q": q})


def lognormal(mu: float, sigma: float) -> Expression:
    """exp() of one of :func:`normal`."""
    return _distribution("lognormal", {"mu": mu, "sigma": sigma})


def qlognormal(mu: float, sigma: float, q: float) -> Expression:
    """The multiple of ``q`` next to one of :func:`lognormal`."""
    return _distribution("lognormal", {"mu": mu, "sigma": sigma, "q": q})


class ParameterSampling(Named):
    """A way to draw settings from a ``parameter_space``: expressions by the parameters' names."""

    _fields: ClassVar = ("parameter_space",)

    def __init__(self, parameter_space: Mapping[str, Expression]) -> None:
        """Raises UserErrorException for a space that is none."""
        self.parameter_space: dict[str, Expression] = dict_of("parameter_space", parameter_space)
        for name, expression in self.parameter_space.items():
            if not isinstance(expression, Expression):
                raise UserErrorException(
                    f"parameter_space has {expression!r:.80} for {name!r}; give choice(...), uniform(...), ..."
                )
        if not self.parameter_space:
            raise UserErrorException("parameter_space is empty; give expressions by name: {'--lr': uniform(0.01, 0.1)}")

    def _settings(self) -> Iterator[Setting]:
        """Settings, each another one, for as long as there are any."""
        raise NotImplementedError


class RandomParameterSampling(ParameterSampling):
    """Settings drawn at random, no two the same; by ``properties={"seed": N}`` always the same ones."""

    _differs: ClassVar = {"(properties=)": "seed is used; the rule is 'random'"}

    def __init__(self, parameter_space: Mapping[str, Expression], properties: Mapping[str, Any] | None = None) -> None:
        super().__init__(parameter_space)
        given = dict_of("properties", properties)
        if (rule := given.pop("rule", "random")) != "random":
            raise UserErrorException(f"properties has rule={rule!r}: there is 'random'")
        self._seed: int | None = given.pop("seed", None)
        if given:
            raise UserErrorException(f"properties has {', '.join(given)}; there are seed and rule")

    def _settings(self) -> Iterator[Setting]:
        source, seen, repeated = random.Random(self._seed), set(), 0
        while repeated < _TRIES:
            drawn = {name: expression.draw(source) for name, expression in self.parameter_space.items()}
            key = tuple(drawn.values())
            repeated = repeated + 1 if key in seen else 0
            if not repeated:
                seen.add(key)
                yield drawn


class GridParameterSampling(ParameterSampling):
    """Every combination of ``choice`` expressions, the last parameter's first. Raises UserErrorException for others."""

    def __init__(self, parameter_space: Mapping[str, Expression]) -> None:
        super().__init__(parameter_space)
        for name, expression in self.parameter_space.items():
            if expression.kind != "choice":
                raise UserErrorException(f"parameter_space has {expression.kind} for {name!r}; a grid is of choice(...) alone")

    def _settings(self) -> Iterator[Setting]:
        for values in itertools.product(*(expression.values for expression in self.parameter_space.values())):
            yield dict(zip(self.parameter_space, values, strict=True))
