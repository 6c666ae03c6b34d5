"""Launchers ``parameter_server`` and ``multi_worker``: TensorFlow's clusters, every task a process of its own with its TF_CONFIG.

The order of the start is TensorFlow's need: whoever comes before the servers listen tries again for long, and a worker of
a TF1 script that comes before its chief sleeps for 30 s (``recovery_wait_secs``).
"""

from __future__ import annotations

import errno
import os
import random
import socket
from collections.abc import Sequence
from pathlib import Path

from dtrain import env
from dtrain.errors import NotRunnable, UsageError
from dtrain.launch.plan import LaunchPlan, PlannedProcess, PlannedTask, rank_argv
from dtrain.layout import RunLayout
from dtrain.roles import Task
from dtrain.spec import JobSpec, available_cores
from dtrain.tf_config import TF_CONFIG, cluster_variables

_HOST = "127.0.0.1"
# Below the range from which Linux takes the ports of outgoing connections (32768 on), one of which could else come to sit on a
# worker's port between its death and its restart.
_PORTS = range(10_000, 32_000)


def plan(spec: JobSpec, run: RunLayout, cwd: Path, ports: Sequence[int]) -> LaunchPlan:
    """Plan every task of ``spec``'s cluster on this host. Pure; ``ports`` has a free one for each task of :meth:`JobSpec.tasks`.

    Raises UsageError when ``--env`` sets TF_CONFIG, which is this launcher's to write.
    """
    if TF_CONFIG in spec.environment:
        raise UsageError(f"--env {TF_CONFIG}=... contradicts --launcher {spec.launcher_name}, which writes it for every task")
    dialect, tasks = spec.cluster_options.dialect, spec.tasks
    addresses = {task: f"{_HOST}:{port}" for task, port in zip(tasks, ports, strict=True)}
    common = {
        **env.thread_variables(available_cores(), len(tasks), {**os.environ, **spec.environment}),
        **env.launch_variables(run, size=len(tasks), vocabulary=env.CLUSTER_VOCABULARY, resume_from=spec.resume_from),
    }
    processes = []
    for rank, task in enumerate(tasks):
        environment = {
            **common,
            **env.rank_variables(rank, rank, len(tasks)),
            **cluster_variables(addresses, task, dialect),
            **spec.environment,
        }
        processes.append(
            PlannedProcess(
                name=str(task),
                host=socket.gethostname(),
                argv=rank_argv(spec),
                environment=environment,
                cwd=cwd,
                task=_planned(spec, rank, task, ports[rank]),
            )
        )
    processes.sort(key=lambda process: (process.task.stage, process.task.rank) if process.task else (0, 0))
    return LaunchPlan(launcher=spec.launcher_name, size=len(tasks), processes=tuple(processes))


def _planned(spec: JobSpec, rank: int, task: Task, port: int) -> PlannedTask:
    """How the supervisor treats a task.

    With a chief the job's outcome is the chief's (and its evaluator's), and workers serve it; without one it is the
    workers', of whom worker 0 leads.
    """
    asynchronous = any(each.role == "ps" for each in spec.tasks)  # without servers the workers compute together
    has_chief = spec.cluster_options.dialect != "workers"
    leads = task.role in ("chief", "master")
    led = has_chief or rank == 0
    stage = 0 if task.role == "ps" or not asynchronous else 1 if led else 2
    follows = task.role == "ps" or (task.role == "worker" and has_chief and asynchronous)
    replaceable = asynchronous and task.role == "worker" and rank > 0
    return PlannedTask(
        rank=rank,
        task=task,
        # A chief may prepare data for as long as it likes: nobody waits for it to listen but in a cluster without servers.
        address=None if task.role == "evaluator" or (leads and asynchronous) else (_HOST, port),
        stage=stage,
        ends_job=not follows,
        max_restarts=(spec.cluster_options.max_worker_restarts or 0) if replaceable else 0,
    )


def free_ports(count: int) -> list[int]:
    """Ports of this host on which nobody listens now, all different. Raises NotRunnable when there are not that many."""
    candidates = iter(random.SystemRandom().sample(_PORTS, len(_PORTS)))
    found = [port for port, _ in zip((port for port in candidates if is_free(port)), range(count), strict=False)]
    if len(found) < count:
        raise NotRunnable(f"{count} ports are needed, and only {len(found)} of {_PORTS.start} to {_PORTS.stop - 1} are free")
    return found


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a worker's last connections may linger on its port
        try:
            probe.bind(("", port))
            probe.listen()  # with the option alone, Linux binds beside another that has not begun to listen
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                return False
            raise
    return True
