"""What a process is in a cluster whose processes do different things: its role and its number within it.

The order of :data:`ROLES` is the order of ranks: the task that leads (chief or master, else worker 0) is rank 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Role = Literal["chief", "master", "worker", "ps", "evaluator"]
ROLES: tuple[Role, ...] = get_args(Role)

Dialect = Literal["chief", "workers", "master"]
"""Whether a ``chief`` leads (TensorFlow 2), worker 0 (TF1's ``ClusterSpec`` code, Azure ML), or a ``master`` (Estimator)."""
DIALECTS: tuple[Dialect, ...] = get_args(Dialect)


@dataclass(frozen=True)
class Task:
    """One process of a cluster; ``index`` counts within the role."""

    role: Role
    index: int

    def __str__(self) -> str:
        return f"{self.role} {self.index}"

    @property
    def label(self) -> str:
        """The name without a blank, for prefixes: ``worker0``."""
        return f"{self.role}{self.index}"

    @property
    def in_cluster(self) -> bool:
        """An evaluator reads checkpoints beside the cluster; listed in it, the others would wait for it for ever."""
        return self.role != "evaluator"


def cluster_tasks(dialect: Dialect, *, workers: int, servers: int, evaluator: bool = False) -> tuple[Task, ...]:
    """All tasks of a cluster, in the order of their ranks."""
    counts: dict[Role, int] = {
        "chief": int(dialect == "chief"),
        "master": int(dialect == "master"),
        "worker": workers,
        "ps": servers,
        "evaluator": int(evaluator),
    }
    return tuple(Task(role, index) for role in ROLES for index in range(counts[role]))
