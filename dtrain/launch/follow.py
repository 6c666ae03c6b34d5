"""A run that was submitted to Slurm, from the host that submitted it: started, followed, and its end made known."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import time

from dtrain import env
from dtrain.errors import NotRunnable, UsageError
from dtrain.files import open_anew
from dtrain.launch import queue, sbatch, slurm
from dtrain.launch.console import Console, LineReader
from dtrain.launch.job import announce, make_run, report_end
from dtrain.launch.logs import print_logs
from dtrain.launch.preflight import check_python
from dtrain.launch.sbatch import JobState, SlurmJob
from dtrain.layout import RunLayout, Workspace
from dtrain.spec import JobSpec
from dtrain.status import RunStatus, read_status, write_record

_POLL_S = 0.1
_ASK_S = 3.0
_ASK_AT_END_S = 0.2

# For how long Slurm has to give one reason by which a job can never start: its first one may be rash.
_SURE_S = 10.0


def submit_job(spec: JobSpec, workspace: Workspace, console: Console) -> RunLayout:
    """Make the run folder of a job and hand it to sbatch. Blocks until that has taken it.

    Raises UsageError, WorkspaceError, and NotRunnable where sbatch does not take it; no run folder is left then.
    """
    run = make_run(spec, workspace)
    try:
        submit_run(run, spec, console)
    except BaseException:
        if not run.slurm_job.exists():  # else Slurm has the job, whatever came then
            shutil.rmtree(run.root)
        raise
    return run


def submit_run(run: RunLayout, spec: JobSpec, console: Console) -> SlurmJob:
    """Hand the job of a filled run folder to sbatch. Blocks until that has taken it.

    Raises UsageError, WorkspaceError, and NotRunnable where sbatch, or the ranks' Python, does not.
    """
    masked = spec.to_json()
    if list(spec.args) != masked["args"]:
        raise UsageError("--secret: the script's arguments hold its value, which Slurm would show; have it read the variable")
    if hold := [name for name, value in spec.open_environment.items() if masked["environment"][name] != value]:
        raise UsageError(
            f"--secret: --env {hold[0]} holds the value of a secret, which the job would be given masked; make it one, too "
            f"(--secret {hold[0]})"
        )
    if spec.python is not None:
        check_python(spec.interpreter)
    plan = slurm.submission(spec, run, run.code)
    write_record(run.status, RunStatus(state="queued", size=spec.size, started=time.time()))
    job = sbatch.submit(plan, run, {**env.inherited(), **spec.secret_values()})
    announce(run, plan, console)
    console.say(f"dtrain: submitted as Slurm job {job.job_id}")
    return job


def come_back(run: RunLayout) -> str:
    """How to come back to a run that goes on without the terminal."""
    return f"dtrain: run {run.id} goes on; follow it with `dtrain logs -f {run.id}`, end it with `dtrain stop {run.id}`"


def follow_job(run: RunLayout, job: SlurmJob, console: Console, *, rank: int | None = None) -> RunStatus:
    """Show what a submitted run prints until its job has ended for good, and return how it ended. Blocks; writes the run's status
    where nobody else could."""
    watch = _Watch(run, job, console)
    print_logs(run, rank=rank, attempt=None, follow=True, is_over=watch.is_over, console=console)
    return watch.end()


def end_of_job(run: RunLayout, job: SlurmJob, console: Console) -> RunStatus:
    """Wait until a submitted run's job has ended for good, and return how; its ranks' output is not shown. Blocks."""
    watch = _Watch(run, job, console)
    while not watch.is_over():
        time.sleep(_POLL_S)
    return watch.end()


def settle_job(run: RunLayout, job: SlurmJob, console: Console) -> RunStatus | None:
    """The status of a submitted run that perhaps nobody follows, completed by what Slurm knows, and written; None before its job
    has ended for good. Asks Slurm once."""
    watch = _Watch(run, job, console)
    return watch.end() if watch.is_over() else None


class _Watch:
    """Watches a run's job: what Slurm and the job's own dtrain say, and when it is over."""

    def __init__(self, run: RunLayout, job: SlurmJob, console: Console) -> None:
        self._run, self._job, self._console = run, job, console
        self._words = LineReader(run.slurm_log)
        self._next_question = 0.0
        self._said = ""
        self._run_was_over = False
        self._last = JobState(state="PENDING")
        self._never = ("", 0.0)
        """The reason by which it would never start, empty where it may, and since when Slurm gives that."""
        self._gave_up = ""
        """Why the job was canceled here: it could never have started."""

    def is_over(self) -> bool:
        """Whether the job has ended for good: a run that was ended may yet be started again by Slurm."""
        status = read_status(self._run)
        # That its dtrain recorded: Slurm does not start it again, but may wait for a lost node for long.
        done = status.state in ("completed", "failed") and status.ended is not None
        if not status.is_over:  # else its last words come after those of its ranks
            self._show_words()
        if status.is_over and not self._run_was_over:
            self._next_question = 0.0
        self._run_was_over = status.is_over
        if time.monotonic() < self._next_question:
            return False
        self._next_question = time.monotonic() + (_ASK_AT_END_S if status.is_over else _ASK_S)
        self._look_again()
        state = self._job.look()
        if state is None and done:
            return True
        if state is None:
            self._say_once(f"dtrain: Slurm does not answer about job {self._job.job_id}; asking again")
            return False
        if state.is_waiting:
            self._show_words()
            if state.reason not in ("", "None"):  # not looked at yet
                self._say_once(f"dtrain: job {self._job.job_id} waits in Slurm's queue: {state.reason}")
            self._give_up_if_never(state)
        self._last = state
        return state.is_over or (done and state.state == "COMPLETING")

    def _give_up_if_never(self, state: JobState) -> None:
        """Cancel a job that Slurm will never start: it would wait for ever, and so would who follows it."""
        never = queue.why_never(state)
        if never != self._never[0]:
            self._never = (never, time.monotonic())
        if never and time.monotonic() - self._never[1] >= _SURE_S and not self._gave_up:
            self._gave_up = f"Slurm would never start job {self._job.job_id}, and it is canceled: {state.reason}: {never}"
            self._job.cancel()
            self._next_question = 0.0

    def end(self) -> RunStatus:
        """The job is over: say the rest, and return the run's status, which is completed by what Slurm knows."""
        self._look_again()
        recorded = read_status(self._run)
        self._show_words(final=True)
        status = queue.ended(self._run, recorded, self._job, self._last)
        if self._gave_up:
            failed = RunStatus(state="failed", size=status.size, started=status.started, earlier=status.earlier)
            status = dataclasses.replace(failed, exit_code=NotRunnable.exit_code, cause=self._gave_up, ended=status.ended)
        if status != recorded:
            write_record(self._run.status, status)
        cause = queue.why_ended(self._job, self._last)
        told = queue.ended(self._run, dataclasses.replace(recorded, ended=None), self._job, self._last).cause
        by_job = recorded.is_over and recorded.ended is not None and recorded.cause != told  # else who looked at it recorded it
        if not by_job or self._gave_up:  # else its dtrain has said it
            report_end(self._run, status, self._console)
        elif cause and (status.state == "canceled" or (status.state == "failed" and not status.cause.startswith("Slurm "))):
            self._console.say(f"dtrain: {cause}", bad=True)
        return status

    def _look_again(self) -> None:
        """See what the job's nodes have written, see RankLayout.look_again."""
        with contextlib.suppress(OSError):
            open_anew(self._run.root)
        self._words.look_again()

    def _show_words(self, *, final: bool = False) -> None:
        for line in self._words.lines(self._words.read(), final=final):
            self._console.say(line)

    def _say_once(self, text: str) -> None:
        if text != self._said:
            self._said = text
            self._console.say(text)
