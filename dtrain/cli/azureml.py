"""The verb for control scripts that were written for Azure ML's SDK v1."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
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
@click.option(
    "--secret", "secrets", metavar="NAME", multiple=True, help="Variable whose value no output, log or record of a job may show."
)
@click.option("-m", "is_module", is_flag=True, help="SCRIPT is a module, as in `python -m`.")
@click.pass_context
def azureml(context: click.Context, /, **given: Any) -> None:
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
    """Write .azureml/config.json here, for Workspace.from_config(), and make the workspace's folder where there is none.

    \b
    Example:
      dtrain azureml init --name my-workspace
    """
    from dtrain.azureml.workspace import Workspace

    lost = not any(Path(each).is_file() for each in (".azureml/config.json", "config.json"))
    Workspace.create(name, location=location, exist_ok=lost)


@main.group()
def compute() -> None:
    """Name hosts or a Slurm partition as a compute target for control scripts of Azure ML's names (`dtrain azureml`).

    \b
    Example:
      dtrain compute add cluster --hosts node1:2,node2:2
      dtrain compute add queue --slurm-partition gpu --sbatch-arg=--gpus-per-node=2
    """


@compute.command()
@workspace_option
@click.option("--hosts", metavar="NAME:SLOTS,...", help="Hosts, as `dtrain run -H` takes them; each is a node.")
@click.option("--slurm-partition", metavar="NAME", help="A partition of Slurm's: jobs are submitted to it by sbatch.")
@click.option(
    "--sbatch-arg", "sbatch_args", metavar="ARG", multiple=True, help="With it: an option for sbatch, as --time=1:00:00."
)
@click.option("--max-nodes", type=int, metavar="N", help="With it: nodes that a job may have. [default: all of the partition]")
@click.argument("name")
def add(workspace: Workspace, name: str, hosts: str | None, **slurm: Any) -> None:
    """Make hosts or a Slurm partition a compute target, or give one of that name these.

    \b
    Example:
      dtrain compute add cluster --hosts node1:2,node2:2
      dtrain compute add queue --slurm-partition gpu --sbatch-arg=--gpus-per-node=2 --max-nodes 8
    """
    from dtrain.azureml import targets
    from dtrain.errors import UsageError

    partition = slurm.pop("slurm_partition")
    if (hosts is None) == (partition is None):
        raise UsageError("a compute target is made of --hosts or of a --slurm-partition; give one of them")
    if hosts is not None:
        if slurm["sbatch_args"] or slurm["max_nodes"] is not None:
            raise UsageError("--sbatch-arg and --max-nodes go with --slurm-partition; each of --hosts is a node")
        entry = targets.hosts_entry(hosts)
    else:
        entry = targets.partition_entry(partition, **slurm)
    before = targets.read_entries(workspace).get(name)
    targets.write_entry(workspace, name, entry)
    instead = f" (before: {_line(name, before)})" if before not in (None, entry) else ""
    click.echo(f"compute target {_line(name, entry)}{instead}", err=True)


def _line(name: str, entry: Mapping[str, Any]) -> str:
    from dtrain.azureml.targets import describe

    count = entry["max_nodes"]
    return f"{name}: {count} {'node' if count == 1 else 'nodes'}, {describe(entry)}"


@compute.command("list")
@workspace_option
@json_option
def list_targets(workspace: Workspace, as_json: bool) -> None:
    """List the compute targets of the workspace.

    \b
    Example:
      dtrain compute list --json
    """
    from dtrain.azureml.targets import read_entries

    entries = read_entries(workspace)
    if as_json:
        print_json(entries)
        return
    for name, entry in entries.items():
        click.echo(_line(name, entry))
    if not entries:
        click.echo(f"no compute targets in {workspace.root}", err=True)


@compute.command()
@workspace_option
@click.argument("name")
def remove(workspace: Workspace, name: str) -> None:
    """Remove a compute target; what it stands for, and runs, are left alone.

    \b
    Example:
      dtrain compute remove cluster
    """
    from dtrain.azureml.targets import read_entries, write_entry
    from dtrain.errors import UsageError, did_you_mean

    entries = read_entries(workspace)
    if name not in entries:
        raise UsageError(f"no compute target {name!r} in {workspace.root}{did_you_mean(name, entries)}")
    write_entry(workspace, name, None)


@main.group()
def datastore() -> None:
    """Name object stores and folders as datastores for control scripts of Azure ML's names (`dtrain azureml`).

    \b
    Example:
      dtrain datastore add images s3://bucket/images
    """


@datastore.command("add")
@workspace_option
@click.option("--default", "is_default", is_flag=True, help="It is what ws.get_default_datastore() returns from now on.")
@click.argument("name")
@click.argument("url")
def add_datastore(workspace: Workspace, is_default: bool, name: str, url: str) -> None:
    """Give s3://bucket/prefix, az://container/prefix or a folder's path a name, once it answers.

    Credentials are the environment's, and never kept: see docs/azureml.md.

    \b
    Example:
      dtrain datastore add images s3://bucket/images
      dtrain datastore add shared /data/shared --default
    """
    from dtrain.azureml.stores import add_store, set_default

    add_store(workspace, name, url)
    if is_default:
        set_default(workspace, name)


@datastore.command("list")
@workspace_option
@json_option
def list_datastores(workspace: Workspace, as_json: bool) -> None:
    """List the datastores of the workspace.

    \b
    Example:
      dtrain datastore list --json
    """
    from dtrain.azureml.stores import default_name, read_urls

    urls, default = read_urls(workspace), default_name(workspace)
    if as_json:
        print_json({name: {"url": url, "default": name == default} for name, url in urls.items()})
        return
    for name, url in urls.items():
        click.echo(f"{name}: {url}{' (default)' if name == default else ''}")


@datastore.command("remove")
@workspace_option
@click.argument("name")
def remove_datastore(workspace: Workspace, name: str) -> None:
    """Take a datastore's name away; its files are left alone.

    \b
    Example:
      dtrain datastore remove images
    """
    from dtrain.azureml.stores import remove_store

    remove_store(workspace, name)
