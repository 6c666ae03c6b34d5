"""Where each rank goes: its host and, in a cluster, a port that is free there."""

from __future__ import annotations

import collections
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dtrain import resources
from dtrain.binding import HostTopology, plan_binding
from dtrain.errors import NotRunnable, UsageError
from dtrain.hosts import Host, place
from dtrain.job_options import MPI_LAUNCHERS, available_cores
from dtrain.launch import ssh
from dtrain.launch.checks import Answer, Report
from dtrain.launch.plan import BoundRank, PlannedHost
from dtrain.launch.ports import free_ports
from dtrain.launch.preflight import Wanted, ask_hosts
from dtrain.layout import Workspace
from dtrain.spec import JobSpec

_LOOPBACK = "127.0.0.1"
_UNSEEN = (
    "host {host}: does not see this workspace, which Horovod's ranks over Gloo have to: choose one on a file system that all "
    "hosts share (--workspace, DTRAIN_WORKSPACE), or start them by MPI (--controller mpi), which copies the run folder"
)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where one rank goes: ``name`` is how others reach the host, ``host`` what messages call it; ``cores`` are the host's.

    ``port`` is free there; 0 of ranks that need none. ``copied``: the host does not see the workspace, and is given a copy of the
    run folder. ``topology`` is the host's, where it was asked, and ``reached`` are the addresses at which it reaches this one.
    """

    host: str
    name: str
    port: int
    cores: int
    topology: HostTopology | None = None
    over_ssh: bool = False
    copied: bool = False
    reached: tuple[str, ...] = ()

    @property
    def address(self) -> str:
        return Host(self.name).address(self.port)


def find_places(spec: JobSpec, workspace: Workspace | None, say: Callable[[str], None] | None = None) -> list[Place]:
    """Ask the hosts of ``spec`` where its ranks can go. Blocks for seconds at most.

    Whether they see ``workspace`` is tried by a file in it; None: not tried. ``say`` shows what need not keep a job from running.
    Raises UsageError for hosts that do not go together, NotRunnable when one of them cannot be used: all that cannot are named,
    each with what to do.
    """
    count = spec.size
    if not spec.hosts:
        here, cores = socket.gethostname(), available_cores()
        return [Place(host=here, name=_LOOPBACK, port=port, cores=cores) for port in free_ports(count)]
    placed = place(count, spec.hosts)
    local = {host: ssh.is_here(host) for host in dict.fromkeys(placed)}
    check_loopback(placed)
    if spec.launcher_name in MPI_LAUNCHERS and not spec.horovod_options.gloo:
        _check_names([host for host, is_here in local.items() if is_here])
    reports = ask(spec, placed, workspace, say) if spec.preflight else {}
    answers = {host: report.answer for host, report in reports.items() if report.answer is not None}
    ports = {host: iter(answer.ports) for host, answer in answers.items()}
    copied = {host: _is_copied(spec, workspace, answers.get(host)) for host in placed if not local[host]}
    if say is not None and answers:
        _say_copied(spec, [host.name for host, is_copied in copied.items() if is_copied], say)
    return [
        Place(
            host=host.name,
            name=host.name,
            port=next(ports[host], 0) if host in ports else 0,
            cores=answers[host].topology.processors if host in answers else available_cores(),
            topology=answers[host].topology if host in answers else None,
            over_ssh=not local[host],
            copied=copied.get(host, False),
            reached=tuple(answers[host].reached) if host in answers else (),
        )
        for host in placed
    ]


def check_loopback(hosts: list[Host]) -> None:
    """Raises UsageError for hosts of which only some are named as no other one can reach them."""
    loops = [host.name for host in hosts if ssh.is_loopback(host)]
    if loops and not all(ssh.is_here(host) for host in set(hosts)):
        raise UsageError(f"other hosts cannot reach {loops[0]!r}; name this host as they do, as {socket.gethostname()}")


def _check_names(here: list[Host]) -> None:
    """Raises UsageError where this host has several names: mpirun gives it all its ranks at once, whatever stands between."""
    if len(here) > 1:
        names = " and ".join(host.name for host in here)
        once = Host(here[0].name).address(sum(host.slots for host in here))
        raise UsageError(f"{names} are the same host, this one; name it once, with all its slots, as {once}")


def planned_hosts(places: Sequence[Place]) -> tuple[PlannedHost, ...]:
    """The other hosts among ``places``, of which there is one for each rank, by their first ranks."""
    ranks: dict[str, list[int]] = {}
    for rank, each in enumerate(places):
        ranks.setdefault(each.host, []).append(rank)
    others = {each.host: each for each in places if each.over_ssh}
    return tuple(PlannedHost(name=name, ranks=tuple(ranks[name]), copied=each.copied) for name, each in others.items())


def bound_ranks(spec: JobSpec, places: Sequence[Place]) -> tuple[BoundRank, ...]:
    """What ``--bind`` gives each rank, by rank; without those on other hosts that were not asked.

    ``places`` has one for each rank; none: all are on this host. Raises UsageError for ranks that cannot be bound.
    """
    if spec.bind == "none":
        return ()
    here, found = socket.gethostname(), []
    hosts = [place.host for place in places] or [here] * spec.size
    topologies = {place.host: place.topology for place in places if place.over_ssh or place.topology is not None}
    for host in dict.fromkeys(hosts):
        topology = topologies[host] if host in topologies else HostTopology.read()
        ranks = [rank for rank, each in enumerate(hosts) if each == host]
        try:
            bindings = plan_binding(spec.bind, len(ranks), topology) if topology is not None else []
        except UsageError as error:
            raise UsageError(f"host {host}: {error}" if places else str(error)) from None
        found += [
            BoundRank(rank=rank, host=host, local_rank=local_rank, binding=binding)
            for local_rank, (rank, binding) in enumerate(zip(ranks, bindings, strict=False))
        ]
    return tuple(sorted(found, key=lambda each: each.rank))


def _is_copied(spec: JobSpec, workspace: Workspace | None, answer: Answer | None) -> bool:
    """Whether another host is given a copy of the run folder: it said that it does not see the workspace, or was not asked."""
    return not spec.shared_fs if workspace is None or answer is None else not answer.shared


def _say_copied(spec: JobSpec, copied: list[str], say: Callable[[str], None]) -> None:
    if copied and spec.shared_fs:
        see = f"{'hosts' if len(copied) > 1 else 'host'} {', '.join(copied)} {'do' if len(copied) > 1 else 'does'}"
        say(f"dtrain: {see} not see this workspace: the run folder is copied there, and what is written there is brought back")
    elif not copied and not spec.shared_fs:
        say("dtrain: --no-shared-fs has no effect: all hosts see this workspace")


def ask(spec: JobSpec, placed: list[Host], workspace: Workspace | None, say: Callable[[str], None] | None) -> dict[Host, Report]:
    """Ask the hosts, each once, of which ``placed`` holds one for each rank; as :func:`find_places`."""
    ranks, gloo = spec.launcher_name in MPI_LAUNCHERS, spec.horovod_options.gloo
    wanted = Wanted(
        ports=not ranks,
        mpi=ranks and not gloo,
        back=gloo,
        shared_fs=spec.shared_fs,
        python=spec.interpreter if spec.python is not None else "",
        network=spec.network or "",
        gpus=not resources.chooses_gpus({**os.environ, **spec.environment}),
    )
    reports = ask_hosts(collections.Counter(placed), workspace, wanted)
    problems = [said for report in reports.values() for said in report.of("problem")]
    if gloo:
        problems += [_UNSEEN.format(host=each.host) for each in reports.values() if each.answer and not each.answer.shared]
    if problems:
        raise NotRunnable("\ndtrain: ".join(problems))
    for said in (said for report in reports.values() for said in report.of("warning")):
        if say is not None:
            say(f"dtrain: {said}")
    return reports
