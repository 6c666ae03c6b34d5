"""A run, as data and as a table: what ``dtrain show``, ``runs`` and ``metrics`` print."""

from __future__ import annotations

import csv
import dataclasses
import math
import shlex
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from rich.table import Table
from rich.text import Text

from dtrain.errors import WorkspaceError
from dtrain.files import read_json
from dtrain.layout import RunLayout, StepFolder
from dtrain.metrics import Reduced, RunMetrics, Value, read_metrics
from dtrain.status import RunStatus, read_process, read_status, read_world

# Shown first where a run has them; what a trainer of ours records. A run with other names shows its first ones.
_COLUMNS = ("samples_per_s", "loss", "accuracy", "validation/loss", "validation/accuracy")
# Told as the median of all that a rank logged, where of others the last value counts: the last step's time is any step's.
_SPEED = "samples_per_s"
_SHOWN = 12
_STATE_STYLES = {"completed": "green", "failed": "red", "canceled": "yellow", "running": "cyan", "queued": "cyan"}


def run_to_json(run: RunLayout, read: Callable[[RunLayout], RunStatus] = read_status) -> dict[str, Any]:
    """Everything that is known of a run; times in Unix seconds, metrics as each rank logged them last (speed: the median).

    ``read`` gives its status.
    """
    status = read(run)
    metrics = read_metrics(run)
    spec = read_json(run.spec)
    ranks = [_rank_to_json(run, metrics, rank, status.tasks) for rank in range(status.size)]
    if status.elastic:  # a worker's number, by which it goes here, is not its rank
        workers = read_world(run.newest_attempt()).workers
        ranks = [{**each, "rank_now": workers.index(each["rank"]) if each["rank"] in workers else None} for each in ranks]
    over_ranks = {name: reduced for name in metrics.names() if (reduced := metrics.over_ranks(name)) is not None}
    if speeds := [rank["metrics"][_SPEED] for rank in ranks if _SPEED in rank["metrics"]]:
        over_ranks[_SPEED] = Reduced.of(speeds)
    return {
        "id": run.id,
        **{name: value for name, value in dataclasses.asdict(status).items() if name != "supervisor"},
        "duration_s": status.duration_s,
        "launcher": spec["launcher"],
        "spec": spec,
        "tags": _tags(run),
        "ranks": ranks,
        "over_ranks": {name: dataclasses.asdict(reduced) for name, reduced in over_ranks.items()},
        "checkpoints": list(StepFolder.committed(run.checkpoints)),
        "paths": {
            name: str(getattr(run, name)) for name in ("root", "outputs", "logs", "code", "checkpoints", "metrics", "ranks")
        },
    }


def _tags(run: RunLayout) -> dict[str, str]:
    try:
        tags: dict[str, str] = read_json(run.tags)
    except FileNotFoundError:
        return {}
    return tags


def _rank_to_json(run: RunLayout, metrics: RunMetrics, rank: int, tasks: list[str]) -> dict[str, Any]:
    process = read_process(run, rank)
    rows = metrics.rows.get(rank, [])
    values = metrics.last(rank) if rows else {}
    speeds = [row[_SPEED] for row in rows if isinstance(row.get(_SPEED), (int, float))]
    if speeds:
        values[_SPEED] = statistics.median(speeds)
    return {
        "rank": rank,
        "task": tasks[rank] if tasks else None,
        "host": process.host if process else None,
        "steps": metrics.steps(rank) if rows else 0,
        "metrics": values,
    }


def ranks_table(data: dict[str, Any]) -> Table:
    """The table of a run's ranks (as from :func:`run_to_json`), closed by mean, min and max over them."""
    names = list({name: None for rank in data["ranks"] for name in rank["metrics"]})
    columns = [name for name in _COLUMNS if name in names] or names[:5]
    table = Table(box=None, pad_edge=False, header_style="bold")
    first = ("task", "rank_now") if data["elastic"] else ("rank", "task") if data["tasks"] else ("rank",)
    for column in (*first, "host", "steps", *columns):
        table.add_column(column.replace("_", " "), justify="left" if column in ("host", "task") else "right")
    for rank in data["ranks"]:
        values = (rank["metrics"].get(name) for name in columns)
        table.add_row(*_cells(*(rank[name] for name in first), rank["host"] or "?", rank["steps"], *values))
    if len(data["ranks"]) > 1 and columns:
        table.add_section()
        for kind in ("mean", "min", "max"):
            reduced = (data["over_ranks"].get(name, {}).get(kind) for name in columns)
            table.add_row(*_cells(kind, *("" for _ in first[1:]), "", "", *reduced), style="dim")
    return table


def runs_table(runs: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("run", "state", "ranks", "started", "seconds", "cause"):
        table.add_column(column, justify="right" if column in ("ranks", "seconds") else "left", no_wrap=column == "run")
    for run in runs:
        seconds = "" if run["duration_s"] is None else f"{run['duration_s']:.1f}"
        started = "" if run["started"] is None else format_time(run["started"])
        cells = _cells(run["id"], run["state"], run["size"], started, seconds, run["cause"].partition("\n")[0][:100])
        cells[1].stylize(_STATE_STYLES.get(run["state"], ""))
        table.add_row(*cells)
    return table


def run_summary(run: RunLayout, read: Callable[[RunLayout], RunStatus] = read_status) -> dict[str, Any]:
    """A line's worth of a run, its status as ``read`` gives it. Reads no metrics. A damaged run is shown as such, not raised."""
    try:
        status = read(run)
    except WorkspaceError as error:
        unknown = dict.fromkeys(("size", "started", "duration_s", "exit_code"))
        return {"id": run.id, "state": "damaged", **unknown, "cause": str(error), "path": str(run.root)}
    again = status.state == "queued" and status.earlier
    return {
        "id": run.id,
        "state": status.state,
        "size": status.size,
        "started": status.started,
        "duration_s": status.duration_s,
        "exit_code": status.exit_code,
        "cause": "; ".join([status.cause, *([f"attempt {len(status.earlier) - 1}: {status.earlier[-1]}"] if again else [])]),
        "path": str(run.root),
    }


def metric_rows(metrics: RunMetrics, *, by_rank: bool) -> Iterator[dict[str, Any]]:
    """Rows of ``dtrain metrics``: a row a rank and step as logged, or a row a step and metric with its figures over the ranks."""
    if by_rank:
        for rank, rows in metrics.rows.items():
            yield from ({"rank": rank, **row} for row in rows)
    else:
        for step, values in metrics.by_step().items():
            yield from ({"step": step, "name": name, **dataclasses.asdict(reduced)} for name, reduced in values.items())


def checks_table(hosts: list[dict[str, Any]]) -> Table:
    """What ``dtrain doctor`` found; ``hosts`` have ``host`` and ``checks``, each with ``name``, ``level`` and ``said``."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("host", "check", "", "found"):
        table.add_column(column)
    for each in hosts:
        for check in each["checks"]:
            level = Text(check["level"], style={"ok": "green", "warning": "yellow"}.get(check["level"], "red"))
            table.add_row(Text(each["host"]), Text(check["name"]), level, Text(check["said"]))
    return table


def jsonable(value: Any) -> Any:
    """``value`` with nan and the infinities as strings, as in the metrics' files: JSON has no words for them."""
    if isinstance(value, dict):
        return {key: jsonable(each) for key, each in value.items()}
    if isinstance(value, list):
        return [jsonable(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def write_csv(rows: list[dict[str, Any]], out: TextIO) -> None:
    columns = list({name: None for row in rows for name in row})
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


def rows_table(rows: list[dict[str, Any]]) -> Table:
    """Any rows as a table, a column a key, in the order of first appearance."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    columns = list({name: None for row in rows for name in row if name != "t"})
    for column in columns:
        table.add_column(column, justify="left" if any(isinstance(row.get(column), str) for row in rows) else "right")
    for row in rows:
        table.add_row(*_cells(*(row.get(column) for column in columns)))
    return table


def _cells(*values: Value | None) -> list[Text]:
    # As Text: a name or a message may hold what rich would take for its markup ("[Errno 28]").
    return [Text(format_value(value)) for value in values]


def format_value(value: Value | None) -> str:
    if isinstance(value, float):
        return f"{value:.5g}" if abs(value) < 10_000 else f"{value:,.0f}"
    return "" if value is None else str(value)


def format_time(seconds: float) -> str:
    """UTC, as in the names of runs."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def heading(data: dict[str, Any]) -> list[str]:
    """What was run and how it ended, in a few lines; ``data`` has ``parent`` (empty: none) and ``children``, too."""
    spec = data["spec"]
    seconds = "" if data["duration_s"] is None else f" after {data['duration_s']:.1f} s"
    ended = "" if data["exit_code"] in (None, 0) else f" with exit code {data['exit_code']}"
    kind = "workers" if data["elastic"] else "ranks"
    command = shlex.join([*(["-m"] if spec["is_module"] else []), spec["target"], *spec["args"]])
    lines = [
        f"run      {data['id']}",
        f"state    {data['state']}{seconds}{ended}",
        f"command  {command}",
        f"{kind:<9}{data['size']}, launcher {data['launcher']}, started {format_time(data['started'])}",
    ]
    if spec["resume_from"]:
        lines.append(f"resumed  from {spec['resume_from']}")
    if data["restarts"]:
        lines.append(f"restarts {data['restarts']} of killed workers")
    for number, cause in enumerate(data["earlier"]):
        lines.append(f"attempt  {number} ended: {cause}")
    if data["cause"]:
        lines.append(f"cause    {data['cause']}")
    if data["parent"]:
        lines.append(f"parent   {data['parent']}")
    if children := data["children"]:
        more = f" and {len(children) - _SHOWN} more" if len(children) > _SHOWN else ""
        lines.append(f"children {', '.join(children[:_SHOWN])}{more}")
    if data["tags"]:
        lines.append("tags     " + ", ".join(f"{key}={value}" for key, value in data["tags"].items()))
    return lines


def places(data: dict[str, Any]) -> list[str]:
    """Where everything lies."""
    checkpoints = data["checkpoints"]
    kept = f" (steps {', '.join(map(str, checkpoints))})" if checkpoints else " (none)"
    return [
        f"models       {', '.join(data['models']) or 'none registered from this run'}",
        f"outputs      {data['paths']['outputs']}",
        f"checkpoints  {data['paths']['checkpoints']}{kept}",
        f"metrics      {data['paths']['metrics']}",
        f"output       {data['paths']['ranks']}/*/output.log",
        f"source       {data['paths']['code']}",
    ]


def models_table(versions: list[dict[str, Any]]) -> Table:
    rows = [
        {
            "model": f"{version['name']}:{version['version']}",
            "created": version["created"],
            "files": len(version["files"]),
            "bytes": sum(file["size_bytes"] for file in version["files"]),
            "run": version["run"],
            "tags": ", ".join(f"{key}={value}" for key, value in version["tags"].items()),
            "description": version["description"],
        }
        for version in versions
    ]
    return rows_table(rows)


def machine_lines(data: dict[str, Any]) -> list[str]:
    """``dtrain env`` in words; what is missing has the command that installs it."""
    lines = [
        f"{'dtrain':<15}{data['dtrain']}",
        f"{'python':<15}{data['python']}  {data['executable']}",
        f"{'machine':<15}{data['platform']}, {data['cores']} cores",
        f"{'workspace':<15}{data['workspace']['path']}, {data['workspace']['runs']} runs",
    ]
    for package in data["packages"]:
        have = package["version"] or f"missing (for {package['for']}): {package['install']}"
        lines.append(f"{package['name']:<15}{have}")
        if "built_with" in package:
            lines[-1] += f", {_built_with(package['built_with'])}"
    mpi = data["mpi"]
    if mpi["mpirun"]:
        lines.append(f"{'MPI':<15}{mpi['family']} {mpi['version']}  {mpi['mpirun']}; mpi4py uses {mpi['mpi4py_library']}")
    if "problem" in mpi:
        lines.append(f"{'MPI problem':<15}{mpi['problem']}")
    lines += [f"{'GPU':<15}{gpu}" for gpu in data["gpus"]] or [f"{'GPU':<15}none found (nvidia-smi shows none)"]
    return lines


def _built_with(features: dict[str, bool]) -> str:
    if not features:
        return "which cannot be imported: `horovodrun --check-build --verbose` may say why"
    names = {"mpi": "MPI", "gloo": "Gloo", "cuda": "CUDA", "rocm": "ROCm"}
    built = [names.get(name, name.upper()) for name, there in features.items() if there]
    absent = [names.get(name, name.upper()) for name in ("mpi", "gloo", "nccl") if not features.get(name)]
    return f"built with {' and '.join(built) or 'nothing'}" + (f", without {' and '.join(absent)}" if absent else "")
