"""Groups of options of `dtrain run` that fill one dataclass of the job's spec."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar

import click

from dtrain.errors import UsageError
from dtrain.roles import DIALECTS
from dtrain.spec import ClusterOptions, Restarts

F = TypeVar("F", bound=Callable[..., Any])


def cluster(command: F) -> F:
    """The fields of ClusterOptions; None where one was not given, so that one without a cluster can be refused."""
    options = (
        click.option("--servers", type=int, metavar="N", help="Parameter servers. [default: 1 with --launcher parameter_server]"),
        click.option("--chief", is_flag=True, default=None, help="A chief beside the workers, as TensorFlow 2 wants it."),
        click.option("--evaluator", is_flag=True, default=None, help="An evaluator beside the cluster."),
        click.option(
            "--tf-config",
            metavar="|".join(DIALECTS),
            help="Who leads in TF_CONFIG: a chief, worker 0, or a master. [default: chief with --chief, else workers]",
        ),
        click.option(
            "--start-timeout", "start_timeout_s", metavar="S", type=float, help="Seconds until a task must listen. [default: 120]"
        ),
        click.option(
            "--max-worker-restarts", type=int, metavar="K", help="Start a killed worker again, up to K times. [default: 3]"
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def take_cluster(given: dict[str, Any]) -> ClusterOptions | None:
    """Take the cluster's options out of ``given``; None when there are none."""
    values = {field.name: value for field in fields(ClusterOptions) if (value := given.pop(field.name)) is not None}
    return ClusterOptions(**values) if values else None


def restarts(command: F) -> F:
    """The fields of Restarts."""
    codes = ",".join(map(str, Restarts.restart_on))
    options = (
        click.option(
            "--max-restarts",
            type=int,
            metavar="K",
            default=Restarts.max_restarts,
            show_default=True,
            help="Start the whole job again from its newest checkpoint, up to K times.",
        ),
        click.option(
            "--restart-on", metavar="CODES", default=codes, show_default=True, help="Exit codes after which that is done."
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def take_restarts(given: dict[str, Any]) -> Restarts:
    """Take the restarts' options out of ``given``."""
    text, most = given.pop("restart_on"), given.pop("max_restarts")
    try:
        codes = tuple(int(code) for code in text.split(","))
    except ValueError:
        raise UsageError(f"--restart-on {text!r} is not a list of exit codes; use numbers from 1 to 255, as 137,143") from None
    return Restarts(max_restarts=most, restart_on=codes)
