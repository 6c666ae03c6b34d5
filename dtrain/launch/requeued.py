"""`dtrain run` in a job script of the user's own: where Slurm starts the job again, it goes on from the run before."""

from __future__ import annotations

import dataclasses

from dtrain.allocation import Allocation
from dtrain.errors import WorkspaceError
from dtrain.files import read_json, write_json
from dtrain.launch.console import Console
from dtrain.layout import RunLayout, Workspace
from dtrain.spec import JobSpec

_RECORD = "allocation.json"


def note_allocation(run: RunLayout, allocation: Allocation) -> None:
    """Keep in the run folder which Slurm job the run is part of."""
    write_json(run.root / _RECORD, {"job_id": allocation.job_id, "cluster": allocation.cluster})


def find_earlier(spec: JobSpec, workspace: Workspace, allocation: Allocation) -> RunLayout | None:
    """The newest run of the same script with the same arguments in this Slurm job; None where it was not started before."""
    if allocation.restarts == 0:
        return None
    wanted = {"job_id": allocation.job_id, "cluster": allocation.cluster}
    for run in reversed(workspace.list_runs()):
        try:
            its = read_json(run.spec)
            if (its["target"], list(its["args"])) == (spec.target, list(spec.args)) and read_json(run.root / _RECORD) == wanted:
                return run
        except (FileNotFoundError, WorkspaceError):  # it is no part of a Slurm job, or damaged
            continue
    return None


def go_on(spec: JobSpec, workspace: Workspace, allocation: Allocation, console: Console) -> JobSpec:
    """The spec that resumes the run before, where Slurm has started the job again; else ``spec`` itself."""
    from dtrain.launch.job import resume_folder

    earlier = find_earlier(spec, workspace, allocation)
    if earlier is None:
        return spec
    console.say(f"dtrain: Slurm has started job {allocation.job_id} again; this run goes on from run {earlier.id}")
    return dataclasses.replace(spec, resume_from=resume_folder(earlier.id, workspace, console))
