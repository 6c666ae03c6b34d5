"""Writing one rank's metrics, and reading those of all."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dtrain.errors import UsageError, WorkspaceError
from dtrain.layout import RunLayout
from dtrain.metrics import MetricWriter, read_metrics, read_rows


class OnDevice:
    """A scalar of an array module that does not become NumPy's by itself, as CuPy's do not."""

    def __array__(self, *_args: object) -> np.ndarray:
        raise TypeError("implicit conversion is not allowed")

    def item(self) -> float:
        return 4.5


def test_values_come_back_as_they_were(tmp_path: Path) -> None:
    writer = MetricWriter(tmp_path / "m.jsonl")
    values = {
        "int": 3,
        "float": 0.1,
        "bool": True,
        "text": "warm",
        "float32": np.float32(0.5),
        "array": np.array([[2.5]]),
        "int64": np.int64(7),
        "device": OnDevice(),
        "nan": math.nan,
        "inf": -math.inf,
        "main/loss": 1.0,
    }
    writer.write(np.int64(12), values)  # type: ignore[arg-type]
    (row,) = read_rows(tmp_path / "m.jsonl")
    assert row.pop("step") == 12
    assert abs(row.pop("t") - (tmp_path / "m.jsonl").stat().st_mtime) < 5
    assert math.isnan(row.pop("nan"))
    assert row == {
        "int": 3,
        "float": 0.1,
        "bool": True,
        "text": "warm",
        "float32": 0.5,
        "array": 2.5,
        "int64": 7,
        "device": 4.5,
        "inf": -math.inf,
        "main/loss": 1.0,
    }


@pytest.mark.parametrize("value", [[1, 2], np.zeros(3), None, {"a": 1}, object(), 1j, 2**70])
def test_what_is_no_number_is_refused_and_nothing_is_written(tmp_path: Path, value: object) -> None:
    writer = MetricWriter(tmp_path / "m.jsonl")
    with pytest.raises(UsageError, match=r"metric 'x' is|cannot be recorded"):
        writer.write(0, {"fine": 1, "x": value})
    for reserved in ("t", "step"):
        with pytest.raises(UsageError, match=f"cannot be called '{reserved}'"):
            writer.write(0, {reserved: 1})
    for step in (2.5, "x", None, 2**70):
        with pytest.raises(UsageError, match="cannot be recorded"):
            writer.write(step, {"fine": 1})  # type: ignore[arg-type]
    assert read_rows(tmp_path / "m.jsonl") == []


def test_a_killed_rank_loses_nothing_it_logged(tmp_path: Path) -> None:
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom dtrain.metrics import MetricWriter\n"
        "w = MetricWriter(Path(sys.argv[1]))\n"
        "for step in range(1000):\n    w.write(step, {'loss': 0.5})\n"
        "os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "m.jsonl")], check=False)
    assert [row["step"] for row in read_rows(tmp_path / "m.jsonl")] == list(range(1000))


def test_only_a_torn_last_line_is_forgiven(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"t":1,"step":1,"a":1}\n{"t":1,"st')
    assert [row["step"] for row in read_rows(path)] == [1]
    path.write_text('{"t":1,"st\n{"t":1,"step":1,"a":1}\n')
    with pytest.raises(WorkspaceError, match="line 1 is damaged"):
        read_rows(path)
    assert read_rows(tmp_path / "absent") == []


def test_a_full_disk_leaves_whole_rows(tmp_path: Path) -> None:
    """A file size limit cuts a write short just as a full disk does."""
    code = (
        "import resource, signal, sys\nfrom pathlib import Path\nfrom dtrain.metrics import MetricWriter\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "w = MetricWriter(Path(sys.argv[1]))\n"
        "for step in range(1000):\n    w.write(step, {'loss': 0.5})\n"
    )
    argv = [sys.executable, "-c", code, str(tmp_path / "m.jsonl")]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert "metrics cannot be written" in done.stderr
    data = (tmp_path / "m.jsonl").read_bytes()
    assert data.endswith(b"}\n")
    assert 900 < len(data) <= 1000
    assert len(read_rows(tmp_path / "m.jsonl")) == data.count(b"\n")


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(WorkspaceError, match="metrics cannot be written"):
        MetricWriter(tmp_path / "no" / "m.jsonl")


def test_over_the_ranks(tmp_path: Path) -> None:
    run = RunLayout(tmp_path)
    os.makedirs(run.metrics)
    for rank in range(4):
        writer = MetricWriter(run.metrics_file(rank))
        writer.write(1, {"loss": 10.0 * rank, "name": f"r{rank}"})
        writer.write(2, {"loss": float(rank)})
        if rank == 3:
            writer.write(2, {"loss": 9.0, "extra": 1})
    metrics = read_metrics(run)
    assert metrics.names() == ["loss", "name", "extra"]
    assert [metrics.steps(rank) for rank in range(4)] == [2] * 4
    assert metrics.last(3) == {"loss": 9.0, "name": "r3", "extra": 1}
    reduced = metrics.over_ranks("loss")
    assert reduced is not None
    assert (reduced.count, reduced.mean, reduced.min, reduced.max, reduced.p50, reduced.spread) == (4, 3.0, 0.0, 9.0, 1.5, 9.0)
    assert metrics.over_ranks("name") is None
    by_step = metrics.by_step()
    assert by_step[1]["loss"].mean == 15.0
    assert by_step[2]["loss"].max == 9.0
    assert by_step[2]["extra"].count == 1


def test_a_later_attempt_replaces_each_metric_from_its_own_first_step(tmp_path: Path) -> None:
    run = RunLayout(tmp_path)
    run.metrics.mkdir(parents=True)
    first, second = (MetricWriter(RunLayout(tmp_path, attempt).metrics_file(0)) for attempt in (0, 1))
    for step in range(6):
        first.write(step, {"loss": step})
    first.write(0, {"val": 0})
    first.write(4, {"both": 1, "loss": 40})
    second.write(4, {"loss": 100})
    second.write(1, {"val": 1})
    rows = [{name: value for name, value in row.items() if name != "t"} for row in read_metrics(run).rows[0]]
    kept = [{"step": step, "loss": step} for step in range(4)] + [{"step": 0, "val": 0}, {"step": 4, "both": 1}]
    assert rows == [*kept, {"step": 4, "loss": 100}, {"step": 1, "val": 1}]
