"""What a launcher decides, as a value: every process to start, with its host, arguments and environment."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtrain import env
from dtrain.spec import JobSpec


@dataclass(frozen=True, kw_only=True)
class PlannedProcess:
    """One process to start. ``environment`` is added to the inherited one; ``argv`` is never shell text."""

    name: str
    host: str
    argv: tuple[str, ...]
    environment: Mapping[str, str]
    cwd: Path

    def shell_line(self) -> str:
        """A line that starts the same process when it is pasted into a shell."""
        variables = [f"{name}={value}" for name, value in self.environment.items()]
        return f"cd {shlex.quote(str(self.cwd))} && {shlex.join(['env', *variables, *self.argv])}"


@dataclass(frozen=True, kw_only=True)
class LaunchPlan:
    """All processes of a job of ``size`` ranks, in the order in which they are started."""

    launcher: str
    size: int
    processes: tuple[PlannedProcess, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "launcher": self.launcher,
            "size": self.size,
            "processes": [
                {"name": p.name, "host": p.host, "argv": list(p.argv), "environment": dict(p.environment), "cwd": str(p.cwd)}
                for p in self.processes
            ],
        }


def rank_argv(spec: JobSpec) -> tuple[str, ...]:
    """The command of one rank: this Python, dtrain's rank entry, then the script or module and its arguments, untouched."""
    target = ("-m", spec.target) if spec.is_module else (spec.script_in_source,)
    return (sys.executable, "-m", "dtrain._rank_main", *target, *env.escape_arguments(spec.args))
