"""The Slurm allocation that this process is in, as the environment tells it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from dtrain.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """Nodes that Slurm has given to a job. ``tasks`` is what the job asked for; one a node where it asked for none.

    ``cpus`` is how many CPUs of the first node are the job's, and ``cpus_per_task`` what was asked for; None where nothing was.
    """

    job_id: str
    nodelist: str
    nodes: int
    tasks: int
    cpus: int
    cpus_per_task: int | None = None

    @staticmethod
    def read(environ: Mapping[str, str] | None = None) -> Allocation | None:
        """The allocation around this process, or None.

        Raises UsageError within a step of several tasks: each of them would start a job of its own.
        """
        environ = os.environ if environ is None else environ
        job_id = environ.get("SLURM_JOB_ID")
        if not job_id:
            return None
        tasks = int(environ.get("SLURM_STEP_NUM_TASKS", "1")) if "SLURM_STEP_ID" in environ else 1
        if tasks > 1:
            raise UsageError(
                f"srun started this {tasks} times; start `dtrain run` once, without srun: it starts the ranks itself"
            )
        nodes = int(environ.get("SLURM_JOB_NUM_NODES", "1"))
        per_task = environ.get("SLURM_CPUS_PER_TASK")
        return Allocation(
            job_id=job_id,
            nodelist=environ.get("SLURM_JOB_NODELIST", ""),
            nodes=nodes,
            tasks=int(environ.get("SLURM_NTASKS") or nodes),
            cpus=tasks_on_node(environ.get("SLURM_JOB_CPUS_PER_NODE", ""), 0) or int(environ.get("SLURM_CPUS_ON_NODE", "1")),
            cpus_per_task=int(per_task) if per_task else None,
        )


def tasks_on_node(counts: str, node: int) -> int | None:
    """The number for node ``node`` in Slurm's way to write one a node, ``2(x3),1``; None where there is none."""
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts):
        node -= int(times or 1)
        if node < 0:
            return int(count)
    return None
