"""Launchers ``parameter_server`` and ``multi_worker``: TensorFlow's clusters, every task a process of its own with its TF_CONFIG.

The order of the start is TensorFlow's need: whoever comes before the servers listen tries again for long, and a worker of
a TF1 script that comes before its chief sleeps for 30 s (``recovery_wait_secs``).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from dtrain import env, resources
from dtrain.errors import UsageError
from dtrain.launch import ssh
from dtrain.launch.places import Place, planned_hosts
from dtrain.launch.plan import LaunchPlan, PlannedProcess, PlannedTask, rank_argv
from dtrain.layout import RunLayout
from dtrain.roles import Task
from dtrain.spec import JobSpec
from dtrain.tf_config import TF_CONFIG, cluster_variables


def plan(spec: JobSpec, run: RunLayout, cwd: Path, places: Sequence[Place]) -> LaunchPlan:
    """Plan every task of ``spec``'s cluster. Pure; ``places`` has one for each task of :meth:`JobSpec.tasks`.

    Raises UsageError when ``--env`` sets TF_CONFIG, which is this launcher's to write, and for an evaluator that would see no
    checkpoints.
    """
    if TF_CONFIG in spec.environment:
        raise UsageError(f"--env {TF_CONFIG}=... contradicts --launcher {spec.launcher_name}, which writes it for every task")
    _check_evaluator(spec.tasks, places)
    dialect, tasks = spec.cluster_options.dialect, spec.tasks
    addresses = {task: place.address for task, place in zip(tasks, places, strict=True)}
    common = env.launch_variables(run, size=len(tasks), vocabulary=env.CLUSTER_VOCABULARY, resume_from=spec.resume_from)
    names = [place.host for place in places]
    processes = []
    for rank, (task, place) in enumerate(zip(tasks, places, strict=True)):
        local_size = names.count(place.host)
        environment = {
            **(ssh.starting_variables() if place.over_ssh else {}),
            **resources.share_variables(spec.bind, [max(1, place.cores // local_size)], {**os.environ, **spec.environment}),
            **common,
            **env.rank_variables(rank, names[:rank].count(place.host), local_size),
            **cluster_variables(addresses, task, dialect),
            **spec.open_environment,
        }
        processes.append(
            PlannedProcess(
                name=str(task),
                host=place.host,
                argv=rank_argv(spec),
                environment=environment,
                cwd=cwd,
                task=_planned(spec, rank, task, place),
                over_ssh=place.over_ssh,
            )
        )
    processes.sort(key=lambda process: (process.task.stage, process.task.rank) if process.task else (0, 0))
    # Their tasks are processes of the plan; an agent brings what they write where the run folder is not shared.
    copied = tuple(host for host in planned_hosts(places) if host.copied)
    return LaunchPlan(launcher=spec.launcher_name, size=len(tasks), processes=tuple(processes), other_hosts=copied)


def _check_evaluator(tasks: Sequence[Task], places: Sequence[Place]) -> None:
    for task, place in zip(tasks, places, strict=True):
        if task.role == "evaluator" and place.host != places[0].host and (place.copied or places[0].copied):
            raise UsageError(
                f"the evaluator on {place.host} would not see the checkpoints of the {tasks[0].role} on {places[0].host}; use a "
                "workspace that both see, or give that host slots for all tasks, or leave out --evaluator"
            )


def _planned(spec: JobSpec, rank: int, task: Task, place: Place) -> PlannedTask:
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
        address=None if task.role == "evaluator" or (leads and asynchronous) else (place.name, place.port),
        stage=stage,
        ends_job=not follows,
        max_restarts=(spec.cluster_options.max_worker_restarts or 0) if replaceable else 0,
    )
