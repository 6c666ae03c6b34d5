"""Ends a run from outside."""

from __future__ import annotations

import socket
import time

import psutil

from dtrain.errors import NotRunnable, WorkspaceError
from dtrain.launch.console import Console
from dtrain.launch.follow import end_of_job
from dtrain.launch.queue import status_reader
from dtrain.launch.sbatch import SlurmJob
from dtrain.layout import RunLayout
from dtrain.status import RunStatus, read_status

_POLL_S = 0.1


def stop_run(run: RunLayout, console: Console) -> RunStatus:
    """End a run that is queued or goes on, as Ctrl-C in its terminal would, and return how it ended. Blocks until it has.

    Raises NotRunnable where that cannot be done from here, and says where it can.
    """
    status, job = status_reader([run])(run), SlurmJob.of(run)
    if status.is_over and not _may_begin_again(status, job):
        console.say(f"dtrain: run {run.id} has ended before ({status.state})")
        return status
    if job is not None:
        job.cancel()
        console.say(f"dtrain: Slurm job {job.job_id} is canceled; waiting for its end")
        return end_of_job(run, job, console)
    if status.supervisor is None:
        raise NotRunnable(f"run {run.id} was not started by `dtrain run`; end it where it was started")
    if status.supervisor.host != socket.gethostname():
        raise NotRunnable(f"run {run.id} is supervised on host {status.supervisor.host}; stop it there: dtrain stop {run.root}")
    process = status.supervisor.find()
    if process is not None:
        try:
            process.terminate()
        except psutil.AccessDenied:
            raise WorkspaceError(f"run {run.id} is another user's ({process.username()}); they have to stop it") from None
        except psutil.NoSuchProcess:
            pass
    while not (status := read_status(run)).is_over:
        time.sleep(_POLL_S)
    return status


def _may_begin_again(status: RunStatus, job: SlurmJob | None) -> bool:
    """Whether Slurm is still ending the job of a canceled run: it may be about to put it back into its queue."""
    state = job.look() if job is not None and status.state == "canceled" else None
    return state is not None and not state.is_over
