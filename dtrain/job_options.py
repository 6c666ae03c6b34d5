"""The launchers, and a job's options in groups, each a value that checks itself: clusters, restarts, hangs, Slurm."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from dtrain.errors import UsageError, did_you_mean
from dtrain.roles import DIALECTS, Dialect

Launcher = Literal["local", "mpi", "horovod", "parameter_server", "multi_worker", "slurm"]
LAUNCHERS: tuple[Launcher, ...] = get_args(Launcher)
CLUSTER_LAUNCHERS: tuple[Launcher, ...] = ("parameter_server", "multi_worker")
MPI_LAUNCHERS: tuple[Launcher, ...] = ("mpi", "horovod")


def available_cores() -> int:
    """Cores that this process may use (its affinity, not the machine's count)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def default_max_ranks() -> int:
    return max(16, 4 * available_cores())


def check_seconds(name: str, value: float | None) -> None:
    """Raise UsageError for an option of a command that is no time to wait; None is none given."""
    if value is not None and not 0 < value < float("inf"):
        raise UsageError(f"{name}={value:g} is not a number of seconds above 0")


@dataclass(frozen=True, kw_only=True)
class ClusterOptions:
    """The options of the launchers ``parameter_server`` and ``multi_worker``, beside the number of workers.

    ``servers`` None means 1 under ``parameter_server``. ``tf_config`` is the dialect of TF_CONFIG; None means ``chief`` with
    ``chief``, else ``workers``. A task has to listen on its port ``start_timeout_s`` after its start. A worker that is killed
    is started again up to ``max_worker_restarts`` times; None means 3 under ``parameter_server``.

    Raises UsageError for what cannot be.
    """

    servers: int | None = None
    chief: bool = False
    evaluator: bool = False
    tf_config: Dialect | None = None
    start_timeout_s: float = 120.0
    max_worker_restarts: int | None = None

    def __post_init__(self) -> None:
        if self.servers is not None and self.servers < 0:
            raise UsageError(f"--servers {self.servers} is not a number from 0")
        if self.max_worker_restarts is not None and self.max_worker_restarts < 0:
            raise UsageError(f"--max-worker-restarts {self.max_worker_restarts} is not a number from 0")
        if self.tf_config is not None and self.tf_config not in DIALECTS:
            raise UsageError(
                f"unknown --tf-config {self.tf_config!r}{did_you_mean(self.tf_config, DIALECTS)}; there are {', '.join(DIALECTS)}"
            )
        if self.chief and self.tf_config not in (None, "chief"):
            leader = "worker 0 leads" if self.tf_config == "workers" else "a master leads"
            raise UsageError(f"--chief contradicts --tf-config {self.tf_config}, in which {leader}; leave one of them out")
        if self.evaluator and self.dialect != "chief":
            why = "a master evaluates by itself" if self.dialect == "master" else "a cluster that worker 0 leads knows none"
            raise UsageError(f"--evaluator goes with --chief (or --tf-config chief): {why}")
        check_seconds("--start-timeout", self.start_timeout_s)

    @property
    def dialect(self) -> Dialect:
        return self.tf_config or ("chief" if self.chief else "workers")

    def resolved(self, launcher: Launcher) -> ClusterOptions:
        """These options with the launcher's own values where they were left open; raises UsageError for what it does not have."""
        if launcher == "parameter_server":
            return dataclasses.replace(
                self,
                servers=1 if self.servers is None else self.servers,
                max_worker_restarts=3 if self.max_worker_restarts is None else self.max_worker_restarts,
            )
        if self.servers:
            raise UsageError(f"--launcher {launcher} has no servers; leave out --servers, or use --launcher parameter_server")
        if self.dialect == "master":
            raise UsageError(f"--launcher {launcher} knows no master; use --tf-config chief or workers")
        if self.max_worker_restarts:
            raise UsageError(
                f"--launcher {launcher} cannot start one worker again: its workers compute each step together; "
                "leave out --max-worker-restarts"
            )
        return dataclasses.replace(self, servers=0, max_worker_restarts=0)


# What Horovod's ranks agree by, and find each other through.
Controller = Literal["mpi", "gloo"]


@dataclass(frozen=True, kw_only=True)
class HorovodOptions:
    """The options of launcher ``horovod``, beside the number of ranks.

    ``controller`` None means MPI, or Gloo for an elastic job. A job is elastic when ``min_workers`` or ``max_workers`` is given:
    it begins with as many workers as were asked for, goes on while ``min_workers`` (None: 1) are left, and grows to
    ``max_workers`` (None: as many as its hosts have slots). ``discovery`` is a program that prints the hosts that there are now,
    one a line. ``elastic_timeout_s``: how long the job waits for a host when it has too few workers.

    Raises UsageError for what cannot be.
    """

    controller: Controller | None = None
    min_workers: int | None = None
    max_workers: int | None = None
    discovery: Path | None = None
    elastic_timeout_s: float | None = None

    def __post_init__(self) -> None:
        controllers = get_args(Controller)
        if self.controller is not None and self.controller not in controllers:
            raise UsageError(
                f"unknown --controller {self.controller!r}{did_you_mean(self.controller, controllers)}; "
                f"there are {', '.join(controllers)}"
            )
        for name, value in (("--min-workers", self.min_workers), ("--max-workers", self.max_workers)):
            if value is not None and value < 1:
                raise UsageError(f"{name} {value} is not a number from 1")
        if self.max_workers is not None and self.least > self.max_workers:
            raise UsageError(f"--min-workers {self.least} is more than --max-workers {self.max_workers}; change one of them")
        check_seconds("--elastic-timeout", self.elastic_timeout_s)
        if self.elastic and self.controller == "mpi":
            raise UsageError(
                "--controller mpi cannot lose a rank, or take one in: elastic jobs need Gloo; leave --controller out"
            )
        if not self.elastic and (self.discovery is not None or self.elastic_timeout_s is not None):
            name = "--discovery" if self.discovery is not None else "--elastic-timeout"
            raise UsageError(f"{name} is for an elastic job; say with --min-workers N how few workers it may go on with")

    @property
    def elastic(self) -> bool:
        return self.min_workers is not None or self.max_workers is not None

    @property
    def gloo(self) -> bool:
        return self.elastic or self.controller == "gloo"

    @property
    def least(self) -> int:
        """With how few workers an elastic job goes on."""
        return self.min_workers or 1


@dataclass(frozen=True, kw_only=True)
class Restarts:
    """How often the whole job is started again, from its newest whole checkpoint, and after which exit codes.

    The codes that are set are those of being killed from outside: Ctrl-C of a rank (130), SIGKILL (137: also what a machine that
    is out of memory sends), SIGTERM (143). A script's own failure (1, 2) would as a rule only repeat itself.
    """

    max_restarts: int = 0
    restart_on: tuple[int, ...] = (130, 137, 143)

    def __post_init__(self) -> None:
        if self.max_restarts < 0:
            raise UsageError(f"--max-restarts {self.max_restarts} is not a number from 0")
        for code in self.restart_on:
            if not 1 <= code <= 255:
                raise UsageError(f"--restart-on {code} is not an exit code; use numbers from 1 to 255, as 137,143")


@dataclass(frozen=True, kw_only=True)
class Hangs:
    """After how many seconds without progress a rank is taken to hang (None: never), and what is done then.

    ``heartbeat_timeout_s``: after how many seconds without a sign of life a rank, or a host, is lost (None: never).
    ``on_hang``: ``end`` the job, ``report`` and go on; ``auto`` ends it unless the rank told nothing through dtrain since
    ``dtrain.init()``, or is a task of a TensorFlow cluster: they may work in silence, which looks the same. But where every rank
    waits in a call of mpi4py for so long, none works.
    """

    hang_timeout_s: float | None = 600.0
    on_hang: Literal["auto", "end", "report"] = "auto"
    heartbeat_timeout_s: float | None = 30.0

    def __post_init__(self) -> None:
        check_seconds("--hang-timeout", self.hang_timeout_s)
        if self.heartbeat_timeout_s is not None and not 3 <= self.heartbeat_timeout_s < float("inf"):
            raise UsageError(f"--heartbeat-timeout {self.heartbeat_timeout_s:g} is not a number of seconds from 3; 0 is never")
        if self.on_hang not in ("auto", "end", "report"):
            raise UsageError(f"unknown --on-hang {self.on_hang!r}; there are auto, end, report")


# How ranks are started within an allocation: by srun, which speaks PMIx or PMI2 with the ranks' MPI, or by MPI's own mpirun.
SlurmStart = Literal["auto", "pmix", "pmi2", "mpirun"]

# Options of sbatch that are dtrain's own to give, and what stands for them.
_OWN_SBATCH = {
    **dict.fromkeys(("-N", "--nodes"), "--nodes"),
    **dict.fromkeys(("-n", "--ntasks"), "-n"),
    "--ntasks-per-node": "--tasks-per-node",
    **dict.fromkeys(
        ("-a", "--array", "-W", "--wait", "--wrap", "--parsable", "-D", "--chdir", "-o", "--output", "-e", "--error"), ""
    ),
}


def _own_sbatch(name: str) -> str | None:
    """What says an option of sbatch in dtrain's place, empty where nothing does; None for one that is the user's.

    As getopt_long(3) reads them: a value may follow a letter at once, and a long name may be cut short.
    """
    if not name.startswith("--"):
        return _OWN_SBATCH.get(name[:2])
    return next((use for own, use in _OWN_SBATCH.items() if len(name) > 2 and own.startswith(name)), None)


@dataclass(frozen=True, kw_only=True)
class SlurmOptions:
    """The options of launcher ``slurm``, beside the number of ranks. ``sbatch_args`` go to sbatch as they are.

    Raises UsageError for what cannot be.
    """

    nodes: int | None = None
    tasks_per_node: int | None = None
    sbatch_args: tuple[str, ...] = ()
    start: SlurmStart = "auto"

    def __post_init__(self) -> None:
        for name, value in (("--nodes", self.nodes), ("--tasks-per-node", self.tasks_per_node)):
            if value is not None and value < 1:
                raise UsageError(f"{name} {value} is not a number from 1")
        starts = get_args(SlurmStart)
        if self.start not in starts:
            raise UsageError(
                f"unknown --slurm-start {self.start!r}{did_you_mean(self.start, starts)}; there are {', '.join(starts)}"
            )
        for text in self.sbatch_args:
            name = text.partition("=")[0]
            if not name.startswith("-"):
                raise UsageError(f"--sbatch-arg {text!r} is no option of sbatch; write it in one, as --sbatch-arg=--time=10:00")
            if (own := _own_sbatch(name)) is not None:
                use = f"use {own}" if own else "dtrain needs it itself, or cannot go with it"
                raise UsageError(f"--sbatch-arg {text} cannot be given: {use}")

    def ranks(self, asked: int | None, allocated: int | None) -> int:
        """How many ranks: ``asked`` (``-n``), else what these options say, else those of the allocation, else one."""
        if self.tasks_per_node is None:
            ranks = asked or self.nodes or allocated or 1
            if self.nodes is not None and ranks < self.nodes:
                raise UsageError(f"-n {ranks} on --nodes {self.nodes} leaves nodes without a rank; lower --nodes, or raise -n")
            return ranks
        if self.nodes is None and asked is not None and asked % self.tasks_per_node:
            raise UsageError(f"-n {asked} is no multiple of --tasks-per-node {self.tasks_per_node}; change one of them")
        if self.nodes is None:
            return asked or self.tasks_per_node
        ranks = self.nodes * self.tasks_per_node
        if asked not in (None, ranks):
            raise UsageError(
                f"-n {asked} contradicts --nodes {self.nodes} x --tasks-per-node {self.tasks_per_node} = {ranks}; leave -n out"
            )
        return ranks
