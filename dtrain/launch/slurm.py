"""Launcher ``slurm``: outside an allocation a job for sbatch, inside one the ranks, by srun or MPI's own mpirun."""

from __future__ import annotations

import collections
import dataclasses
import os
import shlex
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dtrain import env, resources
from dtrain.allocation import Allocation
from dtrain.errors import MissingDependency, NotRunnable, UsageError, WorkspaceError
from dtrain.hosts import place
from dtrain.launch import mpi, ssh
from dtrain.launch.mpi_families import MpiInstallation, find_mpi
from dtrain.launch.plan import LaunchPlan, PlannedProcess, rank_argv
from dtrain.layout import RunLayout, Workspace
from dtrain.spec import JobSpec
from dtrain.status import listed

_ANSWER_S = 60.0
# What srun calls the plugin by which ranks of an MPI find one another.
_PLUGINS: dict[str, Literal["pmix", "pmi2"]] = {"Open MPI": "pmix", "MPICH": "pmi2"}
# srun: error: node2: tasks 1-3: Exited with exit code 2
_TASKS_ENDED = r"^srun: error: (?P<host>\S+): tasks? (?P<ranks>[\d,-]+): (?P<how>.+)"


@dataclass(frozen=True, kw_only=True)
class Start:
    """How the ranks of an allocation are started: by srun with a plugin for their MPI, or by mpirun. ``mpi`` None: none."""

    by: Literal["pmix", "pmi2", "none", "mpirun"]
    mpi: MpiInstallation | None

    @property
    def title(self) -> str:
        if self.by == "mpirun" and self.mpi is not None:
            return f"mpirun of {self.mpi.family.title} {self.mpi.version}"
        return "srun" if self.by == "none" else f"srun with {'PMIx' if self.by == 'pmix' else 'PMI2'}"


def submission(spec: JobSpec, run: RunLayout, cwd: Path) -> LaunchPlan:
    """Plan the call of sbatch. Pure. On the job's first node ``dtrain.launch.batch`` then plans and supervises the ranks."""
    options = spec.slurm_options
    nodes = [f"--nodes={options.nodes}"] if options.nodes is not None else []
    per_node = [f"--ntasks-per-node={options.tasks_per_node}"] if options.tasks_per_node is not None else []
    argv = (
        *("sbatch", "--parsable", f"--job-name={spec.experiment_name}", f"--chdir={cwd}"),
        *(f"--output={_no_pattern(run.slurm_log)}", "--open-mode=append"),
        *nodes,
        f"--ntasks={spec.workers}",
        *per_node,
        *options.sbatch_args,
        *("--wrap", f"exec {shlex.join([sys.executable, '-m', 'dtrain.launch.batch', str(run.root)])}"),
    )
    process = PlannedProcess(name="sbatch", host=socket.gethostname(), argv=argv, environment={}, cwd=cwd)
    share = _share(spec, options.tasks_per_node, "what Slurm will give the job on its node (--sbatch-arg=--exclusive: all of it)")
    return LaunchPlan(launcher="slurm", size=spec.workers, processes=(process,), share=share)


def _share(spec: JobSpec, per_node: int | None, given: str) -> str:
    """What ``--bind`` will give each rank of what is ``given``, in words; ``per_node`` None: it is open how many share that."""
    if spec.bind == "none":
        return ""
    part = "an equal share" if per_node is None else f"one of {per_node} equal shares"
    what = f"{part} of the cores" if spec.bind == "core" else "the cores of a NUMA node"
    return f"--bind {spec.bind}: each rank is bound to {what} of {given}; which these are Slurm decides when the job runs"


def _no_pattern(path: Path) -> str:
    return str(path).replace("%", "%%")


def plan(spec: JobSpec, run: RunLayout, cwd: Path, *, allocation: Allocation, start: Start) -> LaunchPlan:
    """Plan the srun or mpirun that starts all ranks of ``spec`` on the nodes of ``allocation``. Pure."""
    nodes = min(spec.slurm_options.nodes or allocation.nodes, spec.workers)
    per_node = spec.slurm_options.tasks_per_node or -(-spec.workers // nodes)
    cpus = per_node * allocation.cpus_per_task if allocation.cpus_per_task is not None else allocation.cpus
    environ = {**os.environ, **spec.environment}
    common = {**resources.share_variables(spec.bind, [max(1, cpus // per_node)], environ), **env.order_variables()}
    even = per_node if nodes * per_node == spec.workers else None
    share = _share(spec, even, f"what Slurm gave job {allocation.job_id} on its node{_cpus(allocation)}")
    if start.by == "mpirun":
        assert start.mpi is not None
        planned = mpi.plan(spec, run, cwd, start.mpi)
        (process,) = planned.processes
        # Its daemons would make a scratch folder on every node, and no agent of dtrain's is there to remove it.
        own = {name: value for name, value in process.environment.items() if name not in start.mpi.family.scratch_variables}
        process = dataclasses.replace(process, environment={**own, **common, **spec.open_environment}, name=start.title)
        return dataclasses.replace(planned, launcher="slurm", processes=(process,), ordered=True, scratch=None, share=share)
    environment = {
        **common,
        **_own_mpi(spec, start),
        **env.launch_variables(
            run,
            size=spec.workers,
            vocabulary="slurm",
            resume_from=spec.resume_from,
            watched=spec.hangs.hang_timeout_s is not None,
        ),
        **spec.open_environment,
    }
    argv = (
        # Beside other steps of the allocation, such as the one that an interactive shell is; who ends what is dtrain's to say.
        *("srun", "--overlap", "--kill-on-bad-exit=0", "--wait=0", "--export=ALL", f"--mpi={start.by}"),
        *(f"--nodes={nodes}", f"--ntasks={spec.workers}"),
        *([f"--ntasks-per-node={even}"] if even is not None else []),
        *([f"--cpus-per-task={allocation.cpus_per_task}"] if allocation.cpus_per_task is not None else []),
        # The ranks of a node share out what Slurm gave the job there (_rank_main._bind), as under any launcher.
        *(["--cpu-bind=none"] if spec.bind != "none" else []),
        # Slurm asks for munge, which a PMIx of one's own (Open MPI's wheel) as a rule has not; unset, both take what they share.
        *(("env", "-u", "PMIX_SECURITY_MODE") if start.by == "pmix" else ()),
        *rank_argv(spec),
    )
    process = PlannedProcess(name=start.title, host=socket.gethostname(), argv=argv, environment=environment, cwd=cwd)
    return LaunchPlan(launcher="slurm", size=spec.workers, processes=(process,), ordered=True, ended=_TASKS_ENDED, share=share)


def _cpus(allocation: Allocation) -> str:
    """How many CPUs of its nodes an allocation has, where Slurm says it, to follow other words."""
    counts = collections.Counter(allocation.cpus_by_node)
    said = (f"{cpus} CPUs on {'each of ' if nodes > 1 else ''}{nodes} node{'s' * (nodes > 1)}" for cpus, nodes in counts.items())
    return f" ({', '.join(said)})" if counts else ""


def _own_mpi(spec: JobSpec, start: Start) -> dict[str, str]:
    """Where Open MPI from its wheel finds its parts: its mpirun would say so, srun does not."""
    if start.by != "pmix" or start.mpi is None:
        return {}
    folder = Path(start.mpi.mpirun).parent
    if folder not in (Path(spec.interpreter).parent, Path(sys.executable).parent):
        return {}
    return {name: str(folder.parent) for name in ("OPAL_PREFIX", "PMIX_PREFIX") if name not in os.environ}


def check_room(spec: JobSpec, allocation: Allocation, start: Start) -> None:
    """Raises UsageError for more nodes than the allocation has, or more ranks than srun starts there. Pure."""
    options, job = spec.slurm_options, f"Slurm job {allocation.job_id}"
    if (options.nodes or 0) > allocation.nodes:
        raise UsageError(
            f"--nodes {options.nodes} exceeds the {allocation.nodes} of {job}; lower it, or ask Slurm for more nodes"
        )
    if start.by == "mpirun" or not allocation.cpus_by_node:
        return
    room = allocation.room(options.nodes or allocation.nodes, options.tasks_per_node)
    if spec.workers > room:
        share = f", {allocation.cpus_per_task} for each task (--cpus-per-task)" if allocation.cpus_per_task is not None else ""
        has = f"{sum(allocation.cpus_by_node)} CPUs on {allocation.nodes} nodes{share}"
        raise UsageError(
            f"-n {spec.workers} exceeds the room in {job}: of {has}, srun starts {room} ranks at most; lower -n, ask Slurm for "
            f"more (salloc --ntasks={spec.workers}), or let ranks share CPUs (--slurm-start mpirun)"
        )


def check_hosts(spec: JobSpec, allocation: Allocation) -> None:
    """Raises UsageError for hosts of ``spec`` that are not the allocation's. Asks Slurm for its nodes, which takes a moment."""
    nodes, here = hostnames(allocation), os.uname().nodename

    def is_node(name: str) -> bool:
        return name in nodes or name.partition(".")[0] in nodes

    # This host goes by many names; it is none of the nodes where it is the one that salloc was called on.
    used = [host for host in dict.fromkeys(place(spec.size, spec.hosts)) if not is_node(host.name)]
    if outside := [host.name for host in used if not (ssh.is_here(host) and is_node(here))]:
        raise UsageError(
            f"{'hosts' if len(outside) > 1 else 'host'} {listed(outside)}: not in Slurm job {allocation.job_id}, which has "
            f"{listed(nodes)}, and within the job mpirun takes no others; name those, by these names, or leave out -H and "
            "--hostfile to use them all"
        )


def check_sight(spec: JobSpec, allocation: Allocation, workspace: Workspace) -> None:
    """See that every node of the allocation has what a rank needs there: the workspace, and its Python at the same path.

    Blocks for a moment. Raises WorkspaceError and NotRunnable with the node and the path.
    """
    from dtrain.launch.preflight import seen_file

    look = 'for path; do [ -e "$path" ] || echo "unseen:$SLURMD_NODENAME:$path"; done'
    with seen_file(workspace) as token:
        argv = [*("srun", "--overlap", "--mpi=none", "--chdir=/"), f"--nodes={allocation.nodes}", f"--ntasks={allocation.nodes}"]
        asked = [*argv, "sh", "-c", look, "sh", str(token), spec.interpreter]
        try:
            done = subprocess.run(asked, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_ANSWER_S, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise NotRunnable(
                f"the nodes of Slurm job {allocation.job_id} cannot be asked: {error}; try: srun hostname"
            ) from error
    if done.returncode != 0:
        raise NotRunnable(
            f"the nodes of Slurm job {allocation.job_id} cannot be asked: {done.stderr.strip()}; try: srun hostname"
        )
    missing = [line.split(":", 2) for line in done.stdout.splitlines() if line.startswith("unseen:")]
    if blind := sorted(node for _, node, path in missing if path == str(token)):
        nodes = f"node {blind[0]} does" if len(blind) == 1 else f"nodes {listed(blind)} do"
        raise WorkspaceError(
            f"{nodes} not see the workspace {workspace.root}; choose one on a file system that all nodes share (--workspace, "
            "DTRAIN_WORKSPACE)"
        )
    if missing:
        nodes = listed(sorted(node for _, node, _ in missing))
        raise NotRunnable(
            f"there is no {spec.interpreter} on {nodes}; ranks need their Python at the same path on all nodes (--python PATH)"
        )


def find_start(spec: JobSpec, allocation: Allocation, *, tried: bool) -> Start:
    """How to start the ranks of ``spec`` here: as ``--slurm-start`` says, else by srun where it has a plugin for the ranks' MPI
    and (asked only when ``tried``) that works on all nodes, else by mpirun.

    Blocks for a moment. Raises MissingDependency without MPI for several ranks, NotRunnable without srun or a plugin that was
    asked for.
    """
    wanted = spec.slurm_options.start
    try:
        found = find_mpi(spec.interpreter)
    except MissingDependency:
        if wanted == "mpirun" or spec.workers > 1:
            raise
        return Start(by="none", mpi=None)
    if wanted == "mpirun":
        return Start(by="mpirun", mpi=found)
    plugins = _plugins()
    if wanted != "auto":
        if wanted not in plugins:
            raise NotRunnable(
                f"--slurm-start {wanted}: this srun has only {', '.join(plugins) or 'no plugin'}; use one of them, or mpirun"
            )
        return Start(by=wanted, mpi=found)
    plugin = _PLUGINS.get(found.family.title)
    if plugin not in plugins or (tried and not _works(plugin, allocation)):
        return Start(by="mpirun", mpi=found)
    return Start(by=plugin, mpi=found)


def _plugins() -> list[str]:
    if shutil.which("srun") is None:
        raise NotRunnable("this is a Slurm job, but there is no srun on PATH; add the folder of Slurm's commands")
    answer = subprocess.run(["srun", "--mpi=list"], capture_output=True, text=True, timeout=_ANSWER_S, check=False)
    words = (answer.stdout + answer.stderr).split()
    return [name for name in ("pmix", "pmi2") if name in words]


def _works(plugin: str, allocation: Allocation) -> bool:
    """Whether a step with this plugin starts on every node: srun lists also those whose libraries are not there."""
    argv = ["srun", "--overlap", f"--mpi={plugin}", f"--nodes={allocation.nodes}", f"--ntasks={allocation.nodes}", "true"]
    try:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=_ANSWER_S, check=False)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def hostnames(allocation: Allocation) -> list[str]:
    """The names of the allocation's nodes. Raises NotRunnable where scontrol does not say them."""
    argv = ["scontrol", "show", "hostnames", allocation.nodelist]
    try:
        return subprocess.run(argv, capture_output=True, text=True, timeout=_ANSWER_S, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError) as error:
        raise NotRunnable(f"Slurm's nodes {allocation.nodelist!r} cannot be listed: {error}; is scontrol on PATH?") from error
