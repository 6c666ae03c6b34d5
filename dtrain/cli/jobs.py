"""Verbs of a job that is started, or runs."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import click

from dtrain import switches
from dtrain.allocation import Allocation
from dtrain.binding import BINDS
from dtrain.cli import options
from dtrain.cli._main import json_option, main, pairs, print_json, workspace_option
from dtrain.cli.habits import RunCommand
from dtrain.errors import UsageError
from dtrain.job_options import LAUNCHERS
from dtrain.layout import RunLayout, Workspace
from dtrain.masking import Masker
from dtrain.spec import JobSpec
from dtrain.status import read_status

if TYPE_CHECKING:
    from dtrain.launch.console import Console
    from dtrain.launch.plan import LaunchPlan


@main.command(cls=RunCommand, context_settings={"allow_interspersed_args": False})
@workspace_option
@click.option(
    "-n",
    "-np",
    "--workers",
    type=int,
    metavar="N",
    help="Number of ranks; of workers, in a cluster. [default: 1, or the slots of MPI's hosts, or what Slurm gave]",
)
@click.option(
    "--launcher",
    metavar="|".join(LAUNCHERS),
    help="How ranks are started. [default: local for one rank, mpi for more; slurm within a Slurm job]",
)
@options.cluster
@options.hosts
@options.python
@options.slurm
@options.horovod
@options.restarts
@options.hangs
@click.option("--experiment", metavar="NAME", help="Name that the run's begins with. [default: the script's]")
@click.option(
    "--source",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Folder whose copy the ranks work in. [default: the script's]",
)
@click.option(
    "--env", "environment", metavar="K=V", multiple=True, callback=pairs, help="Variable for the ranks; may be repeated."
)
@click.option(
    "--secret",
    "secrets",
    metavar="NAME",
    multiple=True,
    help="Variable of yours whose value no output, log or record may show; may be repeated.",
)
@click.option(
    "--bind",
    metavar="|".join(BINDS),
    default=JobSpec.bind,
    show_default=True,
    help="Give each rank cores of its own, or the cores of its NUMA node; and its own GPU.",
)
@click.option("--azureml", "with_azureml", is_flag=True, help="`import azureml.core` in the ranks is dtrain's (docs/azureml.md).")
@click.option(
    "--legacy-numpy",
    is_flag=True,
    help="SCRIPT may use NumPy's dropped names (np.float) and sklearn.externals.joblib; each is named.",
)
@click.option("--tf1", is_flag=True, help="`import tensorflow` in SCRIPT gives TensorFlow 1's names, with v2 behaviour off.")
@options.limits
@click.option(
    "--resume", metavar="RUN", help="Start from the newest whole checkpoint of this run (an id, its beginning, or `latest`)."
)
@click.option(
    "--show", metavar="RANKS", default="all", show_default=True, help="Whose output the console shows: 0,2-3, none, or roles."
)
@click.option("--dry-run", is_flag=True, help="Print what would be started, as lines for a shell, and start nothing.")
@click.option("--json", "as_json", is_flag=True, help="With --dry-run: print the plan as JSON.")
@click.option("-m", "is_module", is_flag=True, help="The first argument is a module, as in `python -m`.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED, required=True, metavar="SCRIPT [ARGS]...")
def run(workspace: Workspace, command: tuple[str, ...], dry_run: bool, as_json: bool, **given: Any) -> None:
    """Run SCRIPT on N ranks, show what they print, and keep what comes out of it in a new run folder.

    Whatever follows SCRIPT is the script's. The exit code is 0 when every rank completed; else that of the rank that failed first
    (128+N for signal N), 123 for a hang, 124 for the time limit, 130 after Ctrl-C, 2 for wrong usage, 127 for what cannot be run.

    \b
    Example:
      dtrain run -n 2 --experiment digits train.py --epochs 10
      dtrain run -n 4 -m mypackage.train --epochs 10
      dtrain run --launcher parameter_server --workers 2 --servers 1 --chief -H node1:2,node2:2 train.py
      dtrain run --launcher slurm --nodes 2 --tasks-per-node 4 --sbatch-arg=--time=8:00:00 train.py
    """
    from dtrain.launch import job
    from dtrain.launch.console import Console
    from dtrain.launch.show import parse_show

    if as_json and not dry_run:
        raise UsageError("--json goes with --dry-run; the finished run as JSON is `dtrain show latest --json`")
    resume, show, detach = given.pop("resume"), given.pop("show"), given.pop("detach")
    resume_from = job.resume_folder(resume, workspace, Console()) if resume is not None else None
    given["environment"] |= _switches(given, command[0])
    parts = options.take_parts(given)
    spec = JobSpec(target=command[0], args=command[1:], resume_from=resume_from, **parts, **given)
    shown = parse_show(show, spec)
    submits = spec.launcher_name == "slurm" and Allocation.read() is None
    if (detach or spec.slurm_options.sbatch_args) and not submits:
        raise UsageError("--detach and --sbatch-arg go with --launcher slurm outside of a Slurm job: nothing is submitted here")
    if dry_run:
        _print_plan(job.dry_run(spec, workspace), as_json)
        return
    console = Console(ranks=shown, masker=Masker(spec.secret_values().values()))
    if submits:
        from dtrain.launch.follow import come_back, submit_job

        submitted = submit_job(spec, workspace, console)
        if detach:
            console.say(come_back(submitted))
            return
        sys.exit(_follow(submitted, console))
    _, status = job.run_job(spec, workspace, console)
    sys.exit(status.exit_code)


def _switches(given: dict[str, Any], target: str) -> dict[str, str]:
    """What --azureml, --legacy-numpy and --tf1, which are taken out of ``given``, tell the ranks.

    With --azureml the script's old names work as in a job that was submitted by Azure ML's names; rank 0 says which.
    """
    kinds = {"numpy": given.pop("legacy_numpy"), "tf1": given.pop("tf1")}
    if not given.pop("with_azureml"):
        return switches.legacy_switch(**kinds)
    from dtrain.azureml.old_code import find_old_names

    script = Path(target).absolute()
    found, _ = find_old_names(script.parent, script.name)
    kinds |= dict.fromkeys(switches.legacy_kinds(found), True)
    return {**switches.azureml_switch(), **switches.legacy_switch(**kinds)}


def _print_plan(plan: LaunchPlan, as_json: bool) -> None:
    if as_json:
        print_json(plan.to_json())
        return
    click.echo("\n".join(plan.shell_lines()))
    several = len({each.host for each in plan.binding}) > 1
    for each in plan.binding:
        where = f" on {each.host}" if several else ""
        click.echo(f"dtrain: rank {each.rank}{where} is bound to {each.binding}", err=True)
    if plan.share:
        click.echo(f"dtrain: {plan.share}", err=True)


def _follow(run: RunLayout, console: Console, rank: int | None = None) -> int:
    """Follow a submitted run; its exit code. Ctrl-C leaves it to itself."""
    from dtrain.launch.follow import come_back, follow_job
    from dtrain.launch.sbatch import SlurmJob

    job = SlurmJob.of(run)
    assert job is not None

    def leave(number: int, _frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt(number)

    for number in (signal.SIGINT, signal.SIGTERM):  # a shell starts its background jobs with SIGINT ignored
        signal.signal(number, leave)
    try:
        return follow_job(run, job, console, rank=rank).exit_code or 0
    except KeyboardInterrupt as left:
        console.say(f"\n{come_back(run)}")
        return 128 + int(left.args[0])


@main.command()
@workspace_option
@click.option("--rank", metavar="R", type=int, help="Only this rank's output, raw. [default: all, each line with its rank]")
@click.option("--attempt", metavar="K", type=int, help="Of a job that was started again: this start. [default: the newest]")
@click.option("-f", "--follow", is_flag=True, help="Go on until the run ends.")
@click.argument("reference", metavar="RUN")
def logs(workspace: Workspace, reference: str, rank: int | None, attempt: int | None, follow: bool) -> None:
    """Print what the ranks of a run wrote to their output; with -f go on until it has ended, and say how it did.

    The exit code is 0 also of a run that failed (`dtrain show RUN --json` has the run's).

    \b
    Example:
      dtrain logs latest --rank 0 --follow
    """
    from dtrain.launch.console import Console
    from dtrain.launch.job import report_end
    from dtrain.launch.logs import print_logs
    from dtrain.launch.queue import status_reader
    from dtrain.launch.sbatch import SlurmJob

    found = workspace.find_run(reference)
    console = Console()
    if not follow or attempt is not None:
        print_logs(found, rank=rank, attempt=attempt, follow=follow, console=console)
        return
    status = status_reader([found])(found)
    if not status.is_over and SlurmJob.of(found) is not None:
        _follow(found, console, rank)
        return
    print_logs(found, rank=rank, attempt=None, follow=not status.is_over, console=console)
    report_end(found, status if status.is_over else read_status(found), console)


@main.command()
@workspace_option
@click.argument("reference", metavar="RUN")
def stop(workspace: Workspace, reference: str) -> None:
    """End a run that waits in a queue or goes on. Its ranks are told, and have their grace time.

    \b
    Example:
      dtrain stop latest
    """
    from dtrain.launch.console import Console
    from dtrain.launch.stop import stop_run

    found = workspace.find_run(reference)
    status = stop_run(found, Console())
    click.echo(f"{found.id}  {status.state}  {status.cause}".rstrip())


@main.command()
@workspace_option
@click.option("--rank", metavar="R", type=int, help="Only this rank's. [default: all]")
@json_option
@click.argument("reference", metavar="RUN")
def stacks(workspace: Workspace, reference: str, rank: int | None, as_json: bool) -> None:
    """Print what the ranks of a running job are doing now: the Python stacks of all their threads. The job goes on.

    \b
    Example:
      dtrain stacks latest
    """
    from dtrain.launch.crew import ask_elsewhere
    from dtrain.launch.stacks import collect_stacks, read_beat

    found = workspace.find_run(reference)
    size = read_status(found).size
    if rank is not None and not 0 <= rank < size:
        raise UsageError(f"--rank {rank}: run {found.id} has ranks 0 to {size - 1}")
    answers = collect_stacks(found, range(size) if rank is None else [rank], ask_elsewhere(found))
    beats = {each: read_beat(found, each) for each in answers}
    if as_json:
        print_json([{"rank": each, "collective": beats[each].collective, "stacks": text} for each, text in answers.items()])
        return
    for each, text in answers.items():
        waits = f", in {beats[each].collective} for {beats[each].since_s:.0f} s" if beats[each].collective else ""
        click.echo(f"--- rank {each}{waits}\n{text}")
