"""Groups of options of `dtrain run`, most of which fill one dataclass of the job's spec."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, get_args

import click

from dtrain.allocation import Allocation
from dtrain.errors import UsageError
from dtrain.hosts import Host, parse_hosts, read_hostfile
from dtrain.job_options import (
    MPI_LAUNCHERS,
    ClusterOptions,
    Controller,
    Hangs,
    HorovodOptions,
    Restarts,
    SlurmOptions,
    SlurmStart,
    default_max_ranks,
)
from dtrain.roles import DIALECTS
from dtrain.spec import JobSpec

F = TypeVar("F", bound=Callable[..., Any])


def _with(command: F, options: tuple[Callable[[F], F], ...]) -> F:
    for option in reversed(options):  # the last decorator is the first in the help
        command = option(command)
    return command


def cluster(command: F) -> F:
    """The fields of ClusterOptions; None where one was not given, so that one without a cluster can be refused."""
    options = (
        click.option("--servers", type=int, metavar="N", help="Parameter servers. [default: 1 with --launcher parameter_server]"),
        click.option("--chief", is_flag=True, default=None, help="A chief beside the workers, as TensorFlow 2 wants it."),
        click.option("--evaluator", is_flag=True, default=None, help="An evaluator beside the cluster."),
        click.option(
            "--tf-config",
            metavar="|".join(DIALECTS),
            help="Who leads in TF_CONFIG: a chief, worker 0, or a master. [default: chief with --chief, else workers]",
        ),
        click.option(
            "--start-timeout", "start_timeout_s", metavar="S", type=float, help="Seconds until a task must listen. [default: 120]"
        ),
        click.option(
            "--max-worker-restarts", type=int, metavar="K", help="Start a killed worker again, up to K times. [default: 3]"
        ),
    )
    return _with(command, options)


def limits(command: F) -> F:
    """How long the job may take, and how large it may be: fields of JobSpec itself."""
    options = (
        click.option(
            "--timeout", "timeout_s", metavar="S", type=float, help="Seconds until the job is ended with exit code 124."
        ),
        click.option(
            "--grace",
            "grace_s",
            metavar="S",
            type=float,
            default=JobSpec.grace_s,
            show_default=True,
            help="Seconds from telling ranks to end to killing them.",
        ),
        click.option(
            "--max-ranks",
            type=int,
            default=default_max_ranks(),
            show_default=True,
            metavar="N",
            help="Refuse more ranks than this.",
        ),
    )
    return _with(command, options)


def _take_cluster(given: dict[str, Any]) -> ClusterOptions | None:
    """Take the cluster's options out of ``given``; None when there are none."""
    values = {field.name: value for field in fields(ClusterOptions) if (value := given.pop(field.name)) is not None}
    return ClusterOptions(**values) if values else None


def host_names(command: F) -> F:
    """Which hosts; :func:`take_hosts` reads them."""
    options = (
        click.option(
            "-H",
            "--host",
            "hosts",
            metavar="NAME:SLOTS,...",
            help="Start ranks on these hosts, by ssh; they have this Python at the same path. [default: this host]",
        ),
        click.option(
            "--hostfile",
            metavar="FILE",
            type=click.Path(path_type=Path),
            help="The same from a file: `NAME slots=N` or `NAME:N` a line; an IPv6 address as `[fd00::1]:N`.",
        ),
    )
    return _with(command, options)


def hosts(command: F) -> F:
    """The hosts of JobSpec, and what belongs to them."""
    options = (
        host_names,
        click.option(
            "--network",
            metavar="CIDR",
            help="Network by which ranks of several hosts talk, as 10.0.0.0/24. [default: MPI's choice]",
        ),
        click.option(
            "--skip-preflight", "preflight", flag_value=False, default=True, help="Start without asking the hosts first."
        ),
        click.option(
            "--no-shared-fs",
            "shared_fs",
            flag_value=False,
            default=True,
            help="Copy the run folder to hosts that do not see the workspace, and bring back what they write.",
        ),
    )
    return _with(command, options)


def python(command: F) -> F:
    """The Python of the ranks."""
    option = click.option(
        "--python",
        metavar="PATH",
        type=click.Path(path_type=Path),
        help="Python that runs the ranks, with dtrain installed, as .venv/bin/python. [default: the one that runs dtrain]",
    )
    return option(command)


def take_python(given: dict[str, Any]) -> str:
    """Take that out of ``given``, as an absolute path; empty where it was not given."""
    path: Path | None = given.pop("python")
    return "" if path is None else str(path.absolute())


def take_hosts(given: dict[str, Any]) -> tuple[Host, ...]:
    """Take the hosts' options out of ``given``."""
    text, path = given.pop("hosts"), given.pop("hostfile")
    if text is not None and path is not None:
        raise UsageError("-H and --hostfile exclude each other; give one of them")
    if path is not None:
        return read_hostfile(path)
    return parse_hosts(text) if text is not None else ()


def horovod(command: F) -> F:
    """The fields of HorovodOptions; None where one was not given, so that one without Horovod can be refused."""
    options = (
        click.option(
            "--controller",
            metavar="|".join(get_args(Controller)),
            help="Horovod: by what ranks agree. [default: mpi; gloo for an elastic job]",
        ),
        click.option(
            "--min-workers",
            type=int,
            metavar="N",
            help="Horovod, elastic: workers may die or leave, while N are left. [default: 1]",
        ),
        click.option(
            "--max-workers", type=int, metavar="N", help="Horovod, elastic: grow to N workers. [default: the hosts' slots]"
        ),
        click.option(
            "--discovery",
            metavar="PROGRAM",
            type=click.Path(path_type=Path),
            help="Horovod, elastic: prints the hosts that there are now, NAME:SLOTS a line; asked every second.",
        ),
        click.option(
            "--elastic-timeout",
            "elastic_timeout_s",
            metavar="S",
            type=float,
            help="Horovod, elastic: wait so long for a host when there are too few workers. [default: 600]",
        ),
    )
    return _with(command, options)


def _take_horovod(given: dict[str, Any]) -> HorovodOptions | None:
    """Take Horovod's options out of ``given``; None when there are none."""
    values = {field.name: value for field in fields(HorovodOptions) if (value := given.pop(field.name)) is not None}
    if "discovery" in values:
        values["discovery"] = values["discovery"].absolute()
    return HorovodOptions(**values) if values else None


def slurm(command: F) -> F:
    """The fields of SlurmOptions; None where one was not given, so that one without Slurm can be refused."""
    options = (
        click.option("--nodes", type=int, metavar="N", help="Slurm: nodes of the job."),
        click.option("--tasks-per-node", type=int, metavar="N", help="Slurm: ranks on each node."),
        click.option(
            "--sbatch-arg", "sbatch_args", metavar="ARG", multiple=True, help="Slurm: an option for sbatch, as --time=1:00:00."
        ),
        click.option(
            "--slurm-start",
            "start",
            metavar="|".join(get_args(SlurmStart)),
            help="Slurm: ranks by srun with this plugin, or by mpirun. [default: by srun where that works]",
        ),
        click.option("--detach", is_flag=True, help="Slurm: submit, and do not wait for the end."),
    )
    return _with(command, options)


def _take_slurm(given: dict[str, Any], hosts: tuple[Host, ...]) -> dict[str, Any]:
    """Take Slurm's options out of ``given``, and the launcher and the number of ranks, which depend on them.

    Within an allocation Slurm is the launcher that nobody has to name. Of MPI's hosts there are as many ranks as they have slots.
    """
    values = {field.name: value for field in fields(SlurmOptions) if (value := given.pop(field.name))}
    options = SlurmOptions(**values) if values else None
    launcher, workers = given.pop("launcher"), given.pop("workers")
    if launcher == "slurm" or (launcher is None and not hosts):
        allocation = Allocation.read()
        launcher = "slurm" if allocation is not None else launcher
        if launcher == "slurm":
            workers = (options or SlurmOptions()).ranks(workers, allocation.tasks if allocation is not None else None)
    if workers is None:
        workers = sum(host.slots for host in hosts) if hosts and launcher in (None, *MPI_LAUNCHERS) else 1
    return {"slurm": options, "launcher": launcher, "workers": workers}


def restarts(command: F) -> F:
    """The fields of Restarts."""
    codes = ",".join(map(str, Restarts.restart_on))
    options = (
        click.option(
            "--max-restarts",
            type=int,
            metavar="K",
            default=Restarts.max_restarts,
            show_default=True,
            help="Start the whole job again from its newest checkpoint, up to K times.",
        ),
        click.option(
            "--restart-on", metavar="CODES", default=codes, show_default=True, help="Exit codes after which that is done."
        ),
    )
    return _with(command, options)


def _take_restarts(given: dict[str, Any]) -> Restarts:
    """Take the restarts' options out of ``given``."""
    text, most = given.pop("restart_on"), given.pop("max_restarts")
    try:
        codes = tuple(int(code) for code in text.split(","))
    except ValueError:
        raise UsageError(f"--restart-on {text!r} is not a list of exit codes; use numbers from 1 to 255, as 137,143") from None
    return Restarts(max_restarts=most, restart_on=codes)


def hangs(command: F) -> F:
    """The fields of Hangs."""
    options = (
        click.option(
            "--hang-timeout",
            metavar="S",
            type=float,
            help=f"Seconds without progress after which a rank hangs; 0: never. [default: {Hangs.hang_timeout_s:g}]",
        ),
        click.option(
            "--heartbeat-timeout",
            metavar="S",
            type=float,
            default=Hangs.heartbeat_timeout_s,
            show_default=True,
            help="Seconds without a sign of life after which a rank or a host is lost; 0: never.",
        ),
        click.option(
            "--on-hang",
            metavar="auto|end|report",
            help="What is done then; auto only reports who told dtrain nothing, unless all ranks wait in mpi4py. "
            "[default: end with --hang-timeout, else auto]",
        ),
    )
    return _with(command, options)


def _take_hangs(given: dict[str, Any]) -> Hangs:
    """Take the hangs' options out of ``given``."""
    timeout_s, on_hang, heartbeat_s = given.pop("hang_timeout"), given.pop("on_hang"), given.pop("heartbeat_timeout")
    if on_hang is None:
        on_hang = Hangs.on_hang if timeout_s is None else "end"
    timeout_s = Hangs.hang_timeout_s if timeout_s is None else timeout_s
    return Hangs(hang_timeout_s=timeout_s or None, on_hang=on_hang, heartbeat_timeout_s=heartbeat_s or None)


def take_parts(given: dict[str, Any]) -> dict[str, Any]:
    """Take the options of all groups out of ``given``, as the fields of JobSpec that they fill."""
    hosts, horovod = take_hosts(given), _take_horovod(given)
    if given["workers"] is None and horovod is not None and horovod.elastic:
        given["workers"] = horovod.least
    return {
        **_take_slurm(given, hosts),
        "horovod": horovod,
        "cluster": _take_cluster(given),
        "hosts": hosts,
        "restarts": _take_restarts(given),
        "hangs": _take_hangs(given),
    }
