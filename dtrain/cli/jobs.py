"""Verbs of a job that is started, or runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from dtrain import switches
from dtrain.cli import options
from dtrain.cli._main import json_option, main, pairs, print_json, workspace_option
from dtrain.errors import UsageError
from dtrain.layout import Workspace
from dtrain.spec import LAUNCHERS, JobSpec


@main.command(context_settings={"allow_interspersed_args": False})
@workspace_option
@click.option(
    "-n", "--workers", type=int, default=1, show_default=True, metavar="N", help="Number of ranks; of workers, in a cluster."
)
@click.option(
    "--launcher", metavar="|".join(LAUNCHERS), help="How ranks are started. [default: local for one rank, mpi for more]"
)
@options.cluster
@options.hosts
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
@click.option("--azureml", "with_azureml", is_flag=True, help="`import azureml.core` in the ranks is dtrain's (docs/azureml.md).")
@click.option("--legacy-numpy", is_flag=True, help="SCRIPT may use NumPy's dropped names (np.float); each use is named.")
@click.option("--tf1", is_flag=True, help="`import tensorflow` in SCRIPT gives TensorFlow 1's names, with v2 behaviour off.")
@options.limits
@click.option(
    "--resume", metavar="RUN", help="Start from the newest whole checkpoint of this run (an id, its beginning, or `latest`)."
)
@click.option("--dry-run", is_flag=True, help="Print what would be started, as lines for a shell, and start nothing.")
@click.option("--json", "as_json", is_flag=True, help="With --dry-run: print the plan as JSON.")
@click.option("-m", "is_module", is_flag=True, help="The first argument is a module, as in `python -m`.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED, required=True, metavar="SCRIPT [ARGS]...")
def run(workspace: Workspace, command: tuple[str, ...], resume: str | None, dry_run: bool, as_json: bool, **given: Any) -> None:
    """Run SCRIPT on N ranks, show what they print, and keep what comes out of it in a new run folder.

    Whatever follows SCRIPT is the script's. The exit code is 0 when every rank completed; else that of the rank that failed first
    (128+N for signal N), 123 for a hang, 124 for the time limit, 130 after Ctrl-C, 2 for wrong usage, 127 for what cannot be run.

    \b
    Example:
      dtrain run -n 2 --experiment digits train.py --epochs 10
      dtrain run -n 4 -m mypackage.train --epochs 10
      dtrain run --launcher parameter_server --workers 2 --servers 1 --chief -H node1:2,node2:2 train.py
    """
    from dtrain.launch import job
    from dtrain.launch.console import Console

    if as_json and not dry_run:
        raise UsageError("--json goes with --dry-run; the finished run as JSON is `dtrain show latest --json`")
    console = Console()
    resume_from = job.resume_folder(resume, workspace, console) if resume is not None else None
    given["environment"] |= switches.legacy_switch(numpy=given.pop("legacy_numpy"), tf1=given.pop("tf1"))
    if given.pop("with_azureml"):
        given["environment"] |= switches.azureml_switch()
    parts = options.take_parts(given)
    spec = JobSpec(target=command[0], args=command[1:], resume_from=resume_from, **parts, **given)
    if dry_run:
        plan = job.dry_run(spec, workspace)
        if as_json:
            print_json(plan.to_json())
        else:
            click.echo("\n".join(process.shell_line() for process in plan.processes))
        return
    _, status = job.run_job(spec, workspace, console)
    sys.exit(status.exit_code)


@main.command()
@workspace_option
@click.option("--rank", metavar="R", type=int, help="Only this rank's output, raw. [default: all, each line with its rank]")
@click.option("--attempt", metavar="K", type=int, help="Of a job that was started again: this start. [default: the newest]")
@click.option("-f", "--follow", is_flag=True, help="Go on until the run ends.")
@click.argument("reference", metavar="RUN")
def logs(workspace: Workspace, reference: str, rank: int | None, attempt: int | None, follow: bool) -> None:
    """Print what the ranks of a run wrote to their output.

    \b
    Example:
      dtrain logs latest --rank 0 --follow
    """
    from dtrain.launch.logs import print_logs

    print_logs(workspace.find_run(reference), rank=rank, attempt=attempt, follow=follow)


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
    from dtrain.launch.stacks import collect_stacks, read_beat
    from dtrain.status import read_status

    found = workspace.find_run(reference)
    size = read_status(found).size
    if rank is not None and not 0 <= rank < size:
        raise UsageError(f"--rank {rank}: run {found.id} has ranks 0 to {size - 1}")
    answers = collect_stacks(found, range(size) if rank is None else [rank])
    beats = {each: read_beat(found, each) for each in answers}
    if as_json:
        print_json([{"rank": each, "collective": beats[each].collective, "stacks": text} for each, text in answers.items()])
        return
    for each, text in answers.items():
        waits = f", in {beats[each].collective} for {beats[each].since_s:.0f} s" if beats[each].collective else ""
        click.echo(f"--- rank {each}{waits}\n{text}")
