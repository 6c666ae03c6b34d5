"""Launcher ``mpi``: mpirun of Open MPI or MPICH starts the ranks, on this host or on several by ssh."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from dtrain import env, resources
from dtrain.hosts import Host
from dtrain.job_options import available_cores
from dtrain.launch import ssh
from dtrain.launch.interfaces import interface_in
from dtrain.launch.mpi_families import MpiFamily, MpiInstallation
from dtrain.launch.places import Place, planned_hosts
from dtrain.launch.plan import LaunchPlan, PlannedProcess, rank_argv
from dtrain.launch.scratch import ON_HOSTS
from dtrain.layout import RunLayout
from dtrain.spec import JobSpec

# What an mpirun makes for its own ranks, or passes on by itself: of another one, where this job is started from within it.
_OF_AN_MPI = ("OMPI_", "PRTE_", "PMIX_", "PMI_", "HYDRA_", "HYDI_", "MPI_LOCAL")


def plan(
    spec: JobSpec,
    run: RunLayout,
    cwd: Path,
    mpi: MpiInstallation,
    places: Sequence[Place] = (),
    threads: Sequence[str] = resources.THREAD_VARIABLES,
) -> LaunchPlan:
    """Plan one mpirun that starts all ranks of ``spec``. Pure; ``cwd`` is the folder in which they will work.

    ``places`` has one for each rank, where the job has hosts; a host's ranks follow one another. Without, they are started here.
    ``threads`` names the variables that hold a rank's share of its host's cores.
    """
    family, cores = mpi.family, available_cores()
    environ = {**os.environ, **spec.environment}
    crowded = any(place.cores < count for place, count in _counted(places)) if places else spec.workers > cores
    # On other hosts a daemon of mpirun's makes the same folder; this host's TMPDIR may be none that they can have.
    scratch = (ON_HOSTS if places else Path(tempfile.gettempdir())) / f"dtrain-{run.id}-{run.attempt or 0}"
    own = {name: str(scratch) for name in family.scratch_variables}
    environment = {
        **resources.share_variables(spec.bind, rank_threads(spec, places), environ, threads),
        **env.launch_variables(
            run,
            size=spec.workers,
            vocabulary=family.vocabulary,
            resume_from=spec.resume_from,
            watched=spec.hangs.hang_timeout_s is not None,
        ),
        **(env.unsupervised_variables() if places else {}),
        **spec.open_environment,
    }
    remote, own_remote = _remote_flags(spec, family, places, environment) if places else ((), {})
    argv = (
        mpi.mpirun,
        *(family.flags_as_root if os.geteuid() == 0 else ()),
        *family.flags,
        *(family.flags_oversubscribed if crowded else ()),
        *remote,
        *("-n", str(spec.workers)),
        *rank_argv(spec),
    )
    process = PlannedProcess(
        name="mpirun", host=socket.gethostname(), argv=argv, environment={**own, **environment, **own_remote}, cwd=cwd
    )
    hosts = planned_hosts(places)
    return LaunchPlan(
        launcher="mpi", size=spec.workers, processes=(process,), scratch=scratch, other_hosts=hosts, noise=family.noise
    )


def rank_threads(spec: JobSpec, places: Sequence[Place]) -> list[int]:
    """Each rank's share of its host's cores."""
    if not places:
        return [max(1, available_cores() // spec.workers)]
    counts = dict(_counted(places))
    return [max(1, place.cores // counts[place]) for place in places]


def _counted(places: Sequence[Place]) -> list[tuple[Place, int]]:
    names = [place.host for place in places]
    return [(place, names.count(place.host)) for place in dict.fromkeys(places)]


def _remote_flags(
    spec: JobSpec, family: MpiFamily, places: Sequence[Place], environment: Mapping[str, str]
) -> tuple[tuple[str, ...], dict[str, str]]:
    """The flags of a job on several hosts, and the variables of mpirun's own."""
    labelled = any(Host(place.name).is_ipv6 or place.reached for place in places)
    names = [_label(place) for place in places]
    client = [sys.executable, "-m", "dtrain.launch.remote_shell"] if labelled else ["ssh"]
    options = [*client[1:], *ssh.CONNECT_OPTIONS]
    # What dtrain finds by itself is named better than what mpirun says of it: so mpirun is the later one to give a host up.
    silence_s = 2 * (spec.hangs.heartbeat_timeout_s or 3600.0)
    words = {
        "hosts": ",".join(f"{name}:{names.count(name)}" for name in dict.fromkeys(names)),
        "here": _own_address(places),
        "ssh": " ".join([client[0], *options]),
        "ssh_client": client[0],
        "ssh_options": " ".join(options),
        "idle": str(max(1, round(silence_s / 2))),
        "interval": str(max(1, round(silence_s / 12))),
        "probes": "6",
        **_network_words(spec, family),
    }
    passed = sorted(ssh.sent_variables().keys() | environment.keys() | env.secret_variables(spec.secret_values()).keys())
    passed = [name for name in passed if re.fullmatch(r"\w+", name) and not name.startswith(_OF_AN_MPI)]
    forward = family.remote.forward
    if "{names}" in forward:
        forwarded = [flag.format(names=",".join(passed)) for flag in forward]
    else:
        forwarded = [flag.format(name=name) for name in passed for flag in forward]
    flags = (
        *family.remote.hosts,
        *(family.remote.labels if labelled else ()),
        *(family.remote.network if spec.network else ()),
    )
    variables = {name: value.format(**words) for name, value in family.remote.variables.items()}
    return (*(flag.format(**words) for flag in flags), *forwarded), variables


def _label(place: Place) -> str:
    """What mpirun is to call a host: this one, where it goes by an IPv6 address, by the name that mpirun knows to be its own."""
    host = Host(place.name)
    return host.label if place.over_ssh or not host.is_ipv6 else socket.gethostname()


def _network_words(spec: JobSpec, family: MpiFamily) -> dict[str, str]:
    """What flags say of ``--network``. Of IPv6, Open MPI's daemons take an interface alone: so it has one name on all hosts."""
    if spec.network is None:
        return {}
    by_interface = any("{interface}" in flag for flag in family.remote.network)
    if ipaddress.ip_network(spec.network).version == 6 or by_interface:
        interface = interface_in(spec.network)
        return {"network": interface, "interface": interface}
    return {"network": spec.network}


def _own_address(places: Sequence[Place]) -> str:
    """The address of this host to which all others have connected, so far as they were asked; else its name."""
    tried = [place.reached for place in places if place.over_ssh and place.reached]
    common = [address for address in tried[0] if all(address in each for each in tried)] if tried else []
    return next(iter(common), socket.gethostname())
