"""Options common to all tests: what a test needs, and ``--require``, which lets no test be skipped for want of it."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


def _installed(*names: str) -> bool:
    return all(importlib.util.find_spec(name) is not None for name in names)


def _gpu() -> bool:
    if not _installed("cupy"):
        return False
    import cupy

    try:
        return bool(cupy.cuda.runtime.getDeviceCount() > 0)
    except cupy.cuda.runtime.CUDARuntimeError:
        return False


BIN = str(Path(sys.executable).parent)

# What a test may need, and how it is seen to be there.
NEEDS: dict[str, Callable[[], bool]] = {
    "mpi": lambda: _installed("mpi4py") and (shutil.which("mpirun") or shutil.which("mpirun", path=BIN)) is not None,
    "mpich": lambda: os.path.exists(os.environ.get("DTRAIN_TEST_MPICH_PYTHON", "")),
    "chainer": lambda: _installed("chainer"),
    "tensorflow": lambda: _installed("tensorflow"),
    "horovod": lambda: _installed("horovod"),
    "sklearn": lambda: _installed("sklearn"),
    "gpu": _gpu,
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require",
        default="",
        metavar="NAME,...",
        help=f"fail where a test would be skipped for want of one of these; of {', '.join(NEEDS)}",
    )


def pytest_configure(config: pytest.Config) -> None:
    unknown = _required(config) - NEEDS.keys()
    if unknown:
        raise pytest.UsageError(f"--require={','.join(sorted(unknown))} is not known; use some of {', '.join(NEEDS)}")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """tests/ranks is for processes under mpirun, which contract/test_under_mpirun.py starts."""
    in_a_world = config.getoption("--with-mpi", default=False) or config.getoption("--only-mpi", default=False)
    return True if collection_path == Path(__file__).parent / "ranks" and not in_a_world else None


def _required(config: pytest.Config) -> set[str]:
    return {name for name in config.getoption("--require").split(",") if name}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what needs something that is not there; below, --require makes a failure of it."""
    there = {name: probe() for name, probe in NEEDS.items()}
    for item in items:
        needs = [name for mark in item.iter_markers("needs") for name in mark.args]
        if item.get_closest_marker("gpu") is not None:
            needs.append("gpu")
        missing = [name for name in needs if not there[name]]
        if missing:
            item.add_marker(pytest.mark.skip(reason=f"needs {' and '.join(missing)}"))


def refused_skip(reason: str, required: set[str]) -> str | None:
    """The required name for want of which a test was skipped with this reason, or None.

    The reason is anybody's prose ("could not import 'mpi4py'"), so names count as words in it. A test that wants more
    ranks than this world has ("Test requires 4 MPI processes") lacks no installation: it runs in the larger world.
    """
    if "MPI processes" in reason:
        return None
    for name in sorted(required):
        if re.search(rf"(?<![a-z]){name}(4py|run|exec|mn)?(?![a-z])", reason, re.IGNORECASE):
            return name
    return None


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    outcome = yield
    _fail_refused_skip(outcome.get_result(), item.config)


@pytest.hookimpl(hookwrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    outcome = yield
    _fail_refused_skip(outcome.get_result(), collector.config)


def _fail_refused_skip(report: pytest.TestReport | pytest.CollectReport, config: pytest.Config) -> None:
    if report.skipped and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2]
        name = refused_skip(reason, _required(config))
        if name is not None:
            report.outcome = "failed"
            report.longrepr = f"{report.nodeid}: skipped under --require={name}: {reason}"
