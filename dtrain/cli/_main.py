"""The command's root, and what its verbs share."""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from dtrain import __version__, env
from dtrain.errors import DtrainError
from dtrain.files import to_json

F = TypeVar("F", bound=Callable[..., Any])

_VERBS = (
    *("run", "runs", "show", "logs", "stacks", "stop", "metrics", "register", "models", "pull", "verify", "unregister"),
    *("azureml", "compute", "datastore", "env", "doctor"),
)
"""In the order of the path of a run, as the help shows them."""


class _Commands(click.Group):
    """Turns dtrain's exceptions into one line and their exit code, ends quietly at Ctrl-C, and shows its verbs in their order."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except DtrainError as error:
            click.echo(f"dtrain: {error}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            ctx.exit(128 + signal.SIGINT)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(self.commands, key=_VERBS.index)


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


def workspace_option(command: F) -> F:
    return click.option(
        "--workspace",
        type=click.Path(file_okay=False, path_type=Path),
        callback=lambda _context, _parameter, value: env.workspace(value),
        help="Folder that holds runs and models. [default: $DTRAIN_WORKSPACE, else ./workspace]",
    )(command)


def json_option(command: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


def pairs(_context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    pairs = {}
    for text in values:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise click.BadParameter(f"{text!r} is not KEY=VALUE", param=parameter)
        pairs[key] = value
    return pairs


def print_json(value: Any) -> None:
    from dtrain.report import jsonable

    click.echo(to_json(jsonable(value)).decode())


def print_table(table: Any) -> None:
    from rich.console import Console

    # A narrow terminal wraps a wide line by itself; rich would cut names and numbers, which must be copied whole.
    Console(width=max(200, Console().width), highlight=False).print(table, soft_wrap=True)
