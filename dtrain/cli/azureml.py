"""The verb for control scripts that were written for Azure ML's SDK v1."""

from __future__ import annotations

from typing import Any

import click

from dtrain.cli._main import json_option, main, print_json, workspace_option
from dtrain.layout import Workspace


class _ScriptOrVerb(click.Group):
    """`dtrain azureml init` is a verb; anything else is a script and its arguments."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] in self.commands:
            return super().resolve_command(ctx, args)
        return "script", _script, args

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage(ctx.command_path, "[OPTIONS] SCRIPT [ARGS]... | init [OPTIONS]")


@main.group(cls=_ScriptOrVerb, context_settings={"allow_interspersed_args": False})
@click.option("--force", is_flag=True, help="Use dtrain's azureml although the real one is installed.")
@click.option("--any-version", is_flag=True, help="Packages of another version than a job asks for only warn.")
@click.option("--no-install", is_flag=True, help="Packages that are missing are an error, and nothing is installed for a job.")
@click.option("-m", "is_module", is_flag=True, help="SCRIPT is a module, as in `python -m`.")
@click.pass_context
def azureml(context: click.Context, /, **given: bool) -> None:
    """Run a control script written for Azure ML's SDK v1: `import azureml.core` and the rest are dtrain's.

    Its jobs run on this machine, and go on when the script ends. docs/azureml.md lists the names that there are.

    \b
    Example:
      dtrain azureml init --name my-workspace
      dtrain azureml submit.py
    """
    context.obj = given


@click.command(context_settings={"allow_interspersed_args": False, "ignore_unknown_options": True}, add_help_option=False)
@click.argument("command", nargs=-1, type=click.UNPROCESSED, required=True)
@click.pass_context
def _script(context: click.Context, command: tuple[str, ...]) -> None:
    from dtrain.azureml.script import run_script

    given: dict[str, Any] = context.obj
    run_script(command, **given)


@azureml.command()
@click.option("--name", default="workspace", show_default=True, help="Name of the workspace.")
@click.option("--location", default="local", show_default=True, help="Kept as a word: everything is on this machine.")
def init(name: str, location: str) -> None:
    """Write .azureml/config.json here, for Workspace.from_config(), and make the workspace's folder.

    \b
    Example:
      dtrain azureml init --name my-workspace
    """
    from dtrain.azureml.workspace import Workspace

    Workspace.create(name, location=location)


@main.group()
def compute() -> None:
    """Name hosts as compute targets for control scripts of Azure ML's names (`dtrain azureml`).

    \b
    Example:
      dtrain compute add cluster --hosts node1:2,node2:2
    """


@compute.command()
@workspace_option
@click.option(
    "--hosts", required=True, metavar="NAME:SLOTS,...", help="The hosts, as `dtrain run -H` takes them; each is a node."
)
@click.argument("name")
def add(workspace: Workspace, hosts: str, name: str) -> None:
    """Make hosts a compute target, or give one of that name these hosts.

    \b
    Example:
      dtrain compute add cluster --hosts node1:2,node2:2
    """
    from dtrain.azureml.compute import add_hosts

    count = add_hosts(workspace, name, hosts)
    click.echo(f"compute target {name}: {count} {'node' if count == 1 else 'nodes'}, {hosts}", err=True)


@compute.command("list")
@workspace_option
@json_option
def list_targets(workspace: Workspace, as_json: bool) -> None:
    """List the compute targets of the workspace.

    \b
    Example:
      dtrain compute list --json
    """
    from dtrain.azureml.compute import read_entries

    entries = read_entries(workspace)
    if as_json:
        print_json(entries)
        return
    for name, entry in entries.items():
        click.echo(f"{name}  {entry['max_nodes']} nodes  {entry.get('hosts') or 'this machine'}")
    if not entries:
        click.echo(f"no compute targets in {workspace.root}", err=True)


@compute.command()
@workspace_option
@click.argument("name")
def remove(workspace: Workspace, name: str) -> None:
    """Remove a compute target; its hosts and runs are left alone.

    \b
    Example:
      dtrain compute remove cluster
    """
    from dtrain.azureml.compute import read_entries, write_entry
    from dtrain.errors import UsageError, did_you_mean

    entries = read_entries(workspace)
    if name not in entries:
        raise UsageError(f"no compute target {name!r} in {workspace.root}{did_you_mean(name, entries)}")
    write_entry(workspace, name, None)
