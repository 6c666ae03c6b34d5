"""A job's attempts: the plan is run, recorded, and where that is asked for run again, until one attempt decides."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from dtrain.errors import DtrainError, WorkspaceError
from dtrain.files import write_json
from dtrain.job_options import Restarts
from dtrain.launch.console import Console
from dtrain.launch.plan import LaunchPlan
from dtrain.launch.supervise import Limits, Signals, Supervisor
from dtrain.layout import RunLayout, StepFolder
from dtrain.processes import DUMP_STACKS, ProcessRecord, all_descriptors
from dtrain.status import RunStatus, exception_message, read_status

# A traceback has up to 50,000 characters, and stands in the run's outcome twice.
_ROOM_BYTES = 256 << 10


def run_attempts(
    plan: LaunchPlan, replan: Callable[[], LaunchPlan], run: RunLayout, limits: Limits, restarts: Restarts, console: Console
) -> RunStatus:
    """Run a plan to the job's end and return its status, which is also in ``status.json``. Blocks.

    ``replan`` gives the plan of a further attempt, which may have to have other ports.

    SIGINT and SIGTERM to this process end the job as canceled; a second one does not wait for the grace time. Each attempt keeps
    its ranks' files, metrics and outcome; the run's outcome is the last one's. The time limit is that of all attempts together. A
    run that was begun before (Slurm started its job again) goes on with a further attempt, and limits count from there.

    Raises NotRunnable when a command of the plan cannot be started, WorkspaceError when the run folder cannot be written.
    """
    running = _begun(plan, run)
    limits = dataclasses.replace(limits, began=running.started)
    running = _after_earlier(run, running, console)
    first = len(running.earlier)
    with _catching_signals() as signals, all_descriptors():
        while True:
            number = len(running.earlier)
            attempt = _begin(run, number, running, console)
            closed = False
            try:
                ended = _run_one(plan, attempt, limits, console, signals)
            except Exception as error:
                _record(run.status, _stopped_by(error, running), console)
                raise
            finally:
                closed = _close(attempt, console)
            restarted = ended.restarts + running.restarts
            ended = dataclasses.replace(ended, started=running.started, earlier=running.earlier, restarts=restarted)
            again = ended.state == "failed" and ended.exit_code in restarts.restart_on and number - first < restarts.max_restarts
            again = again and not signals.to_end and not _is_over(limits) and closed
            if not again or not _record(attempt.attempt_status, ended, console):
                break
            try:
                plan = replan()
            except DtrainError as error:  # the host that died, as a rule
                console.say(f"dtrain: the job is not started again: {error}", bad=True)
                break
            running = dataclasses.replace(running, earlier=[*running.earlier, ended.cause], restarts=ended.restarts)
            _say_again(run, ended, f"restart {number - first + 1} of {restarts.max_restarts}", console)
    _record(run.status, dataclasses.replace(ended, supervisor=running.supervisor), console)
    return ended


def _begun(plan: LaunchPlan, run: RunLayout) -> RunStatus:
    return RunStatus(
        state="running",
        size=plan.size,
        started=time.time(),
        supervisor=ProcessRecord.of(os.getpid()),
        tasks=plan.task_names(run),
        elastic=plan.elastic,
    )


def _run_one(plan: LaunchPlan, attempt: RunLayout, limits: Limits, console: Console, signals: Signals) -> RunStatus:
    """Run one attempt to its end; with copies of the run folder on the hosts that do not see it."""
    supervisor = functools.partial(Supervisor, plan, attempt, limits, console, signals)
    if not any(host.copied for host in plan.other_hosts):
        return supervisor().run()
    from dtrain.launch.copies import Copies  # late: nobody else need wait for what it imports

    copies = Copies(attempt, plan, console, signals)
    copies.send()
    try:
        ended = supervisor().run()
    finally:
        missing = copies.bring_back()
    if missing and ended.state == "completed":
        cause = f"all ranks completed, but what {', '.join(missing)} wrote is not brought back"
        return dataclasses.replace(ended, state="failed", exit_code=1, cause=cause)
    return ended


def _stopped_by(error: Exception, running: RunStatus) -> RunStatus:
    code, cause = (error.exit_code, str(error)) if isinstance(error, DtrainError) else (1, exception_message(error))
    return dataclasses.replace(running, state="failed", exit_code=code, cause=cause, ended=time.time())


def _record(path: Path, status: RunStatus, console: Console) -> bool:
    try:
        write_json(path, console.masker.value(dataclasses.asdict(status)))
    except OSError as error:
        console.say(f"dtrain: the outcome cannot be recorded in {path}: {error.strerror}", bad=True)
        return False
    return True


def _close(attempt: RunLayout, console: Console) -> bool:
    """Let nothing more of the attempt be saved; False when that cannot be."""
    try:
        attempt.end_attempt()
    except OSError as error:
        console.say(f"dtrain: attempt {attempt.attempt} cannot be closed: {error}; the job is not started again", bad=True)
        return False
    return True


def _begin(run: RunLayout, number: int, running: RunStatus, console: Console) -> RunLayout:
    try:
        attempt = run.begin_attempt(number, running.size)
        attempt.room.write_bytes(os.urandom(_ROOM_BYTES))  # zeros take none where the file system compresses
        write_json(run.status, console.masker.value(dataclasses.asdict(running)), durable=False)
    except OSError as error:
        raise WorkspaceError(f"run folder {run.root} cannot be written: {error}") from error
    return attempt


def _is_over(limits: Limits) -> bool:
    return limits.timeout_s is not None and limits.began is not None and time.time() - limits.began >= limits.timeout_s


def _after_earlier(run: RunLayout, running: RunStatus, console: Console) -> RunStatus:
    """``running`` as the status of the next attempt, where the run has had some; their last one is closed and recorded."""
    if not run.status.is_file() or (before := read_status(run)).state == "queued":
        return running
    if before.supervisor == running.supervisor:
        return running  # of this very process: who started it wrote that, no earlier attempt
    last = RunLayout(run.root, len(before.earlier))
    ended = dataclasses.replace(
        before, ended=before.ended or time.time(), cause=before.cause or "its host was lost, or it was killed"
    )
    if not before.is_over:
        ended = dataclasses.replace(ended, state="failed", exit_code=1)
    if not _close(last, console) or not _record(last.attempt_status, ended, console):
        raise WorkspaceError(f"attempt {last.attempt} of run {run.id} cannot be closed; another would not be safe from it")
    _say_again(run, ended, "Slurm started its job again", console)
    return dataclasses.replace(running, started=before.started, restarts=before.restarts, earlier=[*before.earlier, ended.cause])


def _say_again(run: RunLayout, ended: RunStatus, why: str, console: Console) -> None:
    number = len(ended.earlier)
    steps = StepFolder.committed(run.checkpoints)
    begin = f"from the checkpoint of step {max(steps)}" if steps else "(this run has no checkpoint of dtrain's yet)"
    state = "was canceled" if ended.state == "canceled" else "failed"
    console.say(f"dtrain: attempt {number} {state} with exit code {ended.exit_code}: {ended.cause}", bad=True)
    console.say(f"dtrain: its output is in {RunLayout(run.root, number).ranks}")
    console.say(f"dtrain: starting the job again {begin} ({why})")


@contextlib.contextmanager
def _catching_signals() -> Iterator[Signals]:
    """The signals that come to this process while a job runs."""
    came = Signals()

    def note(number: int, _frame: FrameType | None) -> None:
        (came.to_pass_on if number in passed_on else came.to_end).append(number)

    passed_on = [signal.SIGUSR1, signal.SIGUSR2, DUMP_STACKS]
    asking = [*passed_on, signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # else it is to outlive its terminal: `nohup dtrain run ... &`
        asking.append(signal.SIGHUP)
    before = {number: signal.signal(number, note) for number in asking}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
