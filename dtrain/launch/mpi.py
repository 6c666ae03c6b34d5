"""Launcher ``mpi``: mpirun of Open MPI or MPICH starts the ranks on this host."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from dtrain import env, install
from dtrain.errors import MissingDependency, NotRunnable
from dtrain.launch.plan import LaunchPlan, PlannedProcess, rank_argv
from dtrain.layout import RunLayout
from dtrain.spec import JobSpec, available_cores


@dataclass(frozen=True, kw_only=True)
class MpiFamily:
    """What differs between MPIs: how one is recognised, the variables it gives its ranks, and its flags."""

    title: str
    recognised_by: str
    """Regular expression over what ``mpirun --version`` prints; its first group is the version."""
    vocabulary: str
    flags: tuple[str, ...]
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
        scratch_variables=("PRTE_MCA_prte_tmpdir_base", "OMPI_MCA_orte_tmpdir_base"),
    ),
    MpiFamily(
        title="MPICH",
        recognised_by=r"HYDRA build details:\s+Version:\s+(\S+)",
        vocabulary="pmi",
        flags=("-bind-to", "none"),
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


def plan(spec: JobSpec, run: RunLayout, cwd: Path, mpi: MpiInstallation) -> LaunchPlan:
    """Plan one mpirun that starts all ranks of ``spec`` here. Pure; ``cwd`` is the folder in which they will work."""
    family, cores = mpi.family, available_cores()
    argv = (
        mpi.mpirun,
        *(family.flags_as_root if os.geteuid() == 0 else ()),
        *family.flags,
        *(family.flags_oversubscribed if spec.workers > cores else ()),
        *("-n", str(spec.workers)),
        *rank_argv(spec),
    )
    scratch = Path(tempfile.gettempdir()) / f"dtrain-{run.id}"
    environment = {
        **{name: str(scratch) for name in family.scratch_variables},
        **env.thread_variables(cores, spec.workers, {**os.environ, **spec.environment}),
        **env.launch_variables(run, size=spec.workers, vocabulary=family.vocabulary, resume_from=spec.resume_from),
        **spec.open_environment,
    }
    process = PlannedProcess(name="mpirun", host=socket.gethostname(), argv=argv, environment=environment, cwd=cwd)
    return LaunchPlan(launcher="mpi", size=spec.workers, processes=(process,), scratch=scratch)
