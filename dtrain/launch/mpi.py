"""Launcher ``mpi``: mpirun of Open MPI or MPICH starts the ranks, on this host or on several by ssh."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from dtrain import env, install
from dtrain.errors import MissingDependency, NotRunnable, UsageError
from dtrain.launch import ssh
from dtrain.launch.places import Place
from dtrain.launch.plan import LaunchPlan, PlannedHost, PlannedProcess, rank_argv
from dtrain.layout import RunLayout
from dtrain.spec import JobSpec, available_cores


@dataclass(frozen=True, kw_only=True)
class RemoteFlags:
    """How an mpirun is told of other hosts: flags in which ``{...}`` is filled in, and variables of its own.

    ``{hosts}``: NAME:SLOTS,...; ``{ssh}``: the ssh client with its options, ``{ssh_options}`` the options alone; ``{network}`` as
    the user gave it, ``{interface}`` this host's in it; ``{idle}``, ``{interval}`` and ``{probes}`` of TCP's keepalive.
    """

    hosts: tuple[str, ...]
    network: tuple[str, ...]
    forward: tuple[str, ...]
    """Before each variable's name (``{name}``), or once before all of them (``{names}``). Values stay off the command line."""
    variables: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class MpiFamily:
    """What differs between MPIs: how one is recognised, the variables it gives its ranks, and its flags."""

    title: str
    recognised_by: str
    """Regular expression over what ``mpirun --version`` prints; its first group is the version."""
    vocabulary: str
    flags: tuple[str, ...]
    remote: RemoteFlags
    flags_as_root: tuple[str, ...] = ()
    flags_oversubscribed: tuple[str, ...] = ()
    scratch_variables: tuple[str, ...] = ()
    """Those that say where it keeps what belongs to one launch."""


# Binding is left off: mpirun would bind each rank to one core, also when threads were asked for. A rank that waits
# spins, unless told to yield; with 6 ranks on 2 cores an iteration then takes 133 ms instead of 820.
FAMILIES: tuple[MpiFamily, ...] = (
    MpiFamily(
        title="Open MPI",
        recognised_by=r"\(Open MPI\) (\S+)",
        vocabulary="openmpi",
        flags=("--bind-to", "none", "--map-by", "slot:OVERSUBSCRIBE"),
        flags_as_root=("--allow-run-as-root",),
        flags_oversubscribed=("--mca", "mpi_yield_when_idle", "1"),
        # Its folder /tmp/ompi.PID outlives an mpirun that is killed, and a later one that is given the same process id refuses to
        # start ("The PMIx server's listener thread failed to start"). The names are those of version 5 and of version 4.
        # Without tree spawn it is this host alone that has to reach the others by ssh. Its daemons know a lost host only by TCP's
        # keepalive, of which the system's own time is two hours.
        remote=RemoteFlags(
            hosts=(
                *("--host", "{hosts}", "--prtemca", "plm_ssh_agent", "{ssh}", "--prtemca", "plm_ssh_no_tree_spawn", "1"),
                *("--prtemca", "oob_tcp_keepalive_time", "{idle}", "--prtemca", "oob_tcp_keepalive_intvl", "{interval}"),
                *("--prtemca", "oob_tcp_keepalive_probes", "{probes}"),
            ),
            network=("--mca", "btl_tcp_if_include", "{network}", "--prtemca", "prte_if_include", "{network}"),
            forward=("-x", "{name}"),
            variables={},
        ),
        scratch_variables=("PRTE_MCA_prte_tmpdir_base", "OMPI_MCA_orte_tmpdir_base"),
    ),
    MpiFamily(
        title="MPICH",
        recognised_by=r"HYDRA build details:\s+Version:\s+(\S+)",
        vocabulary="pmi",
        flags=("-bind-to", "none"),
        remote=RemoteFlags(
            hosts=("-launcher", "ssh", "-hosts", "{hosts}"),
            network=("-iface", "{interface}"),
            forward=("-genvlist", "{names}"),
            variables={"HYDRA_LAUNCHER_EXTRA_ARGS": "{ssh_options}"},
        ),
    ),
)


@dataclass(frozen=True, kw_only=True)
class MpiInstallation:
    """An mpirun and the family it is of."""

    mpirun: str
    family: MpiFamily
    version: str


def find_mpi() -> MpiInstallation:
    """Find mpirun: ``$DTRAIN_MPIRUN``, else the one beside this Python, else the first on PATH; asks it for its version.

    Raises MissingDependency when there is none, NotRunnable when it cannot be run or is of no known MPI.
    """
    beside_python = Path(sys.executable).parent / "mpirun"
    mpirun = env.mpirun_override() or (str(beside_python) if beside_python.is_file() else shutil.which("mpirun"))
    if mpirun is None:
        raise MissingDependency(
            f"MPI is not installed: there is no mpirun beside {sys.executable} or on PATH; {install.MPI} brings Open MPI"
        )
    try:
        answer = subprocess.run([mpirun, "--version"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        failed = NotRunnable(f"{mpirun} cannot be run: {error}; {install.MPI} brings Open MPI")
        failed.exit_code = 126 if isinstance(error, PermissionError) else failed.exit_code
        raise failed from error
    text = answer.stdout + answer.stderr
    for family in FAMILIES:
        match = re.search(family.recognised_by, text)
        if match:
            return MpiInstallation(mpirun=mpirun, family=family, version=match[1])
    known = " and ".join(family.title for family in FAMILIES)
    raise NotRunnable(
        f"{mpirun} is of no MPI that dtrain knows ({known}); `{mpirun} --version` printed {text.strip()[:200]!r}; "
        f"{install.MPI} brings Open MPI"
    )


def plan(
    spec: JobSpec,
    run: RunLayout,
    cwd: Path,
    mpi: MpiInstallation,
    places: Sequence[Place] = (),
    threads: Sequence[str] = env.THREAD_VARIABLES,
) -> LaunchPlan:
    """Plan one mpirun that starts all ranks of ``spec``. Pure; ``cwd`` is the folder in which they will work.

    ``places`` has one for each rank, where the job has hosts; a host's ranks follow one another. Without, they are started here.
    ``threads`` names the variables that hold a rank's share of its host's cores.
    """
    family, cores = mpi.family, available_cores()
    environ = {**os.environ, **spec.environment}
    crowded = any(place.cores < count for place, count in _counted(places)) if places else spec.workers > cores
    scratch = Path(tempfile.gettempdir()) / f"dtrain-{run.id}"
    own = {name: str(scratch) for name in family.scratch_variables}
    environment = {
        **_thread_variables(spec, places, threads, environ),
        **env.launch_variables(run, size=spec.workers, vocabulary=family.vocabulary, resume_from=spec.resume_from),
        **(env.unsupervised_variables() if places else {}),
        **spec.environment,
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
        name="mpirun", host=socket.gethostname(), argv=argv, environment={**own, **own_remote, **environment}, cwd=cwd
    )
    ranks = {place.host: tuple(r for r, each in enumerate(places) if each.host == place.host) for place in places}
    hosts = tuple(PlannedHost(name=name, ranks=ranks[name]) for name in dict.fromkeys(p.host for p in places if p.over_ssh))
    return LaunchPlan(launcher="mpi", size=spec.workers, processes=(process,), scratch=scratch, other_hosts=hosts)


def _thread_variables(spec: JobSpec, places: Sequence[Place], names: Sequence[str], environ: Mapping[str, str]) -> dict[str, str]:
    """mpirun gives all ranks the same environment: where hosts differ, each rank takes its own number out of a list."""
    if not places:
        return env.thread_variables(available_cores(), spec.workers, environ, names)
    counts = dict(_counted(places))
    return env.thread_variables_by_rank([max(1, place.cores // counts[place]) for place in places], environ, names)


def _counted(places: Sequence[Place]) -> list[tuple[Place, int]]:
    names = [place.host for place in places]
    return [(place, names.count(place.host)) for place in dict.fromkeys(places)]


def _remote_flags(
    spec: JobSpec, family: MpiFamily, places: Sequence[Place], environment: Mapping[str, str]
) -> tuple[tuple[str, ...], dict[str, str]]:
    """The flags of a job on several hosts, and the variables of mpirun's own."""
    names = [place.name for place in places]
    options = [*ssh.CONNECT_OPTIONS]
    # What dtrain finds by itself is named better than what mpirun says of it: so mpirun is the later one to give a host up.
    silence_s = 2 * (spec.hangs.heartbeat_timeout_s or 3600.0)
    words = {
        "hosts": ",".join(f"{name}:{names.count(name)}" for name in dict.fromkeys(names)),
        "ssh": " ".join(["ssh", *options]),
        "ssh_options": " ".join(options),
        "idle": str(max(1, round(silence_s / 2))),
        "interval": str(max(1, round(silence_s / 12))),
        "probes": "6",
        "network": spec.network or "",
        "interface": interface_in(spec.network) if spec.network and "{interface}" in family.remote.network else "",
    }
    passed = sorted(env.sent_variables().keys() | environment.keys())
    passed = [name for name in passed if re.fullmatch(r"\w+", name) and not name.startswith(("OMPI_", "PRTE_", "PMIX_"))]
    forward = family.remote.forward
    if "{names}" in forward:
        forwarded = [flag.format(names=",".join(passed)) for flag in forward]
    else:
        forwarded = [flag.format(name=name) for name in passed for flag in forward]
    flags = (*family.remote.hosts, *(family.remote.network if spec.network else ()))
    variables = {name: value.format(**words) for name, value in family.remote.variables.items()}
    return (*(flag.format(**words) for flag in flags), *forwarded), variables


def interface_in(network: str) -> str:
    """The interface of this host that is in a network; raises UsageError when there is none."""
    wanted, found = ipaddress.ip_network(network), []
    interfaces: dict[str, list[Any]] = psutil.net_if_addrs()
    for name, addresses in interfaces.items():
        for each in addresses:
            with contextlib.suppress(ValueError):
                address = ipaddress.ip_address(each.address)
                if address in wanted:
                    return name
                found.append(f"{name} {address}")
    raise UsageError(f"--network {network}: no interface of this host is in it; there are {', '.join(found)}")
