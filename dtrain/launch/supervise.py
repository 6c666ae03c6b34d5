"""One supervisor for every plan: starts it, shows its output, finds the first failure, ends the rest, judges the outcome."""

from __future__ import annotations

import contextlib
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import psutil

from dtrain.job_options import Hangs
from dtrain.launch.agents import Agents
from dtrain.launch.beats import Beats, BeatWatch
from dtrain.launch.console import Console
from dtrain.launch.crew import Crew
from dtrain.launch.elastic import Survivals
from dtrain.launch.hang import HANG, HangWatch
from dtrain.launch.judge import Judge
from dtrain.launch.output import Output
from dtrain.launch.plan import LaunchPlan
from dtrain.launch.run_processes import processes_of, signal_guard
from dtrain.launch.scratch import Scratch
from dtrain.layout import RunLayout
from dtrain.processes import DUMP_STACKS, END_SCRIPT, signal_name
from dtrain.status import (
    RankFailure,
    RunStatus,
    read_failure,
    read_process,
    write_record,
)

TIME_LIMIT = 124  # the exit code of timeout(1)
_POLL_S = 0.03
_CHECK_S = 0.1
# How often the folders and outputs of ranks on other hosts are opened anew, which costs a network file system some of its time.
_LOOK_AGAIN_S = 1.0
# How long a silent connection to another host is kept, where --heartbeat-timeout sets no limit.
_NEVER_LOST_S = 3600.0
# After a failure the launcher ends the other ranks by itself, as a rule at once; it says more when it may.
_LAUNCHER_REACTION_S = 0.3
# How long mpirun may take to end once its ranks have, before it is killed too.
_LAUNCHER_END_S = 3.0
# How long a rank on another host may take to be killed, and its ssh client to learn of it.
_CUT_OFF_S = 2.0
# How long one that does not see the run folder may send nothing of what is left, on a machine with much to do.
_LAST_WORDS_S = 15.0
# How long to insist on SIGKILL: a process in uninterruptible sleep (a dead network file system) does not die of it.
_KILL_S = 10.0
# How long a worker whose chief is done may take to end by itself, as an Estimator's does. One that serves never would.
_LINGER_S = 2.0


@dataclass(frozen=True, kw_only=True)
class Limits:
    """``timeout_s``: seconds that the job may take, None for no limit, counted from ``began`` (Unix seconds; None: from this
    attempt's start); ``grace_s``: from being told to end to being killed; ``start_timeout_s``: from a task's start until it has
    to listen on its port."""

    timeout_s: float | None
    began: float | None = None
    grace_s: float
    start_timeout_s: float = 120.0
    hangs: Hangs = field(default_factory=Hangs)


@dataclass(frozen=True)
class Signals:
    """Those that this process was sent, in the order in which they came: one ``to_end`` ends the job as canceled, a second one at
    once; those ``to_pass_on`` are for the ranks."""

    to_end: list[int] = field(default_factory=list)
    to_pass_on: list[int] = field(default_factory=list)


class Supervisor:
    """Runs one attempt of a plan to its end. Made by the submit side's one process; :meth:`run` blocks until nothing is left."""

    def __init__(self, plan: LaunchPlan, run: RunLayout, limits: Limits, console: Console, signals: Signals) -> None:
        self._plan, self._run, self._limits, self._console = plan, run, limits, console
        self._names: dict[int, str] = {}
        """Role and index of every rank; empty words where ranks have none."""
        self._output = Output(plan, run, console, self._host)
        agents = Agents(plan, run, limits.hangs.heartbeat_timeout_s or _NEVER_LOST_S, console.say)
        self._crew = Crew(plan, run, agents, output=self._output.pipe, start_timeout_s=limits.start_timeout_s, say=console.say)
        self._ending = False
        self._work_done = False
        self._hosts: dict[int, str] = {}
        over_ssh = {process.task.rank for process in plan.processes if process.task is not None and process.over_ssh}
        self._on_other_hosts = over_ssh
        self._planned_hosts = {process.task.rank: process.host for process in plan.processes if process.task is not None}
        for host in plan.other_hosts:
            self._on_other_hosts.update(host.ranks)
            self._planned_hosts.update(dict.fromkeys(host.ranks, host.name))
        watched = limits.hangs.hang_timeout_s is not None or limits.hangs.heartbeat_timeout_s is not None
        self._beats = Beats(plan, run, watched=watched)
        self._losses = BeatWatch(plan, run, limits.hangs.heartbeat_timeout_s, self._beats, agents, self._host)
        self._failures: dict[int, RankFailure] = {}
        self._survivals = Survivals(run, console.say) if plan.elastic else None
        self._hang = HangWatch(plan, run, limits.hangs, console.say, self._crew, self._beats)
        self._output.printed = self._hang.printed
        self._hung: str | None = None
        self._signals, self._to_pass_on = signals.to_end, signals.to_pass_on
        self._timed_out = self._canceled = False
        self._started = time.time()
        self._scratch: Scratch | None = None
        self._next_check = self._next_look = 0.0
        self._meet_ranks()

    def run(self) -> RunStatus:
        """Start the plan's processes, wait for the end, and return how it ended; nothing is recorded of that here.

        Raises NotRunnable when a command of the plan cannot be started.
        """
        try:
            self._watch()
        finally:
            self._end_everything()
            self._show(final=True)
            self._close()
        return self._verdict()

    def _watch(self) -> None:
        """Return when the job is over by itself, or when there is a reason to end it."""
        limit = self._limits.timeout_s
        failed_at: float | None = None
        if self._signals:  # they came while the run folder was copied
            self._canceled = True
            return
        self._note(self._crew.step())
        if self._plan.scratch is not None:
            self._scratch = Scratch(self._plan.scratch)
        self._run.settle()
        while self._crew.at_work:
            time.sleep(_POLL_S)
            self._show()
            self._collect()
            now = time.time()
            while self._to_pass_on:
                self._pass_on(self._to_pass_on.pop(0))
            if self._signals:
                self._canceled = failed_at is None  # else what it ends is what a failure has left
                return
            if limit is not None and now - (self._limits.began or self._started) > limit:
                self._timed_out = True
                return
            if self._failures and failed_at is None and not self._plan.elastic:
                failed_at = now
            if failed_at is None and self._beats.due:
                self._beats.read()
                self._hung = self._hang.look()
                if self._hung is not None:
                    return
                self._note(self._losses.look())
            if failed_at is not None and now - failed_at > _LAUNCHER_REACTION_S:
                return
            self._note(self._crew.step())
        self._work_done = not self._fatal()
        deadline = time.monotonic() + _LINGER_S
        while self._work_done and self._crew.workers_left() and time.monotonic() < deadline and not self._signals:
            time.sleep(_POLL_S)
            self._show()

    def _pass_on(self, number: int) -> None:
        if number != DUMP_STACKS:
            self._crew.pass_on(number)
            return
        for rank in self._on_other_hosts:  # `dtrain stacks` asks; to those of this host it has gone itself
            self._crew.tell(rank, "stacks")

    def _note(self, failures: list[RankFailure]) -> None:
        for failure in failures:
            self._failures.setdefault(failure.rank, failure)
            if self._plan.elastic:  # the others go on when it has ended
                with contextlib.suppress(OSError):
                    write_record(self._run.rank(failure.rank).error, failure, durable=False)
                if not signal_guard(self._run, failure.rank, signal.SIGKILL):
                    self._crew.tell(failure.rank, "end")

    def _fatal(self) -> dict[int, RankFailure]:
        """The failures that end the job."""
        return self._failures if self._survivals is None else self._survivals.look(self._failures)

    def _meet_ranks(self) -> None:
        """Get to know the ranks that have been started since; all are known from the start, but of an elastic job."""
        tasks = self._plan.task_names(self._run)
        for rank in self._plan.ranks(self._run)[len(self._names) :]:
            self._names[rank] = tasks[rank] if tasks else ""
            self._output.add(rank, label=self._names[rank].replace(" ", ""))
            if self._plan.ordered:
                self._on_other_hosts.add(rank)

    def _collect(self, *, final: bool = False) -> None:
        """Read the records that ranks left since the last time.

        A task's is the crew's to read, which may start it again; in the end all are read but those of servers, and of
        workers that serve a chief, when the work was done: what they do then no longer counts.
        """
        if not final and time.monotonic() < self._next_check:
            return
        self._next_check = time.monotonic() + _CHECK_S
        self._meet_ranks()
        if final or time.monotonic() >= self._next_look:
            self._look_again()
        tasks = self._plan.tasks
        for rank in self._plan.deciding_ranks(self._run) if self._work_done else self._names:
            if rank in self._failures or (rank in tasks and not final):
                continue
            if (failure := read_failure(self._run, rank)) is not None:
                self._failures[rank] = failure
        self._fatal()

    def _look_again(self) -> None:
        """See what ranks on other hosts have written since."""
        self._next_look = time.monotonic() + _LOOK_AGAIN_S
        for rank in self._on_other_hosts & self._names.keys():
            self._run.rank(rank).look_again()
            self._output.look_again(rank)

    def _show(self, *, final: bool = False) -> None:
        self._crew.agents.heard()
        for failure in self._output.show(final=final):
            self._failures.setdefault(failure.rank, failure)
        # Not those about a rank's failure: they would bury what the rank itself said.
        if not self._ending and (self._plan.elastic or not self._failures):
            self._output.show_launcher(final=final)

    def _host(self, rank: int) -> str:
        if rank not in self._hosts:
            record = read_process(self._run, rank)
            if record is None:
                return self._planned_hosts.get(rank, socket.gethostname())
            self._hosts[rank] = record.host
        return self._hosts[rank]

    def _end_everything(self) -> None:
        """Leave no process of this job: scripts first, then the launcher, which would not leave them their grace time."""
        if self._any_alive():
            if self._signals:
                within = f"within {self._limits.grace_s:g} s; a second signal kills them at once"
                self._console.say(f"dtrain: {signal_name(self._signals[0])}: the ranks are told to end, {within}")
            self._ending = True
            if not self._tell_scripts_to_end():
                self._crew.tell_all_to_end()
            self._wait(self._limits.grace_s, self._scripts_ended)
            self._crew.tell_all_to_end()
            self._wait(min(self._limits.grace_s, _LAUNCHER_END_S), lambda: not self._any_alive())
        self._cut_off()
        # Nobody whose record could still come is alive after this: what is read below is final.
        deadline = time.monotonic() + _KILL_S
        while (leftovers := processes_of(self._run.root)) and time.monotonic() < deadline:
            for left in leftovers:
                with contextlib.suppress(psutil.Error):
                    left.kill()
            psutil.wait_procs(leftovers, timeout=1)
        if leftovers:
            pids = ", ".join(str(left.pid) for left in leftovers)
            self._console.say(f"dtrain: cannot end process {pids} of this run", bad=True)
        for process in self._crew.processes:
            process.kill()
            process.wait()
        self._collect(final=True)

    def _cut_off(self) -> None:
        """End what is left on other hosts, and take over what is still to come from there."""
        self._crew.cut_off()
        patience_s = _LAST_WORDS_S if any(host.copied for host in self._plan.other_hosts) else _CUT_OFF_S
        came = -1
        while self._crew.remote_alive() and came < (came := sum(self._crew.agents.heard().values())):
            self._wait(patience_s, lambda: not self._crew.remote_alive())
        while came < (came := sum(self._crew.agents.heard().values())):
            pass

    def _any_alive(self) -> bool:
        return any(process.poll() is None for process in self._crew.processes)

    def _wait(self, seconds: float, until: Callable[[], bool]) -> None:
        """Show what comes until the condition holds or the time is over, or the user says for the second time to end."""
        heard = len(self._signals)
        deadline = time.monotonic() + seconds
        while not until() and time.monotonic() < deadline and len(self._signals) == heard:
            time.sleep(_POLL_S)
            self._show()
            self._collect()

    def _tell_scripts_to_end(self) -> bool:
        """True when every rank that has not ended was told by its guard; not those that have not begun."""
        told = True
        for rank in self._names:
            begun = self._run.rank(rank).process.is_file()
            if begun and not self._has_ended(rank) and self._crew.tell(rank, "end"):
                continue
            reached = signal_guard(self._run, rank, END_SCRIPT) or self._has_ended(rank)
            told = told and reached
        return told

    def _has_ended(self, rank: int) -> bool:
        files = self._run.rank(rank)
        return rank in self._failures or self._crew.has_left(rank) or files.done.is_file() or files.error.is_file()

    def _scripts_ended(self) -> bool:
        begun = (rank for rank in self._names if self._run.rank(rank).process.is_file())
        return not self._any_alive() or all(self._has_ended(rank) for rank in begun)

    def _close(self) -> None:
        self._output.close()
        self._crew.release()
        if self._scratch is not None:
            self._scratch.remove()

    def _verdict(self) -> RunStatus:
        failure = None
        if self._canceled:
            state, code, cause = "canceled", 128 + self._signals[0], f"canceled by {signal_name(self._signals[0])}"
        elif self._timed_out:
            state, code, cause = "failed", TIME_LIMIT, f"time limit of {self._limits.timeout_s:g} s reached"
        elif self._hung is not None:
            state, code, cause = "failed", HANG, self._hung
        else:
            judge = Judge(self._plan, self._run, self._output, self._names, self._host)
            code, cause, failure = judge.outcome(self._fatal(), self._failures, self._on_other_hosts, self._crew.exit_code())
            state = "failed" if cause else "completed"
        return RunStatus(
            state=state,  # type: ignore[arg-type]
            size=len(self._names),
            started=self._started,
            tasks=self._plan.task_names(self._run),
            elastic=self._plan.elastic,
            ended=time.time(),
            exit_code=code,
            cause=cause,
            failure=failure,
            restarts=self._crew.restarts,
        )
