"""Verbs about what runs have left."""

from __future__ import annotations

import sys

import click

from dtrain.cli._main import json_option, main, print_json, print_table, workspace_option
from dtrain.errors import UsageError
from dtrain.layout import Workspace


@main.command()
@workspace_option
@json_option
def runs(workspace: Workspace, as_json: bool) -> None:
    """List the runs of the workspace, oldest first.

    \b
    Example:
      dtrain runs --json
    """
    from dtrain import report
    from dtrain.launch.queue import status_reader

    found = workspace.list_runs()
    read = status_reader(found)
    rows = [report.run_summary(run, read) for run in found]
    if as_json:
        print_json(rows)
    elif rows:
        print_table(report.runs_table(rows))
    else:
        click.echo(f"no runs in {workspace.root}", err=True)


@main.command()
@workspace_option
@json_option
@click.argument("reference", metavar="RUN")
def show(workspace: Workspace, reference: str, as_json: bool) -> None:
    """Show one run: how it ended, its last metrics by rank and over the ranks, and where everything lies.

    RUN is a run's id, a unique beginning of it, or `latest`.

    \b
    Example:
      dtrain show latest
    """
    from dtrain import report
    from dtrain.azureml.records import relatives
    from dtrain.launch.queue import status_reader
    from dtrain.registry import Registry

    found = workspace.find_run(reference)
    data = report.run_to_json(found, status_reader([found]))
    data["parent"], data["children"] = relatives(found)
    registry = Registry(workspace.registry)
    data["models"] = [model.id for name in registry.names() for model in registry.versions(name) if model.run == found.id]
    if as_json:
        print_json(data)
        return
    for line in report.heading(data):
        click.echo(line)
    click.echo()
    print_table(report.ranks_table(data))
    click.echo()
    for line in report.places(data):
        click.echo(line)


@main.command()
@workspace_option
@json_option
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
        print_json(rows)
    elif as_csv:
        report.write_csv(rows, sys.stdout)
    elif rows:
        print_table(report.rows_table(rows))
    else:
        click.echo("this run has logged no metrics", err=True)
