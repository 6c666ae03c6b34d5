"""Metrics of one rank, appended to a file of its own, and their reading over all ranks.

A line is one JSON object: ``{"t": unix seconds, "step": int, "<name>": value, ...}``. No collective is called to log.
"""

from __future__ import annotations

import math
import operator
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import orjson

from dtrain.errors import UsageError, WorkspaceError
from dtrain.layout import RunLayout

Value: TypeAlias = float | int | bool | str

_RESERVED = ("t", "step")
# JSON has no words for these, and a loss that became nan must be seen.
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class MetricWriter:
    """Appends to one rank's file, which is opened once; one ``os.write`` a row, so a killed rank loses nothing it logged."""

    def __init__(self, path: Path) -> None:
        """Raises WorkspaceError when the file cannot be opened."""
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise WorkspaceError(f"metrics cannot be written to {path}: {error.strerror}") from error

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one row.

        ``values`` are numbers (Python's, or NumPy's scalars and arrays of one element) or strings. Blocks for the write only,
        about a microsecond; the data survive the process, and the machine once it has written its caches. Raises UsageError for
        what is no number, and WorkspaceError when the file cannot be written (disk full); the file then ends with a whole row.
        """
        for reserved in _RESERVED:
            if reserved in values:
                raise UsageError(
                    f"a metric cannot be called {reserved!r}; every row has the names {', '.join(_RESERVED)} already"
                )
        try:
            row: dict[str, Any] = {"t": time.time(), "step": operator.index(step)}
            for name, value in values.items():
                row[name] = value if type(value) is int else _plain(name, value)
            line = orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE)
        except TypeError as error:  # a step that is no whole number; a number of more than 64 bits; a name that is no text
            raise UsageError(f"metrics {list(values)} of step {step!r:.80} cannot be recorded: {error}") from error
        try:
            written = os.write(self._descriptor, line)
        except OSError as error:
            raise self._cannot_write(error.strerror or str(error)) from error
        if written != len(line):
            os.ftruncate(self._descriptor, os.fstat(self._descriptor).st_size - written)
            raise self._cannot_write("no space left")

    def _cannot_write(self, reason: str) -> WorkspaceError:
        return WorkspaceError(
            f"metrics cannot be written to {self.path}: {reason}; what was logged before is kept, and so is the last whole "
            f"checkpoint: make room, then go on with `dtrain run --resume`"
        )

    def close(self) -> None:
        os.close(self._descriptor)


def _plain(name: str, value: Any) -> Value:
    if isinstance(value, (bool, str, int)):
        return value
    number = value
    if type(value) is not float:
        try:
            # An array of a GPU has item() too, and refuses to become NumPy's by itself.
            number = value.item() if hasattr(value, "item") else np.asarray(value).item()
        except (TypeError, ValueError):
            number = None
    if isinstance(number, (bool, int)):
        return number
    if not isinstance(number, float):
        raise UsageError(f"metric {name!r} is {type(value).__name__} {value!r:.80}; log one number or string")
    return number if math.isfinite(number) else str(number)


@dataclass(frozen=True)
class Reduced:
    """One metric over the ranks; ``spread`` is max - min."""

    count: int
    mean: float
    min: float
    max: float
    p50: float
    spread: float

    @staticmethod
    def of(values: Iterable[float]) -> Reduced:
        array = np.asarray(list(values), dtype=np.float64)
        low, high = float(array.min()), float(array.max())
        return Reduced(len(array), float(array.mean()), low, high, float(np.median(array)), high - low)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of one rank's file, in the order of writing; [] when it does not exist.

    A torn last line is left out (the rank was killed while writing). Raises WorkspaceError for any other damage.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    rows = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise WorkspaceError(
                f"{path}, line {number} is damaged ({error}); dtrain writes whole lines, so something else changed it"
            ) from error
        rows.append({name: _NON_FINITE.get(value, value) if type(value) is str else value for name, value in row.items()})
    return rows


@dataclass(frozen=True)
class RunMetrics:
    """All ranks' rows of one run."""

    rows: Mapping[int, list[dict[str, Any]]]

    def names(self) -> list[str]:
        """Names of all metrics, in the order of first appearance."""
        seen = {name: None for rows in self.rows.values() for row in rows for name in row}
        return [name for name in seen if name not in _RESERVED]

    def steps(self, rank: int) -> int:
        """The last step that a rank logged, 0 when none."""
        return max((row["step"] for row in self.rows[rank]), default=0)

    def last(self, rank: int) -> dict[str, Value]:
        """The last value of every metric of one rank."""
        values: dict[str, Value] = {}
        for row in self.rows[rank]:
            values.update(row)
        return {name: value for name, value in values.items() if name not in _RESERVED}

    def over_ranks(self, name: str) -> Reduced | None:
        """The ranks' last values of a metric, reduced; None when no rank has a number."""
        values = (_last_of(rows, name) for rows in self.rows.values())
        numbers = [value for value in values if isinstance(value, (int, float))]
        return Reduced.of(numbers) if numbers else None

    def by_step(self) -> dict[int, dict[str, Reduced]]:
        """Step → metric → its values reduced over the ranks; where a rank logged one twice in a step, the later counts."""
        values: dict[int, dict[str, dict[int, float]]] = {}
        for rank, rows in self.rows.items():
            for row in rows:
                at_step = values.setdefault(row["step"], {})
                for name, value in row.items():
                    if name not in _RESERVED and isinstance(value, (int, float)):
                        at_step.setdefault(name, {})[rank] = value
        return {
            step: {name: Reduced.of(by_rank.values()) for name, by_rank in metrics.items()}
            for step, metrics in sorted(values.items())
            if metrics
        }


def _last_of(rows: list[dict[str, Any]], name: str) -> Value | None:
    return next((row[name] for row in reversed(rows) if name in row), None)


def _before(row: dict[str, Any], begin: Mapping[str, int]) -> dict[str, Any]:
    """The row without the names that begin anew at its step or before."""
    return {name: value for name, value in row.items() if name not in begin or row["step"] < begin[name]}


def read_metrics(run: RunLayout) -> RunMetrics:
    """Read the metrics of every rank that wrote some, also while the run goes on.

    Where the job was started again, an attempt's values of a name take the place of the earlier ones' from its first step on.
    """
    found = {}
    for rank, paths in run.metrics_files().items():
        rows: list[dict[str, Any]] = []
        for path in paths:
            newer = read_rows(path)
            begin: dict[str, int] = {}
            for row in newer:
                begin |= {name: min(row["step"], begin.get(name, row["step"])) for name in row if name not in _RESERVED}
            rows = [kept for row in rows if (kept := _before(row, begin)).keys() > set(_RESERVED)] + newer
        found[rank] = rows
    return RunMetrics(found)
