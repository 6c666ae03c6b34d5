"""A run's state in the SDK's words, told from what its processes have left."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import time
from pathlib import Path

from dtrain.azureml import records
from dtrain.azureml.errors import UserErrorException
from dtrain.errors import NotRunnable, WorkspaceError
from dtrain.files import read_json, write_json
from dtrain.launch.console import Console
from dtrain.launch.follow import settle_job
from dtrain.launch.queue import status_reader
from dtrain.launch.sbatch import SlurmJob
from dtrain.layout import RunLayout
from dtrain.processes import ProcessRecord
from dtrain.status import RankFailure, RunStatus, read_process, read_status, write_record

ENDED = ("Completed", "Failed", "Canceled")
_ASK_S = 3.0
_SUBMITTED_S = 300.0  # sbatch is given up after a minute; hosts' clocks differ
_next_question: dict[Path, float] = {}
_waiting: dict[Path, bool] = {}
"""What was answered last: whether a job waits again."""
_GONE_S = 2.0
_WORDS = {"completed": "Completed", "failed": "Failed", "canceled": "Canceled"}


def status_of(run: RunLayout) -> RunStatus:
    """The run's status; one whose supervisor was asked to cancel it, and is gone, is canceled; one that was let fail, failed.

    Of one that Slurm has, and nobody follows, Slurm is asked.
    """
    status = read_status(run)
    if not status.is_over:
        status = _unfollowed(run, status)
    if status.state == "failed" and status.ended is None and records.events(run, "cancel"):
        # The supervisor was told to end before it could listen.
        status = dataclasses.replace(
            status, state="canceled", ended=time.time(), exit_code=128 + signal.SIGTERM, cause="canceled before it began"
        )
        write_record(run.status, status)
    if status.state in ("completed", "canceled") and (asked := records.events(run, "fail")):
        status = dataclasses.replace(status, state="failed", exit_code=1, cause=asked[0]["text"])
        write_record(run.status, status)
    return status


def _unfollowed(run: RunLayout, status: RunStatus) -> RunStatus:
    """The status of a run whose supervisor is gone, or on another host: of one that goes to Slurm, as Slurm tells.

    Asks it every few seconds, and blocks for that moment.
    """
    supervisor = _supervisor(run, status)
    if supervisor is None or supervisor.find() is not None:
        return status
    job = SlurmJob.of(run)
    if job is None:
        status = read_status(run)  # as its supervisor left it
        silent = supervisor.vanished() or time.time() - status.started > _SUBMITTED_S
        if status.state != "queued" or not silent:
            return status
        cause = (
            f"what submitted it to Slurm was killed, or its host {supervisor.host} restarted, before Slurm had answered; "
            "`squeue --me` shows whether it has the job"
        )
        status = dataclasses.replace(status, state="failed", ended=time.time(), exit_code=1, cause=cause)
        with contextlib.suppress(PermissionError):
            write_record(run.status, status)
        return status
    if time.monotonic() < _next_question.get(run.root, 0.0):
        return status
    _next_question[run.root] = time.monotonic() + _ASK_S
    with contextlib.suppress(PermissionError), open(records.AzureLayout(run).console, "a") as words:  # else another user's
        settled = settle_job(run, job, Console(words, words))
        if settled is not None and supervisor.vanished():
            _note_what_is_not_uploaded(run)
        return settled or status
    return status


def _note_what_is_not_uploaded(run: RunLayout) -> None:
    mounted = records.events(run, "mounted")
    if mounted and not records.events(run, "uploaded"):
        records.note(
            run,
            "warning",
            text="its supervisor was killed before it could upload what the job wrote to its copies of "
            f"{', '.join(mounted[0]['urls'])}: that stays in {records.AzureLayout(run).data}",
        )


def azure_status(run: RunLayout) -> str:
    """Preparing (until its supervisor works, and its environment and copies of data are there), Queued (until its first rank has
    begun, and when Slurm is to start its job again), Running, Finalizing (what is left to do when the ranks have ended), and
    Completed, Failed or Canceled."""
    try:
        status = status_of(run)
    except WorkspaceError:
        if run.spec.is_file() and not run.status.exists():
            return "Preparing"
        raise
    if status.state == "queued":
        return "Queued"
    if status.is_over:
        supervisor = _supervisor(run, status)
        if supervisor is None or supervisor.find() is None:
            return _WORDS[status.state]
        return "Queued" if status.state == "canceled" and _waits_again(run) else "Finalizing"
    newest = run.newest_attempt()
    if status.supervisor is not None and newest.attempt is None:
        return "Preparing"
    ranks = range(status.size)
    began = [rank for rank in ranks if read_process(newest, rank) is not None]
    if not began:
        return "Queued" if _has_begun(run) else "Preparing"
    ended = all(newest.rank(rank).done.is_file() or newest.rank(rank).error.is_file() for rank in ranks)
    return "Finalizing" if ended and status.supervisor is not None else "Running"


def _waits_again(run: RunLayout) -> bool:
    """Whether Slurm has put the job of a canceled attempt back into its queue. Asks it every few seconds, and blocks for that
    moment."""
    if SlurmJob.of(run) is None:
        return False
    if time.monotonic() >= _next_question.get(run.root, 0.0):
        _next_question[run.root] = time.monotonic() + _ASK_S
        _waiting[run.root] = status_reader([run])(run).state == "queued"
    return _waiting.get(run.root, False)


def told_status(run: RunLayout) -> str:
    """:func:`azure_status` as scripts are told it: of a run that was let fail, Failed also while its ranks are being ended."""
    return "Failed" if records.events(run, "fail") else azure_status(run)


def _supervisor(run: RunLayout, status: RunStatus) -> ProcessRecord | None:
    """The process that sees to the run from where it was submitted; of an ordinary `dtrain run` the one that it is."""
    try:
        return ProcessRecord(**read_json(records.AzureLayout(run).supervisor))
    except FileNotFoundError:
        return status.supervisor


def _has_begun(run: RunLayout) -> bool:
    """Whether the supervisor has said its first word, and made the environment and the copies if it has to."""
    if records.events(run, "preparing") and not records.events(run, "prepared"):
        return False
    try:
        return records.AzureLayout(run).console.stat().st_size > 0
    except FileNotFoundError:
        return True  # an ordinary `dtrain run`


def cancel(run: RunLayout) -> None:
    """Ask the run's supervisor, or Slurm, to end the job; returns at once, or within 2 s where it has not begun.

    Raises UserErrorException for a supervisor on another host, and where Slurm does not take it.
    """
    status, job = status_of(run), SlurmJob.of(run)
    if status.is_over and (job is None or status_reader([run])(run).is_over):  # else Slurm is to start it again
        return
    records.note(run, "cancel")
    supervisor = _supervisor(run, status)
    if job is not None:
        try:
            job.cancel()
        except NotRunnable as error:
            raise UserErrorException(str(error)) from error
        return
    if supervisor is None:
        end_by_hand(run, "canceled by cancel()", exit_code=128 + signal.SIGINT)
        return
    process = supervisor.find()
    if process is not None:
        listens = _has_begun(run)
        process.send_signal(signal.SIGTERM)
        until = time.monotonic() + _GONE_S
        while not listens and supervisor.find() is not None and time.monotonic() < until:
            time.sleep(0.01)
        if not listens:
            status_of(run)  # which records that it is canceled: nobody else does
    elif not supervisor.vanished():
        raise UserErrorException(f"run {run.id} is supervised on {supervisor.host}; call cancel() there")


def fail_job(run: RunLayout, message: str) -> None:
    """Let a job count as failed: what has ended at once, what runs when its supervisor has ended it. Returns at once."""
    records.note(run, "fail", text=message)
    cancel(run)


def end_by_hand(run: RunLayout, message: str, *, exit_code: int) -> None:
    """Record the end of a run that has no supervisor: 0 completed, 130 canceled, others failed."""
    if exit_code == 0:
        write_json(run.rank(0).done, {"time": time.time()})
    else:
        write_record(run.rank(0).error, RankFailure.now(0, "exit", exit_code, message))
    write_record(run.status, dataclasses.replace(read_status(run), ended=time.time()))
