"""The submit side in three steps: make the run folder, plan, supervise."""

from __future__ import annotations

import collections
import dataclasses
import functools
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dtrain.allocation import Allocation
from dtrain.errors import UsageError, WorkspaceError
from dtrain.files import read_json, write_json
from dtrain.job_options import CLUSTER_LAUNCHERS
from dtrain.launch import requeued
from dtrain.launch.attempts import run_attempts
from dtrain.launch.console import Console, LineReader
from dtrain.launch.plan import BoundRank, LaunchPlan
from dtrain.launch.supervise import Limits
from dtrain.layout import RunLayout, StepFolder, Workspace
from dtrain.snapshot import take_snapshot
from dtrain.spec import JobSpec
from dtrain.status import RunStatus

if TYPE_CHECKING:
    from dtrain.launch.mpi_families import MpiInstallation
    from dtrain.launch.places import Place

_SHOWN_LINES = 20


def planner(
    spec: JobSpec, workspace: Workspace | None, say: Callable[[str], None] | None = None
) -> Callable[[RunLayout, Path], LaunchPlan]:
    """Ask the machine, once, for what the launcher of ``spec`` needs to know (which MPI); planning itself is then pure.

    ``workspace`` is what other hosts have to see as well; None when nothing is to be written. ``say`` shows what is wrong with
    hosts and does not keep the job from running.

    Raises MissingDependency and NotRunnable when the launcher, or the ranks' Python, cannot run here; UsageError for ranks that
    cannot be bound.
    """
    if spec.python is not None and not spec.hosts and workspace is not None:  # hosts are asked for it, each its own
        from dtrain.launch.preflight import check_python

        check_python(spec.interpreter)
    plan, places = _launcher(spec, workspace, say)
    secrets = spec.secret_values()
    binding: tuple[BoundRank, ...] = ()
    if spec.bind != "none" and spec.launcher_name != "slurm":  # under which each rank sees what Slurm gave the job on its node
        from dtrain.launch.places import bound_ranks

        binding = bound_ranks(spec, places)
    return lambda run, cwd: dataclasses.replace(plan(run, cwd), secrets=secrets, binding=binding)


def _launcher(
    spec: JobSpec, workspace: Workspace | None, say: Callable[[str], None] | None
) -> tuple[Callable[[RunLayout, Path], LaunchPlan], Sequence[Place]]:
    """What plans the job, and where each rank goes; no places where all are started here, or by who chooses them."""
    # A launcher is imported when it is chosen: every start waits for what is imported here.
    if spec.tasks:
        from dtrain.launch import parameter_server
        from dtrain.launch.places import find_places

        places = find_places(spec, workspace, say)
        return functools.partial(parameter_server.plan, spec, places=places), places
    if spec.launcher_name == "local" or spec.launcher_name in CLUSTER_LAUNCHERS:  # a cluster of one worker is a rank
        from dtrain.launch import local

        return functools.partial(local.plan, spec), ()
    if spec.launcher_name == "slurm":
        from dtrain.launch import slurm

        allocation = Allocation.read()
        if allocation is None:
            return functools.partial(slurm.submission, spec), ()
        if workspace is not None and spec.preflight:
            slurm.check_sight(spec, allocation, workspace)
        start = slurm.find_start(spec, allocation, tried=workspace is not None)
        slurm.check_room(spec, allocation, start)
        return functools.partial(slurm.plan, spec, allocation=allocation, start=start), ()
    if spec.horovod_options.gloo:
        from dtrain.launch import gloo

        site = gloo.find_site(spec, workspace, say)
        return functools.partial(gloo.plan, spec, site=site), site.places
    if spec.launcher_name == "horovod":
        from dtrain.launch import horovod

        built = horovod.find_horovod(spec)
        places = _mpi_places(spec, workspace, say, built.mpi)
        return functools.partial(horovod.plan, spec, horovod=built, places=places), places
    from dtrain.launch import mpi
    from dtrain.launch.mpi_families import find_mpi

    found = find_mpi(spec.interpreter)
    places = _mpi_places(spec, workspace, say, found)
    return functools.partial(mpi.plan, spec, mpi=found, places=places), places


def _mpi_places(
    spec: JobSpec, workspace: Workspace | None, say: Callable[[str], None] | None, mpi: MpiInstallation
) -> list[Place]:
    """Where each rank goes that mpirun starts; none where the job has no hosts."""
    if not spec.hosts:
        return []
    from dtrain.launch.mpi_families import check_network
    from dtrain.launch.places import find_places

    if spec.network is not None:
        check_network(spec.network, mpi)
    if mpi.family.only_allocated and (allocation := Allocation.read()) is not None:
        from dtrain.launch import slurm

        slurm.check_hosts(spec, allocation)
    return find_places(spec, workspace, say)


def dry_run(spec: JobSpec, workspace: Workspace) -> LaunchPlan:
    """The plan of a job that is not to be run: in place of a snapshot it works in the source folder itself. Writes nothing."""
    return planner(spec, None)(RunLayout(workspace.runs / f"{spec.experiment_name}-dry-run"), spec.source_folder)


def run_job(spec: JobSpec, workspace: Workspace, console: Console) -> tuple[RunLayout, RunStatus]:
    """Run a job to its end, and return its folder and status.

    Blocks. Raises UsageError and NotRunnable for what cannot be started, WorkspaceError when the run folder cannot be written;
    no run folder is left of a job that was not started.
    """
    allocation = Allocation.read() if spec.launcher_name == "slurm" else None
    if allocation is not None:
        spec = requeued.go_on(spec, workspace, allocation, console)
    plan_for = planner(spec, workspace, console.say)
    run = make_run(spec, workspace)
    if allocation is not None:
        requeued.note_allocation(run, allocation)
    plan = plan_for(run, run.code)
    announce(run, plan, console)
    return run, supervise_run(run, spec, plan, console)


def make_run(spec: JobSpec, workspace: Workspace) -> RunLayout:
    """Make the run folder of a job, with the copy of its source. Raises UsageError and WorkspaceError, and leaves none then."""
    run = workspace.create_run(spec.experiment_name)
    fill_run(run, spec, workspace)
    return run


def fill_run(run: RunLayout, spec: JobSpec, workspace: Workspace) -> None:
    """Make a new run folder that of ``spec``: its folders, the copy of the source, ``spec.json``.

    Where that cannot be, nothing is left of the folder, and UsageError or WorkspaceError is raised.
    """
    try:
        _fill(run, spec, workspace)
    except BaseException as error:
        shutil.rmtree(run.root)
        if isinstance(error, OSError):
            raise WorkspaceError(f"run folder {run.root} cannot be written: {error}") from error
        raise


def announce(run: RunLayout, plan: LaunchPlan, console: Console) -> None:
    console.say(f"dtrain: run {run.id} · {_ranks(plan)} · launcher {plan.launcher} · {run.root}")


def supervise_run(
    run: RunLayout,
    spec: JobSpec,
    plan: LaunchPlan,
    console: Console,
    explain: Callable[[RunStatus], RunStatus] | None = None,
) -> RunStatus:
    """Run the job of a run folder to its end, say how it ended, and return its status. Blocks.

    ``explain`` gives a status back that tells more of the end, if it knows more.
    """
    limits = Limits(timeout_s=spec.timeout_s, grace_s=spec.grace_s, hangs=spec.hangs)
    if spec.tasks:
        limits = dataclasses.replace(limits, start_timeout_s=spec.cluster_options.start_timeout_s)

    def replan() -> LaunchPlan:
        following = RunLayout(run.root, (run.newest_attempt().attempt or 0) + 1)
        return planner(spec, run.workspace, console.say)(following, run.code)

    with console.in_background():
        status = run_attempts(plan, replan, run, limits, spec.restarts, console)
        if explain is not None:
            status = explain(status)
        report_end(run, status, console)
    return status


def _ranks(plan: LaunchPlan) -> str:
    """How many ranks a plan has, of which roles."""
    if plan.elastic:
        return "elastic workers"
    if not plan.tasks:
        return f"{plan.size} {'rank' if plan.size == 1 else 'ranks'}"
    counts = collections.Counter(planned.task.role for _, planned in sorted(plan.tasks.items()))
    return ", ".join(f"{count} {role}{'s' if count > 1 and role != 'ps' else ''}" for role, count in counts.items())


def _fill(run: RunLayout, spec: JobSpec, workspace: Workspace) -> None:
    run.make_folders(0 if spec.horovod_options.elastic else spec.size)
    files = take_snapshot(spec.source_folder, run.code, excluded=workspace.root)
    if not spec.is_module and spec.script_in_source not in {file.path for file in files}:
        raise UsageError(
            f"script {spec.target} is not in the copy of {spec.source_folder}: an ignore file, or its folder's name, keeps it out"
        )
    write_json(run.spec, spec.to_json(), durable=False)


def report_end(run: RunLayout, status: RunStatus, console: Console) -> None:
    """Say how the run ended; of a failed one the cause comes last, where it is looked for."""
    duration = f"{status.duration_s:.1f} s"
    if status.state == "completed":
        console.say(f"dtrain: run {run.id} completed in {duration}; outputs in {run.outputs}")
        return
    console.say(f"dtrain: run {run.id} {status.state} after {duration} with exit code {status.exit_code}", bad=True)
    failure = status.failure
    if failure is None:
        console.say(f"dtrain: {status.cause}", bad=True)
        return
    log = run.rank(failure.rank).output_log
    if status.size > 1 and not status.elastic:
        kind = "task" if status.tasks else "rank"
        others = f"1 other {kind} was" if status.size == 2 else f"{status.size - 1} other {kind}s were"
        console.say(f"dtrain: {others} ended because of it, or failed after it")
    console.say(f"dtrain: first to fail was {status.cause if status.elastic else failure.describe()}", bad=True)
    trace = failure.traceback.rstrip().splitlines()
    if printed := _last_lines(log, trace):
        console.say("dtrain: the last it printed before:" if trace else "dtrain: the last it printed:")
    for line in printed:
        console.say(f"    {line}")
    if printed and trace:
        console.say("dtrain: and where it failed:")
    for line in trace:
        console.say(f"    {line}")
    if log.is_file():  # absent of one that never began
        console.say(f"dtrain: its whole output is in {log}")


def _last_lines(log: Path, trace: list[str]) -> list[str]:
    """The last lines of a rank's output, as the console shows them, without the traceback that is told apart."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - 64_000))
            lines = LineReader(log).lines(file.read(), final=True)
    except FileNotFoundError:
        return []
    printed = [n for n in range(len(lines)) if trace and lines[n] == trace[0]]
    whole = next((n for n in printed if lines[n : n + len(trace)] == trace), None)
    if whole is not None:
        del lines[whole : whole + len(trace)]
    elif printed:  # a longer one than what is told of it, with its causes
        first = printed.pop()
        while printed and lines[first - 2].startswith(("The above exception was", "During handling of the above")):
            first = printed.pop()
        del lines[first:]
    return lines[-_SHOWN_LINES:]


def resume_folder(reference: str, workspace: Workspace, console: Console) -> Path | None:
    """The folder of the run that ``--resume`` means: the one it names or, where that ended before its first checkpoint, the one
    that it was itself resumed from, and so on. None when none of them has a checkpoint: then the job begins anew, and says so.

    Raises WorkspaceError when there is no such run.
    """
    named = run = workspace.find_run(reference)
    while not StepFolder.committed(run.checkpoints):
        earlier = read_json(run.spec).get("resume_from")
        if earlier is None or not RunLayout(Path(earlier)).spec.is_file():
            console.say(f"dtrain: run {named.id} ended before its first checkpoint; this run begins anew", bad=True)
            return None
        run = RunLayout(Path(earlier))
    if run != named:
        console.say(f"dtrain: run {named.id} ended before its first checkpoint; resuming {run.id}, from which it was resumed")
    return run.root
