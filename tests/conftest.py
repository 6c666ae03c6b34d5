"""Options common to all tests: what a test needs; ``--require``, which lets no test be skipped for want of it; and ``--lane``."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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


def _netcluster() -> bool:
    """tests/testbed makes hosts of namespaces, which only root may, and not in every container."""
    return os.geteuid() == 0 and subprocess.run([HOSTS, "probe"], capture_output=True, check=False).returncode == 0


def _slurm() -> bool:
    """The same hosts, and Slurm's daemons for them."""
    return os.geteuid() == 0 and subprocess.run([SLURM, "probe"], capture_output=True, check=False).returncode == 0


BIN = str(Path(sys.executable).parent)

# What a test may need, and how it is seen to be there.
NEEDS: dict[str, Callable[[], bool]] = {
    "mpi": lambda: _installed("mpi4py") and (shutil.which("mpirun") or shutil.which("mpirun", path=BIN)) is not None,
    "mpich": lambda: os.path.exists(os.environ.get("DTRAIN_TEST_MPICH_PYTHON", "")),
    "chainer": lambda: _installed("chainer"),
    "tensorflow": lambda: _installed("tensorflow"),
    "horovod": lambda: _installed("horovod"),
    "jupyter": lambda: _installed("ipykernel", "ipywidgets"),
    "sklearn": lambda: _installed("sklearn"),
    "s3": lambda: _installed("obstore", "moto", "flask_cors"),
    "azurite": lambda: _installed("obstore") and shutil.which("azurite-blob") is not None,
    "gpu": _gpu,
    "netcluster": _netcluster,
    "slurm": _slurm,
    "ipv6": lambda: os.path.exists("/proc/net/if_inet6"),
}

ROOT = Path(__file__).parents[1]
HOSTS = ROOT / "tests" / "testbed" / "hosts.sh"
SLURM = HOSTS.with_name("slurm.sh")

DEFAULT_LANE = "keras3"
# What another lane has other versions of, beside NumPy; and the folders whose tests are about arrays.
FRAMEWORKS = {"chainer", "tensorflow", "horovod"}
ARRAYS = (ROOT / "tests" / "unit", ROOT / "tests" / "contract")
# Where several processes run tests, each of these is run by one of them, in its order: what its tests share (hosts and Slurm,
# wheels, a server) is made once.
TOGETHER = ("tests/cluster/", "tests/test_packaging.py", "tests/azureml/test_datastores.py")


# Where a shell has started this in the background, or nohup, Ctrl-C is ignored, here and in all that the tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require",
        default="",
        metavar="NAME,...",
        help=f"fail where a test would be skipped for want of one of these; of {', '.join(NEEDS)}",
    )
    parser.addoption(
        "--lane",
        choices=sorted(path.stem for path in (ROOT / "constraints").glob("keras*.txt")),
        help=f"the versions that are installed must be those of constraints/LANE.txt; and of every lane but {DEFAULT_LANE}, "
        "only those tests run that depend on the versions",
    )


@pytest.fixture(autouse=True)
def _temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a killed mpirun leaves in /tmp keeps a later one of the same process id from starting; TensorFlow leaves files too."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))


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
    if config.getoption("--lane") not in (None, DEFAULT_LANE):
        config.hook.pytest_deselected(items=[item for item in items if not _depends_on_lane(item)])
        items[:] = [item for item in items if _depends_on_lane(item)]
    there = {name: probe() for name, probe in NEEDS.items()}
    for item in items:
        missing = [name for name in _needs(item) if not there[name]]
        if missing:
            item.add_marker(pytest.mark.skip(reason=f"needs {' and '.join(missing)}"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Tests go one by one to the process that is free next, but for those of TOGETHER, which come first.

    pytest-xdist's own groups, ``--dist loadgroup``, are none with pytest 9.2 (pytest-xdist's issue 1386), and nothing says so.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return next((place for place in TOGETHER if nodeid.startswith(place)), nodeid)

    return Scheduling(config, log)


def _needs(item: pytest.Item) -> list[str]:
    needs = [name for mark in item.iter_markers("needs") for name in mark.args]
    return [*needs, "gpu"] if item.get_closest_marker("gpu") is not None else needs


def _depends_on_lane(item: pytest.Item) -> bool:
    """MPICH's tests never do: its Python is another one, which has no lane."""
    needs = set(_needs(item))
    about_arrays = any(item.path.is_relative_to(folder) for folder in ARRAYS)
    return "mpich" not in needs and (about_arrays or not needs.isdisjoint(FRAMEWORKS))


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
