"""Verbs about this machine."""

from __future__ import annotations

import click

from dtrain.cli._main import json_option, main, print_json, workspace_option
from dtrain.layout import Workspace


@main.command(name="env")
@workspace_option
@json_option
def environment(workspace: Workspace, as_json: bool) -> None:
    """Show versions, the MPI found, GPUs, the workspace, and what is missing and how to get it.

    \b
    Example:
      dtrain env --json
    """
    from dtrain import machine, report

    data = machine.describe(workspace)
    if as_json:
        print_json(data)
    else:
        for line in report.machine_lines(data):
            click.echo(line)
