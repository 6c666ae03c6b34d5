"""The MPIs that dtrain knows, as data, and which of them is installed."""

from __future__ import annotations

import ipaddress
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dtrain import env, install
from dtrain.errors import MissingDependency, NotRunnable, UsageError


@dataclass(frozen=True, kw_only=True)
class RemoteFlags:
    """How an mpirun is told of other hosts: flags in which ``{...}`` is filled in, and variables of its own.

    ``{hosts}``: LABEL:SLOTS,...; ``{ssh}``: the ssh client with its options, ``{ssh_client}`` its program and ``{ssh_options}``
    the rest; ``{network}`` as the user gave it, ``{interface}`` this host's in it, ``{here}`` its address or name, to which the
    others connect; ``{idle}``, ``{interval}`` and ``{probes}`` of TCP's keepalive.
    """

    hosts: tuple[str, ...]
    network: tuple[str, ...]
    labels: tuple[str, ...]
    """Where some hosts are named by IPv6 addresses, so that mpirun knows them by their labels alone; or by names of such."""
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
    ipv6_told: tuple[str, str, str] | None = None
    """What tells that it was built without IPv6: a program beside mpirun, its option, and the line; None: it always is."""
    only_allocated: bool = False
    """Within a Slurm job its mpirun takes no host that is not the job's."""
    noise: str = ""
    """Regular expression for what mpirun prints that means nothing."""


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
            labels=(),
            forward=("-x", "{name}"),
            variables={},
        ),
        # It moves its ssh client into a process group of its own, when that has perhaps done so already.
        noise=r"plm:ssh: Warning: setpgid",
        ipv6_told=("ompi_info", "--parsable", "options:ipv6:no"),
        only_allocated=True,
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
            # Its daemons know IPv4 alone, and connect to an address: hosts that are named by addresses may not know this one's
            # name. And ranks are not to take a label for their host's name.
            labels=("-launcher-exec", "{ssh_client}", "-localhost", "{here}", "-disable-hostname-propagation"),
            forward=("-genvlist", "{names}"),
            # Of a list of variables, mpiexec 5.0.2 does not pass on the one that comes last in its own environment.
            variables={"HYDRA_LAUNCHER_EXTRA_ARGS": "{ssh_options}", env.LAST: ""},
        ),
    ),
)


@dataclass(frozen=True, kw_only=True)
class MpiInstallation:
    """An mpirun and the family it is of."""

    mpirun: str
    family: MpiFamily
    version: str


def has_ipv6(mpi: MpiInstallation) -> bool:
    """Whether its ranks and daemons can talk by IPv6; taken to be so where it cannot be asked. Blocks for a moment."""
    if mpi.family.ipv6_told is None:
        return False
    program, option, without = mpi.family.ipv6_told
    try:
        argv = [str(Path(mpi.mpirun).with_name(program)), option]
        said = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return True
    return without not in said.splitlines()


def check_network(network: str, mpi: MpiInstallation) -> None:
    """Raises UsageError for a network of IPv6 and an MPI that knows none: it would talk by IPv4. Blocks for a moment."""
    if ipaddress.ip_network(network).version == 6 and not has_ipv6(mpi):
        raise UsageError(
            f"--network {network} is of IPv6, and {mpi.family.title} {mpi.version} knows none; name a network of IPv4 that all "
            f"hosts have, or use an Open MPI that was built with it ({install.MPI})"
        )


def find_mpi(python: str = "") -> MpiInstallation:
    """Find mpirun: ``$DTRAIN_MPIRUN``, else the one beside the ranks' ``python`` (empty: this one), else the one beside this
    Python, else the first on PATH; asks it for its version.

    Raises MissingDependency when there is none, NotRunnable when it cannot be run or is of no known MPI.
    """
    python = python or sys.executable
    beside = (Path(each).parent / "mpirun" for each in (python, sys.executable))
    mpirun = env.mpirun_override() or next((str(path) for path in beside if path.is_file()), None) or shutil.which("mpirun")
    if mpirun is None:
        raise MissingDependency(
            f"MPI is not installed: there is no mpirun beside {python} or on PATH; {install.MPI} brings Open MPI"
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
