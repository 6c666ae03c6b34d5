"""Verbs of the registry."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dtrain.cli._main import json_option, main, pairs, print_json, print_table, workspace_option
from dtrain.layout import Workspace

if TYPE_CHECKING:
    from dtrain.registry import ModelVersion


@main.command()
@workspace_option
@json_option
@click.option("--name", required=True, help="The model's name.")
@click.option(
    "--path", metavar="PATH", help="File or folder in the run folder. [default: outputs, without metrics and checkpoints]"
)
@click.option("--tag", "tags", metavar="K=V", multiple=True, callback=pairs, help="Tag of the version; may be repeated.")
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
        print_json(version.to_json())
    else:
        click.echo(_line(version))


def _line(version: ModelVersion) -> str:
    files = "1 file" if len(version.files) == 1 else f"{len(version.files)} files"
    return f"{version.id}  {files}  {version.size_bytes:,} bytes  from {version.run}"


@main.command()
@workspace_option
@json_option
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
        print_json([version.to_json() for version in found])
    elif found:
        print_table(report.models_table([version.to_json() for version in found]))
    else:
        click.echo(f"no models in {workspace.registry}; `dtrain register` makes one", err=True)


@main.command()
@workspace_option
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
@workspace_option
@click.option("--yes", is_flag=True, help="Do not ask first.")
@click.argument("model", metavar="NAME:VERSION")
def unregister(workspace: Workspace, model: str, yes: bool) -> None:
    """Delete one version of a model for good, with those of its files that no other version has.

    Its number is not used again. The run that it came from is left alone.

    \b
    Example:
      dtrain unregister digits:1
    """
    from dtrain.errors import UsageError
    from dtrain.registry import Registry

    registry = Registry(workspace.registry)
    version = registry.get(model)
    if version.id == model and not yes:  # else it is refused below
        if not sys.stdin.isatty():
            raise UsageError(f"{model} would be deleted for good, and there is no terminal to ask on; say --yes")
        click.confirm(f"Delete {_line(version)} for good?", abort=True, err=True)
    click.echo(f"{_line(registry.delete(model))}  deleted")


@main.command()
@workspace_option
@json_option
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
        print_json([problem.to_json() for problem in problems])
    for problem in () if as_json else problems:
        click.echo(f"{problem.model}:{problem.version}  {problem.path or 'its record'}  {problem.what}")
    if problems:
        said = f"{len(problems)} {'problem' if len(problems) == 1 else 'problems'}"
    else:
        said = "all files are as they were registered" if registry.names() else f"no models in {workspace.registry}"
    click.echo(said, err=True)
    sys.exit(1 if problems else 0)
