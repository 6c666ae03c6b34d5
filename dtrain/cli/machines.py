"""Verbs about this machine, and about others."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import click

from dtrain.cli import options
from dtrain.cli._main import json_option, main, print_json, print_table, workspace_option
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


@main.command()
@workspace_option
@options.host_names
@options.python
@json_option
def doctor(workspace: Workspace, as_json: bool, **given: Any) -> None:
    """Ask hosts whether `dtrain run -H` would work there, as that does before it starts anything; without hosts, this one.

    Each is asked for ssh, Python, dtrain, MPI, the workspace, a connection back, its clock, cores and GPUs. The exit code is 0
    when nothing is in the way, else 1.

    \b
    Example:
      dtrain doctor -H node1:2,node2:2
    """
    from dtrain import report
    from dtrain.launch import preflight
    from dtrain.launch.places import check_loopback

    hosts, python = options.take_hosts(given), options.take_python(given)
    if hosts:
        check_loopback(list(hosts))
        wanted = preflight.Wanted(mpi=True, python=python)
        reports = list(preflight.ask_hosts({host: host.slots for host in hosts}, workspace, wanted).values())
    else:
        reports = [preflight.examine_this_host(workspace, python)]
    data = [{"host": each.host, "checks": [dataclasses.asdict(check) for check in each.checks]} for each in reports]
    if as_json:
        print_json(data)
    else:
        print_table(report.checks_table(data))
    sys.exit(1 if any(each.of("problem") for each in reports) else 0)
