"""Metrics as the SDK logs them, and as ``get_metrics`` gives them back."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import orjson

from dtrain.azureml.errors import UserErrorException
from dtrain.azureml.files import find_file
from dtrain.azureml.records import AzureLayout, append_line, read_lines
from dtrain.files import read_json
from dtrain.layout import RunLayout
from dtrain.metrics import MetricWriter, read_metrics
from dtrain.progress import PROGRESS

_RESERVED = ("t", "step")

# Held by the thread that counts and writes; and by one that forks, so that it is free in the new process.
_counting = threading.RLock()
os.register_at_fork(before=_counting.acquire, after_in_parent=_counting.release, after_in_child=_counting.release)


class Recorder:
    """Records one rank's metrics twice: as they were logged, and every number in dtrain's own file (``dtrain metrics``).

    Processes that the rank starts write to the same two files; who logs without a step counts on from what is there.
    """

    def __init__(self, run: RunLayout, rank: int, task: str = "") -> None:
        self.rank = rank
        self._path = AzureLayout(run).metrics(rank)
        self._path.parent.mkdir(exist_ok=True)
        run.metrics.mkdir(parents=True, exist_ok=True)
        self._writer = MetricWriter(run.metrics_file(rank, task))
        self._next: dict[str, int] = {}  # step by name
        self._counted = 0  # bytes of dtrain's own file
        weakref.finalize(self, self._writer.close).atexit = False  # what a script's own atexit logs is still to be written

    def scalar(self, name: str, value: Any, step: int | None = None) -> None:
        self._append("scalar", name, _plain(name, value), step)

    def values(self, name: str, values: Sequence[Any]) -> None:
        if isinstance(values, str | Mapping) or not hasattr(values, "__iter__"):
            raise UserErrorException(f"log_list({name!r}) takes a list of numbers, not {values!r:.80}")
        self._append("list", name, [_plain(name, value) for value in values])

    def row(self, name: str, values: Mapping[str, Any]) -> None:
        self._append("row", name, {str(key): _plain(f"{name}.{key}", value) for key, value in values.items()})

    def table(self, name: str, columns: Mapping[str, Any]) -> None:
        if not isinstance(columns, Mapping):
            raise UserErrorException(f"log_table({name!r}) takes a dict of columns, not {columns!r:.80}")
        plain: dict[str, Any] = {}
        for key, column in columns.items():
            several = hasattr(column, "__iter__") and not isinstance(column, str)
            plain[str(key)] = [_plain(f"{name}.{key}", v) for v in column] if several else _plain(f"{name}.{key}", column)
        self._append("table", name, plain)

    def artifact(self, name: str, file: str) -> None:
        """What is logged is in a file of the run."""
        self._append("image", name, file)

    def _append(self, kind: str, name: str, value: Any, step: int | None = None) -> None:
        append_line(self._path, {"kind": kind, "name": str(name), "value": _encoded(value), "step": step})
        with _counting:
            self._count()
            for key, number in _numbers(kind, str(name), value):
                own = f"azureml/{key}" if key in _RESERVED else key
                at = self._next.get(own, 0) if step is None else step
                self._next[own] = at + 1
                self._writer.write(at, {own: number})
        PROGRESS.mark()

    def _count(self) -> None:
        """Count the rows that were written since the last time, by whomever."""
        with open(self._writer.path, "rb") as file:
            file.seek(self._counted)
            rows, newline, _ = file.read().rpartition(b"\n")
        self._counted += len(rows + newline)
        for row in map(orjson.loads, rows.splitlines()):
            self._next.update(dict.fromkeys(row.keys() - _RESERVED, row["step"] + 1))


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, bool | int | float | str):
        return value
    try:
        # An array of a GPU has item() too, and refuses to become NumPy's by itself.
        plain = value.item() if hasattr(value, "item") else np.asarray(value).item()
    except (TypeError, ValueError, RuntimeError):
        plain = None
    if not isinstance(plain, bool | int | float | str):
        raise UserErrorException(f"metric {name!r} is {type(value).__name__} {value!r:.80}; log a number or text")
    return plain


def _encoded(value: Any) -> Any:
    """JSON has no words for nan and the infinities, and a loss that became nan must be seen."""
    if isinstance(value, float) and not np.isfinite(value):
        return {"float": str(value)}
    if isinstance(value, list):
        return [_encoded(each) for each in value]
    if isinstance(value, dict):
        return {key: _encoded(each) for key, each in value.items()}
    return value


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(each) for each in value]
    if isinstance(value, dict):
        if value.keys() == {"float"} and isinstance(value["float"], str):
            return float(value["float"])
        return {key: _decoded(each) for key, each in value.items()}
    return value


def _numbers(kind: str, name: str, value: Any) -> list[tuple[str, Any]]:
    """What of a record is numbers or text of a name's, for dtrain's own metrics file."""
    if kind == "scalar":
        return [(name, value)]
    if kind == "list":
        return [(name, each) for each in value]
    if kind in ("row", "table"):
        pairs = [(f"{name}/{key}", column) for key, column in value.items()]
        return [(key, each) for key, column in pairs for each in (column if isinstance(column, list) else [column])]
    return []


def read_rank(run: RunLayout, rank: int, *, populate: bool = False) -> dict[str, Any]:
    """One rank's metrics as ``get_metrics`` gives them: of a name that was logged once its value, else the list of all.

    Rows of a name become a dict of columns. Where the SDK's names logged nothing, what dtrain's own recorded. ``populate``:
    instead of a JSON file's name its content.
    """
    lines = read_lines(AzureLayout(run).metrics(rank))
    if not lines:
        rows = read_metrics(run).rows.get(rank, [])
        pairs = [("scalar", name, value) for row in rows for name, value in row.items() if name not in _RESERVED]
    else:
        pairs = [(line["kind"], line["name"], _decoded(line["value"])) for line in lines]
    if populate:
        pairs = [(kind, name, _content(run, value) if kind == "image" else value) for kind, name, value in pairs]
    collected: dict[str, Any] = {}
    for kind, name, value in pairs:
        if kind in ("row", "table"):
            columns = collected.setdefault(name, {})
            if not isinstance(columns, dict):
                raise UserErrorException(f"metric {name!r} of run {run.id} was logged as numbers and as rows; use two names")
            for key, item in value.items():
                columns.setdefault(key, []).extend(item if isinstance(item, list) else [item])
        else:
            values = collected.setdefault(name, [])
            if not isinstance(values, list):
                raise UserErrorException(f"metric {name!r} of run {run.id} was logged as rows and as numbers; use two names")
            values.extend(value if kind == "list" else [value])
    return {name: _collapsed(value) for name, value in collected.items()}


def _content(run: RunLayout, file: str) -> Any:
    return read_json(find_file(run, file)) if file.endswith(".json") else file


def _collapsed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _collapsed(column) for key, column in value.items()}
    return value[0] if len(value) == 1 else value


def logged_ranks(run: RunLayout) -> list[int]:
    """The ranks that have logged anything."""
    own = {int(path.stem.rpartition("-")[2]) for path in run.azureml.glob("metrics-*.jsonl")}
    return sorted(own | set(run.metrics_files()))
