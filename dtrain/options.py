"""Groups of options of `dtrain run` that fill one dataclass of the job's spec."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar

import click

from dtrain.roles import DIALECTS
from dtrain.spec import ClusterOptions

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
