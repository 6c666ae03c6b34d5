"""What a launcher decides, as a value: every process to start, with its host, arguments and environment."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dtrain import env
from dtrain.binding import RankBinding, format_cpus
from dtrain.launch import ssh
from dtrain.layout import RunLayout
from dtrain.masking import Masker
from dtrain.roles import Task
from dtrain.spec import JobSpec
from dtrain.status import read_world, worker_names


@dataclass(frozen=True, kw_only=True)
class PlannedTask:
    """What one process of a cluster is, and how the supervisor treats it.

    ``rank`` is its rank in the job. ``address`` is the (host, port) where it has to listen soon after its start, None for one
    that nobody waits for. Processes of a ``stage`` are started when all of the stages before listen. The job is over when every
    task that ``ends_job`` has ended; the others (servers, mostly) are ended then. One that is killed is started again up to
    ``max_restarts`` times.
    """

    rank: int
    task: Task
    address: tuple[str, int] | None
    stage: int = 0
    ends_job: bool = True
    max_restarts: int = 0


@dataclass(frozen=True, kw_only=True)
class PlannedProcess:
    """One process to start. ``environment`` is added to the inherited one; ``argv`` is never shell text.

    ``task`` is None for a process that starts ranks without roles, or is the only one. ``over_ssh`` is true of one on another
    host, of whose inherited environment :func:`ssh.sent_variables` is left.
    """

    name: str
    host: str
    argv: tuple[str, ...]
    environment: Mapping[str, str]
    cwd: Path
    task: PlannedTask | None = None
    over_ssh: bool = False

    def shell_line(self) -> str:
        """A line that starts the same process when it is pasted into a shell."""
        if self.over_ssh:
            return shlex.join(ssh.command(self.host, self.cwd, self.environment, self.argv))
        variables = [f"{name}={value}" for name, value in self.environment.items()]
        return f"cd {shlex.quote(str(self.cwd))} && {shlex.join(['env', *variables, *self.argv])}"


@dataclass(frozen=True, kw_only=True)
class PlannedHost:
    """Another host with ranks. ``copied``: it does not see the run folder, and is given a copy."""

    name: str
    ranks: tuple[int, ...]
    copied: bool = False


@dataclass(frozen=True, kw_only=True)
class BoundRank:
    """What one rank will be bound to on its host."""

    rank: int
    host: str
    local_rank: int
    binding: RankBinding


@dataclass(frozen=True, kw_only=True)
class LaunchPlan:
    """All processes of a job of ``size`` ranks, in the order in which they are started.

    ``scratch`` is a folder that the launcher's own programs may make on each host; it is removed when the job is over.
    ``other_hosts`` are those with ranks that none of ``processes`` is, and those with a copy of the run folder. ``noise`` is a
    regular expression for lines of the launcher's own that mean nothing, and are not shown; empty: all are.
    ``ended`` is one for lines in which it says that ranks (group ``ranks``) have ended on a ``host``, and ``how``; empty: none.
    ``binding`` is what the ranks will be bound to; of those on hosts that were not asked nothing is known.
    ``share`` is, in words, what each will have where only its node can tell which processors these are.
    ``secrets`` are variables that all processes are given, and that stand in none of their environments or arguments here.
    ``ordered`` is true where a program other than dtrain starts ranks on other hosts: they are told what to do by files.
    Of an ``elastic`` job ``size`` is 0: its ranks are workers, started and lost as it goes, and numbered by their starts.
    """

    launcher: str
    size: int
    processes: tuple[PlannedProcess, ...]
    scratch: Path | None = None
    other_hosts: tuple[PlannedHost, ...] = ()
    noise: str = ""
    ended: str = ""
    ordered: bool = False
    elastic: bool = False
    binding: tuple[BoundRank, ...] = ()
    share: str = ""
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def masker(self) -> Masker:
        """What keeps the secrets out of all that is written about the job."""
        return Masker(self.secrets.values())

    @property
    def tasks(self) -> dict[int, PlannedTask]:
        """The ranks that have roles; empty for a job whose ranks have none."""
        return {process.task.rank: process.task for process in self.processes if process.task is not None}

    def ranks(self, run: RunLayout) -> range:
        """All ranks of the run's attempt; of an elastic job, those that were started until now."""
        return range(run.count_ranks() if self.elastic else self.size)

    def deciding_ranks(self, run: RunLayout) -> list[int]:
        """The ranks whose outcome is the job's; of an elastic job, those that train together now."""
        tasks = self.tasks
        return read_world(run).workers if self.elastic else [r for r in range(self.size) if r not in tasks or tasks[r].ends_job]

    def task_names(self, run: RunLayout) -> list[str]:
        """Role and index of every rank, by rank; empty for a job whose ranks have no roles."""
        if self.elastic:
            return worker_names(run.count_ranks())
        return [str(planned.task) for _, planned in sorted(self.tasks.items())]

    def to_json(self) -> dict[str, Any]:
        """For ``--dry-run --json``; of secrets the names alone."""
        values: dict[str, Any] = self.masker.value(self._to_json())
        return {**values, "secrets": list(self.secrets)}

    def shell_lines(self) -> list[str]:
        """For ``--dry-run``: the processes, each as a line for a shell that has the secrets among its variables."""
        mask = self.masker
        shown = (replace(p, argv=tuple(map(mask.text, p.argv)), environment=mask.value(p.environment)) for p in self.processes)
        return [process.shell_line() for process in shown]

    def _to_json(self) -> dict[str, Any]:
        return {
            "launcher": self.launcher,
            "size": self.size,
            "elastic": self.elastic,
            "processes": [
                {
                    "name": p.name,
                    "rank": p.task.rank if p.task else None,
                    "host": p.host,
                    "over_ssh": p.over_ssh,
                    "argv": list(p.argv),
                    "environment": dict(p.environment),
                    "cwd": str(p.cwd),
                }
                for p in self.processes
            ],
            "binding": [
                {
                    "rank": each.rank,
                    "host": each.host,
                    "local_rank": each.local_rank,
                    "processors": format_cpus(each.binding.cpus),
                    "numa_nodes": format_cpus(each.binding.nodes),
                    "threads": each.binding.threads,
                    "gpu": each.binding.gpu,
                }
                for each in self.binding
            ],
            "share": self.share,
            "other_hosts": [{"name": host.name, "ranks": list(host.ranks), "copied": host.copied} for host in self.other_hosts],
        }


def rank_argv(spec: JobSpec) -> tuple[str, ...]:
    """The command of one rank: its Python, dtrain's rank entry, then the script or module and its arguments, untouched."""
    target = ("-m", spec.target) if spec.is_module else (spec.script_in_source,)
    return (spec.interpreter, "-m", "dtrain._rank_main", *target, *env.escape_arguments(spec.args))
