"""The verb for control scripts that were written for Azure ML's SDK v1."""

from __future__ import annotations

from typing import Any

import click

from dtrain.cli._main import main


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
@click.option("-m", "is_module", is_flag=True, help="SCRIPT is a module, as in `python -m`.")
@click.pass_context
def azureml(context: click.Context, force: bool, any_version: bool, is_module: bool) -> None:
    """Run a control script written for Azure ML's SDK v1: `import azureml.core` and the rest are dtrain's.

    Its jobs run on this machine, and go on when the script ends. docs/azureml.md lists the names that there are.

    \b
    Example:
      dtrain azureml init --name my-workspace
      dtrain azureml submit.py
    """
    context.obj = {"force": force, "any_version": any_version, "is_module": is_module}


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
