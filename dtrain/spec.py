"""What to run: a JobSpec, checked on construction."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from dtrain.errors import NotRunnable, UsageError
from dtrain.layout import check_name

Launcher = Literal["local", "mpi", "horovod"]
LAUNCHERS: tuple[Launcher, ...] = get_args(Launcher)


def available_cores() -> int:
    """Cores that this process may use (its affinity, not the machine's count)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def default_max_ranks() -> int:
    return max(16, 4 * available_cores())


def _check_seconds(name: str, value: float | None) -> None:
    if value is not None and not 0 < value < float("inf"):
        raise UsageError(f"{name}={value:g} is not a number of seconds above 0")


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    """One job: a script or module, its arguments, and how many ranks run it.

    ``target`` is the path of a script, or a module's name when ``is_module``. ``source`` is the folder that is copied into the
    run folder and in which the ranks then work: by default the script's folder; the current folder for a module.
    ``launcher`` None means ``local`` for one rank and ``mpi`` for more. ``resume_from`` is the folder of the run whose newest
    whole checkpoint the ranks start from.

    Raises UsageError for values that cannot be, NotRunnable when there is no such script.
    """

    target: str
    is_module: bool = False
    args: tuple[str, ...] = ()
    source: Path | None = None
    workers: int = 1
    max_ranks: int = field(default_factory=default_max_ranks)
    launcher: Launcher | None = None
    experiment: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    timeout_s: float | None = None
    grace_s: float = 10.0
    resume_from: Path | None = None

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise UsageError(f"-n {self.workers}: a job has at least 1 rank")
        if self.workers > self.max_ranks:
            raise UsageError(
                f"-n {self.workers} exceeds --max-ranks {self.max_ranks}; lower -n, or raise --max-ranks if you mean it"
            )
        if self.launcher is not None and self.launcher not in LAUNCHERS:
            raise UsageError(
                f"unknown launcher {self.launcher!r}{nearest(self.launcher, LAUNCHERS)}; there are {', '.join(LAUNCHERS)}"
            )
        if self.launcher == "local" and self.workers > 1:
            raise UsageError(f"launcher 'local' runs one rank, and -n {self.workers} asks for more; use --launcher mpi")
        if not 0 <= self.grace_s < float("inf"):
            raise UsageError(f"--grace {self.grace_s:g} is not a number of seconds from 0")
        _check_seconds("--timeout", self.timeout_s)
        for name in self.environment:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise UsageError(f"--env {name!r} is not a variable's name; use --env NAME=VALUE")
        check_name("experiment", self.experiment_name)
        self._check_target()

    def _check_target(self) -> None:
        if self.is_module:
            if not re.fullmatch(r"\w+(\.\w+)*", self.target):
                raise UsageError(f"-m {self.target!r} is not a module's name; use -m package.module")
            return
        script = Path(self.target)
        if script.is_dir():
            raise NotRunnable(f"{self.target} is a folder, not a script; name the script to run")
        if not script.is_file():
            siblings = [path.name for path in script.parent.glob("*.py")] if script.parent.is_dir() else []
            raise NotRunnable(f"no such script: {self.target} (from {Path.cwd()}){nearest(script.name, siblings)}")
        if not script.resolve().is_relative_to(self.source_folder.resolve()):
            raise UsageError(f"script {self.target} is not in --source {self.source}; the ranks work in a copy of that folder")

    @property
    def source_folder(self) -> Path:
        if self.source is not None:
            return self.source.absolute()
        return Path.cwd() if self.is_module else Path(self.target).absolute().parent

    @property
    def script_in_source(self) -> str:
        """The script's path relative to the source folder, or the module's name."""
        return self.target if self.is_module else str(Path(self.target).resolve().relative_to(self.source_folder.resolve()))

    @property
    def launcher_name(self) -> Launcher:
        return self.launcher or ("local" if self.workers == 1 else "mpi")

    @property
    def experiment_name(self) -> str:
        return self.experiment or experiment_from(self.target)

    def to_json(self) -> dict[str, Any]:
        """The content of ``spec.json``."""
        values = dataclasses.asdict(self)
        values.update(
            launcher=self.launcher_name, experiment=self.experiment_name, source=self.source_folder, args=list(self.args)
        )
        return values


def experiment_from(target: str) -> str:
    """An experiment's name from a script's or module's."""
    stem = target.rpartition("/")[2].removesuffix(".py").rpartition(".")[2]
    return re.sub(r"[^A-Za-z0-9._-]", "-", stem).lstrip("._-")[:64] or "run"


def nearest(given: str, allowed: tuple[str, ...] | list[str]) -> str:
    """`` (did you mean X?)``, or nothing when no allowed word is near."""
    close = difflib.get_close_matches(given, allowed, n=1)
    return f" (did you mean {close[0]}?)" if close else ""
