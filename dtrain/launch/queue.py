"""The status of runs that were submitted to Slurm: what dtrain recorded, and what Slurm says of their jobs."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import signal
import time
from collections.abc import Callable, Iterable

from dtrain.errors import WorkspaceError
from dtrain.files import open_anew
from dtrain.launch.sbatch import JobState, SlurmJob, look_at
from dtrain.launch.supervise import TIME_LIMIT
from dtrain.layout import RunLayout
from dtrain.status import RunStatus, State, read_status, write_record

# Who lists runs does not wait for long for a Slurm that is down.
_ANSWER_S = 5.0

# What Slurm calls the end of a job that it ended itself → what became of the run then, and why.
_ENDS: dict[str, tuple[State, int, str]] = {
    "CANCELLED": ("canceled", 128 + signal.SIGTERM, "it was canceled (scancel)"),
    "TIMEOUT": ("failed", TIME_LIMIT, "it reached its time limit (sbatch's --time, or the partition's)"),
    "DEADLINE": ("failed", TIME_LIMIT, "it reached its deadline"),
    "PREEMPTED": ("canceled", 128 + signal.SIGTERM, "a job of higher priority took its nodes"),
    "NODE_FAIL": ("failed", 1, "one of its nodes failed"),
    "BOOT_FAIL": ("failed", 1, "one of its nodes did not start"),
    "OUT_OF_MEMORY": ("failed", 128 + signal.SIGKILL, "it needed more memory than it was given (sbatch's --mem)"),
}

_OTHER_PARTITION = "name another partition (--sbatch-arg=--partition=NAME; `sinfo` lists them)"
_OTHER_ACCOUNT = "name another account or QOS (--sbatch-arg=--account=NAME, --sbatch-arg=--qos=NAME)"
# Why a job waits that will wait for ever, by Slurm's word → what that means, and what to do. https://slurm.schedmd.com/job_reason_codes.html
_NEVER = {
    "PartitionConfig": f"the partition has not so many nodes or CPUs; lower --nodes or -n, or {_OTHER_PARTITION}",
    "PartitionNodeLimit": f"the partition gives no job so many nodes, or so few; change --nodes, or {_OTHER_PARTITION}",
    "PartitionTimeLimit": f"the partition gives no job so much time; lower --sbatch-arg=--time=TIME, or {_OTHER_PARTITION}",
    "BadConstraints": "no node has what --sbatch-arg asks for; ask for less",
    "DependencyNeverSatisfied": "a job that it depends on did not end as it has to; leave out --sbatch-arg=--dependency=JOBS",
    "ReservationDeleted": "its reservation is there no more; leave out --sbatch-arg=--reservation=NAME",
    "AccountNotAllowed|InvalidAccount|QOSNotAllowed|InvalidQOS": f"the partition is not open to it; {_OTHER_ACCOUNT}",
    r"(Assoc|QOS)(Max\w+Per(Job|Node)(Limit)?|Min\w+)|MaxMemPerLimit": (
        f"a job of this account or QOS gets no more, or no less; ask for another number, or {_OTHER_ACCOUNT}"
    ),
}


def status_reader(runs: Iterable[RunLayout]) -> Callable[[RunLayout], RunStatus]:
    """A :func:`dtrain.status.read_status` for these runs that also knows what Slurm says of their jobs, asked once, here.

    The end of a job that nobody has recorded, it records.

    Blocks for a moment; for seconds where Slurm does not answer: then what is recorded is all that is known.
    """
    jobs: dict[RunLayout, SlurmJob] = {}
    for run in runs:
        with contextlib.suppress(WorkspaceError):  # a damaged one is the reader's to meet
            if (job := SlurmJob.of(run)) is not None and read_status(run).state != "completed":
                jobs[run] = job
    states = look_at(jobs.values(), _ANSWER_S)

    def read(run: RunLayout) -> RunStatus:
        status, job = read_status(run), jobs.get(run)
        if job is None or job not in states:
            return status
        state = states[job]
        if state.is_waiting:
            return queued(status, state)
        return _settled(run, job, state) if state.is_over else status

    return read


def _settled(run: RunLayout, job: SlurmJob, state: JobState) -> RunStatus:
    """The status of a run whose job is over for good, which is recorded where it was not: nobody may follow the run."""
    with contextlib.suppress(OSError):
        open_anew(run.root)  # its nodes may have recorded more by now
    recorded = read_status(run)
    status = ended(run, recorded, job, state)
    if status != recorded:
        with contextlib.suppress(OSError):  # another user's, or the disk is full
            write_record(run.status, status)
    return status


def queued(status: RunStatus, state: JobState) -> RunStatus:
    """The status of a run whose job waits: as it was submitted, or after an attempt, of which Slurm starts it again."""
    cause = "waits in Slurm's queue"
    if state.reason not in ("", "None"):  # not looked at yet
        cause += f": {state.reason}"
    if status.state == "queued":
        return dataclasses.replace(status, cause=cause)
    earlier = [*status.earlier, status.cause or "its host was lost, or it was killed"]
    return RunStatus(
        state="queued", size=status.size, started=status.started, cause=cause, restarts=status.restarts, earlier=earlier
    )


def ended(run: RunLayout, status: RunStatus, job: SlurmJob, state: JobState) -> RunStatus:
    """The status of a run whose job is over for good, completed by what Slurm knows where that is more."""
    recorded = status.is_over and status.ended is not None  # else its dtrain was killed, and could record nothing
    told = why_ended(job, state)
    if recorded and (status.state != "canceled" or told in ("", status.cause)):
        return status
    if state.state and not state.host:  # it was ended while it waited
        status = queued(status, state)
    if state.state in _ENDS:
        (became, code, _), cause = _ENDS[state.state], told
    elif state.reason == "JobLaunchFailure" and not run.slurm_log.exists():
        became, code = "failed", 1
        cause = (
            f"Slurm could not start job {job.job_id} on {state.host}: that node does not see {run.root}, or cannot write there; "
            "choose a workspace on a file system that all nodes share (--workspace, DTRAIN_WORKSPACE)"
        )
    else:
        became, code = "failed", 1
        cause = f"Slurm job {job.job_id} ended before the run did ({state.state or 'Slurm no longer knows it'}); "
        cause += f"its last words are in {run.slurm_log}"
    return dataclasses.replace(status, state=became, exit_code=code, cause=cause, ended=status.ended or time.time())


def why_ended(job: SlurmJob, state: JobState) -> str:
    """Why Slurm ended a job that is over, in a sentence; empty where it ended by itself."""
    return f"Slurm ended job {job.job_id}: {_ENDS[state.state][2]}" if state.state in _ENDS else ""


def why_never(state: JobState) -> str:
    """Why a waiting job will never start, and what to do; empty where it may.

    Of several partitions Slurm names the reason of one at a time: of such a job nobody can say.
    """
    if not state.is_waiting or "," in state.partition:
        return ""
    return next((words for reasons, words in _NEVER.items() if re.fullmatch(reasons, state.reason)), "")
