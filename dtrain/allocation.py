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
    ``cpus_by_node`` has those of every node; empty where Slurm does not say, or lets tasks share CPUs (``--overcommit``).
    """

    job_id: str
    nodelist: str
    nodes: int
    tasks: int
    cpus: int
    cpus_per_task: int | None = None
    cpus_by_node: tuple[int, ...] = ()
    restarts: int = 0
    """How often Slurm has started the job again."""
    cluster: str = ""

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
        cpus = numbers_by_node(environ.get("SLURM_JOB_CPUS_PER_NODE", ""))
        return Allocation(
            job_id=job_id,
            nodelist=environ.get("SLURM_JOB_NODELIST", ""),
            nodes=nodes,
            tasks=int(environ.get("SLURM_NTASKS") or nodes),
            cpus=cpus[0] if cpus else int(environ.get("SLURM_CPUS_ON_NODE", "1")),
            cpus_per_task=int(per_task) if per_task else None,
            cpus_by_node=() if "SLURM_OVERCOMMIT" in environ else tuple(cpus),
            restarts=int(environ.get("SLURM_RESTART_COUNT") or 0),
            cluster=environ.get("SLURM_CLUSTER_NAME", ""),
        )

    def room(self, nodes: int, per_node: int | None) -> int:
        """How many tasks srun starts at most on that many of the nodes, and with at most ``per_node`` on each: a CPU, or
        ``cpus_per_task``, a task. Only where ``cpus_by_node`` is known."""
        fits = sorted((cpus // (self.cpus_per_task or 1) for cpus in self.cpus_by_node), reverse=True)
        return sum(fit if per_node is None else min(fit, per_node) for fit in fits[:nodes])


def tasks_on_node(counts: str, node: int) -> int | None:
    """The number for node ``node`` in :func:`numbers_by_node`; None where there is none."""
    numbers = numbers_by_node(counts)
    return numbers[node] if node < len(numbers) else None


def numbers_by_node(text: str) -> list[int]:
    """Numbers in Slurm's way to write one a node, ``2(x3),1``."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(number) for number, times in found for _ in range(int(times or 1))]
