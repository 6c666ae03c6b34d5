"""Launcher ``local``: one rank, started directly."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from dtrain import env, resources
from dtrain.job_options import available_cores
from dtrain.launch.plan import LaunchPlan, PlannedProcess, rank_argv
from dtrain.layout import RunLayout
from dtrain.spec import JobSpec


def plan(spec: JobSpec, run: RunLayout, cwd: Path) -> LaunchPlan:
    """Plan the one process of ``spec``. Pure; ``cwd`` is the folder in which it will work."""
    environment = {
        **resources.share_variables(spec.bind, [available_cores()], {**os.environ, **spec.environment}),
        **env.launch_variables(run, size=1, vocabulary="dtrain", resume_from=spec.resume_from),
        **env.rank_variables(0, 0, 1),
        **spec.open_environment,
    }
    process = PlannedProcess(name="rank 0", host=socket.gethostname(), argv=rank_argv(spec), environment=environment, cwd=cwd)
    return LaunchPlan(launcher=spec.launcher_name, size=1, processes=(process,))
