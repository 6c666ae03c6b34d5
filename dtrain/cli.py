"""The command ``dtrain``: one thin command a verb, each over one public function.

Data go to standard output, words about them to standard error.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
import orjson

from dtrain import __version__, env, options
from dtrain.errors import DtrainError, UsageError
from dtrain.layout import Workspace
from dtrain.spec import LAUNCHERS, JobSpec

F = TypeVar("F", bound=Callable[..., Any])


class _Commands(click.Group):
    """Turns dtrain's exceptions into one line and their exit code, and keeps the order of the path of a run."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except DtrainError as error:
            click.echo(f"dtrain: {error}", err=True)
            ctx.exit(error.exit_code)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, package_name="dtrain")
def main() -> None:
    """Take the training script you already have, run it on many processes, and keep what came out of it.

    \b
    Example:
      dtrain run -n 4 train.py --epochs 3
      dtrain show latest
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a rank may print what this terminal's encoding has not


def _workspace(command: F) -> F:
    return click.option(
        "--workspace",
        type=click.Path(file_okay=False, path_type=Path),
        callback=lambda _context, _parameter, value: env.workspace(value),
        help="Folder that holds runs and models. [default: $DTRAIN_WORKSPACE, else ./workspace]",
    )(command)


def _json(command: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


def _pairs(_context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    pairs = {}
    for text in values:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise click.BadParameter(f"{text!r} is not KEY=VALUE", param=parameter)
        pairs[key] = value
    return pairs


def _print_json(value: Any) -> None:
    from dtrain.report import jsonable

    click.echo(orjson.dumps(jsonable(value), option=orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY, default=str).decode())


def _print_table(table: Any) -> None:
    from rich.console import Console

    # A narrow terminal wraps a wide line by itself; rich would cut names and numbers, which must be copied whole.
    Console(width=max(200, Console().width), highlight=False).print(table, soft_wrap=True)


@main.command(context_settings={"allow_interspersed_args": False})
@_workspace
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
    "--env", "environment", metavar="K=V", multiple=True, callback=_pairs, help="Variable for the ranks; may be repeated."
)
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
    parts = options.take_parts(given)
    spec = JobSpec(target=command[0], args=command[1:], resume_from=resume_from, **parts, **given)
    if dry_run:
        plan = job.dry_run(spec, workspace)
        if as_json:
            _print_json(plan.to_json())
        else:
            click.echo("\n".join(process.shell_line() for process in plan.processes))
        return
    _, status = job.run_job(spec, workspace, console)
    sys.exit(status.exit_code)


@main.command()
@_workspace
@_json
def runs(workspace: Workspace, as_json: bool) -> None:
    """List the runs of the workspace, oldest first.

    \b
    Example:
      dtrain runs --json
    """
    from dtrain import report

    rows = [report.run_summary(run) for run in workspace.list_runs()]
    if as_json:
        _print_json(rows)
    elif rows:
        _print_table(report.runs_table(rows))
    else:
        click.echo(f"no runs in {workspace.root}", err=True)


@main.command()
@_workspace
@_json
@click.argument("reference", metavar="RUN")
def show(workspace: Workspace, reference: str, as_json: bool) -> None:
    """Show one run: how it ended, its last metrics by rank and over the ranks, and where everything lies.

    RUN is a run's id, a unique beginning of it, or `latest`.

    \b
    Example:
      dtrain show latest
    """
    from dtrain import report
    from dtrain.registry import Registry

    found = workspace.find_run(reference)
    data = report.run_to_json(found)
    registry = Registry(workspace.registry)
    data["models"] = [model.id for name in registry.names() for model in registry.versions(name) if model.run == found.id]
    if as_json:
        _print_json(data)
        return
    for line in report.heading(data):
        click.echo(line)
    click.echo()
    _print_table(report.ranks_table(data))
    click.echo()
    for line in report.places(data):
        click.echo(line)


@main.command()
@_workspace
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
@_workspace
@click.option("--rank", metavar="R", type=int, help="Only this rank's. [default: all]")
@_json
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
        _print_json([{"rank": each, "collective": beats[each].collective, "stacks": text} for each, text in answers.items()])
        return
    for each, text in answers.items():
        waits = f", in {beats[each].collective} for {beats[each].since_s:.0f} s" if beats[each].collective else ""
        click.echo(f"--- rank {each}{waits}\n{text}")


@main.command()
@_workspace
@_json
@click.option("--by-rank", is_flag=True, help="Every rank's own values, as logged. [default: each step over the ranks]")
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV.")
@click.argument("reference", metavar="RUN")
def metrics(workspace: Workspace, reference: str, by_rank: bool, as_csv: bool, as_json: bool) -> None:
    """Print the metrics of a run: every step's mean, min, max, median and spread over the ranks.

    \b
    Example:
      dtrain metrics latest --by-rank --csv > metrics.csv
    """
    from dtrain import report
    from dtrain.metrics import read_metrics

    if as_csv and as_json:
        raise UsageError("--csv and --json exclude each other")
    rows = list(report.metric_rows(read_metrics(workspace.find_run(reference)), by_rank=by_rank))
    if as_json:
        _print_json(rows)
    elif as_csv:
        report.write_csv(rows, sys.stdout)
    elif rows:
        _print_table(report.rows_table(rows))
    else:
        click.echo("this run has logged no metrics", err=True)


@main.command()
@_workspace
@_json
@click.option("--name", required=True, help="The model's name.")
@click.option(
    "--path", metavar="PATH", help="File or folder in the run folder. [default: outputs, without metrics and checkpoints]"
)
@click.option("--tag", "tags", metavar="K=V", multiple=True, callback=_pairs, help="Tag of the version; may be repeated.")
@click.option("--description", default="", help="A sentence about it.")
@click.option("--any-state", is_flag=True, help="Also of a run that failed or was canceled.")
@click.argument("reference", metavar="RUN")
def register(workspace: Workspace, reference: str, name: str, as_json: bool, **options: Any) -> None:
    """Keep files of an ended run as the next version of a model.

    \b
    Example:
      dtrain register latest --name digits --path outputs/model.npz --tag stage=test
    """
    from dtrain.registry import Registry

    version = Registry(workspace.registry).register(workspace.find_run(reference), name, **options)
    if as_json:
        _print_json(version.to_json())
    else:
        files = "1 file" if len(version.files) == 1 else f"{len(version.files)} files"
        click.echo(f"{version.id}  {files}  {version.size_bytes:,} bytes  from {version.run}")


@main.command()
@_workspace
@_json
@click.argument("name", required=False)
def models(workspace: Workspace, name: str | None, as_json: bool) -> None:
    """List the registered models, or all versions of one.

    \b
    Example:
      dtrain models digits
    """
    from dtrain import report
    from dtrain.registry import Registry

    registry = Registry(workspace.registry)
    found = registry.versions(name) if name is not None else [registry.get(each) for each in registry.names()]
    if as_json:
        _print_json([version.to_json() for version in found])
    elif found:
        _print_table(report.models_table([version.to_json() for version in found]))
    else:
        click.echo(f"no models in {workspace.registry}; `dtrain register` makes one", err=True)


@main.command()
@_workspace
@click.argument("model", metavar="NAME[:VERSION]")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
def pull(workspace: Workspace, model: str, folder: Path) -> None:
    """Copy a model's files to DIR, verified; by default of the newest version.

    \b
    Example:
      dtrain pull digits:1 ./model
    """
    from dtrain.registry import Registry

    click.echo(Registry(workspace.registry).pull(model, folder))


@main.command()
@_workspace
@_json
@click.argument("model", metavar="[NAME[:VERSION]]", required=False)
def verify(workspace: Workspace, model: str | None, as_json: bool) -> None:
    """Read every registered file and compare it with its hash; exit code 1 when one does not fit.

    \b
    Example:
      dtrain verify digits
    """
    from dtrain.registry import Registry

    registry = Registry(workspace.registry)
    problems = registry.verify(model)
    if as_json:
        _print_json([problem.to_json() for problem in problems])
    for problem in () if as_json else problems:
        click.echo(f"{problem.model}:{problem.version}  {problem.path or 'its record'}  {problem.what}")
    if problems:
        said = f"{len(problems)} {'problem' if len(problems) == 1 else 'problems'}"
    else:
        said = "all files are as they were registered" if registry.names() else f"no models in {workspace.registry}"
    click.echo(said, err=True)
    sys.exit(1 if problems else 0)


@main.command(name="env")
@_workspace
@_json
def environment(workspace: Workspace, as_json: bool) -> None:
    """Show versions, the MPI found, GPUs, the workspace, and what is missing and how to get it.

    \b
    Example:
      dtrain env --json
    """
    from dtrain import machine, report

    data = machine.describe(workspace)
    if as_json:
        _print_json(data)
    else:
        for line in report.machine_lines(data):
            click.echo(line)


if __name__ == "__main__":
    main()
