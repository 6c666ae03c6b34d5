"""A run at a glance, of the dict that ``RunDetails.get_widget_data`` gives: as text, and as the parts of a notebook's page."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator
from typing import Any

from dtrain.azureml.state import ENDED

_POINTS = 200
_WIDTH, _HEIGHT = 160, 30  # of a metric's course, in pixels
_CELL = '<td style="text-align:left">'


def as_text(data: dict[str, Any]) -> str:
    """State, metrics and last lines for a terminal."""
    lines = [f"run {data['run_id']} of experiment {data['experiment']}: {data['status']}"]
    lines += [f"  {note}" for note in data["notes"]]
    for name, values in _series(data["run_metrics"]):
        lines.append(f"  {name}: {_last(values)}" + (f" (last of {len(values)})" if len(values) > 1 else ""))
    lines += [f"  | {line}" for line in data["run_logs"]]
    if data["status"] not in ENDED:
        lines.append(
            f"  run.wait_for_completion(show_output=True) or `dtrain logs {data['run_id']} --follow` shows how it goes on"
        )
    return "\n".join(lines)


def state(data: dict[str, Any]) -> str:
    """The run, its state and for how long it has run; what there is to say of it, as the cause of a failure."""
    rows = [("run", data["run_id"]), ("experiment", data["experiment"]), ("state", data["status"])]
    rows.append(("time", f"{data['seconds']:.0f} s"))
    rows += [("note", note) for note in data["notes"]]
    return f"<table>{''.join(f'<tr><th>{name}</th>{_CELL}{html.escape(str(value))}</td></tr>' for name, value in rows)}</table>"


def metrics(data: dict[str, Any]) -> str:
    """A table of rank 0's metrics: the last value, how many there are, and their course as a line. Empty before the first."""
    rows = []
    for name, values in _series(data["run_metrics"]):
        numbers = [value for value in values if isinstance(value, int | float) and math.isfinite(value)]
        lowest, highest = (f"{min(numbers):.6g}", f"{max(numbers):.6g}") if numbers else ("", "")
        cells = (name, _last(values), lowest, highest, str(len(values)))
        rows.append("".join(f"{_CELL}{html.escape(cell)}</td>" for cell in cells) + f"{_CELL}{_course(numbers)}</td>")
    heads = "".join(f"<th>{head}</th>" for head in ("metric", "last", "lowest", "highest", "values", "course"))
    return f"<table><tr>{heads}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>" if rows else ""


def log(data: dict[str, Any]) -> str:
    """The last lines of the log that is shown."""
    return f"<pre>{html.escape(chr(10).join(data['run_logs']))}</pre>"


def _series(run_metrics: dict[Any, Any]) -> Iterator[tuple[str, list[Any]]]:
    """Every metric's values as they were logged; of rows and tables each column, as ``name.column``."""
    for name, value in run_metrics.items():
        columns = {f"{name}.{key}": column for key, column in value.items()} if isinstance(value, dict) else {str(name): value}
        for key, column in columns.items():
            yield key, column if isinstance(column, list) else [column]


def _last(values: list[Any]) -> str:
    if not values:
        return ""
    return f"{values[-1]:.6g}" if isinstance(values[-1], float) else str(values[-1])


def _course(numbers: list[float]) -> str:
    """A line through the values, as SVG; of more than ``_POINTS`` every n-th. Nothing of fewer than two."""
    if len(numbers) < 2:
        return ""
    chosen = numbers[:: math.ceil(len(numbers) / _POINTS)]
    lowest, highest = min(chosen), max(chosen)
    points = " ".join(
        f"{_WIDTH * at / max(1, len(chosen) - 1):.1f},{_HEIGHT * (highest - value) / (highest - lowest or 1):.1f}"
        for at, value in enumerate(chosen)
    )
    return (
        f'<svg width="{_WIDTH}" height="{_HEIGHT + 2}" viewBox="0 -1 {_WIDTH} {_HEIGHT + 2}">'
        f'<polyline points="{points}" fill="none" stroke="currentColor"/></svg>'
    )
