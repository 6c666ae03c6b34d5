"""The processes of one plan: started stage by stage, watched until they listen, and started again where that is allowed."""

from __future__ import annotations

import collections
import contextlib
import functools
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping

import psutil

from dtrain import env
from dtrain.errors import NotRunnable
from dtrain.hosts import Host
from dtrain.launch import ssh
from dtrain.launch.agents import Agents
from dtrain.launch.plan import LaunchPlan, PlannedProcess, PlannedTask
from dtrain.launch.ports import PortProbe
from dtrain.launch.ssh import Connection
from dtrain.layout import RunLayout
from dtrain.processes import DUMP_STACKS, ProcessRecord, answers_stacks, begin_group, signal_name
from dtrain.status import ORPHANED, Kind, RankFailure, failure_from_line, read_failure, read_process, read_status

# How long a killed task may take to die and let its port go: a big process is a while in dying.
_PORT_FREE_S = 20.0


class Member:
    """One planned process as it goes."""

    def __init__(self, planned: PlannedProcess) -> None:
        self.planned = planned
        self.process: subprocess.Popen[bytes] | None = None
        self.connection: Connection | None = None
        """To a process on another host; ``process`` is its ssh client then."""
        address = planned.task.address if planned.task is not None else None
        self.port = PortProbe(address) if address is not None else None
        self.listens = self.port is None
        self.ended = False
        """Ended for good, and how has been looked at."""
        self.restarts = 0
        self.killed: ProcessRecord | None = None
        """The script that is to be replaced, which may not be gone yet."""
        self.port_free_by = 0.0
        """Until then one that is to be started waits where its port is taken; of time.monotonic, as ``started``."""
        self.seen_alive = 0.0
        self.started = 0.0

    @property
    def stage(self) -> int:
        return self.planned.task.stage if self.planned.task else 0

    @property
    def decides(self) -> bool:
        """True when the job goes on while this process does."""
        return self.planned.task is None or self.planned.task.ends_job

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def beginning(self) -> bool:
        """True while a process on another host has been asked for, and is not there yet."""
        return self.connection is not None and not self.connection.has_begun and self.alive


class Crew:
    """All processes of one plan. Used by the supervisor, which calls :meth:`step` again and again until the job is over."""

    def __init__(
        self, plan: LaunchPlan, run: RunLayout, agents: Agents, *, output: int, start_timeout_s: float, say: Callable[[str], None]
    ) -> None:
        """``agents`` are on the plan's other hosts; ``output`` is the descriptor that all processes write to; ``say`` shows words
        of dtrain's own."""
        self.agents = agents
        self._run, self._output, self._start_timeout_s, self._say = run, output, start_timeout_s, say
        self._secrets = env.secret_variables(plan.secrets)
        self._members = [Member(planned) for planned in plan.processes]
        self._of_rank = {member.planned.task.rank: member for member in self._members if member.planned.task is not None}
        self._failed = False
        """Nothing is started any more."""

    @property
    def processes(self) -> list[subprocess.Popen[bytes]]:
        """Those that have been started."""
        return [member.process for member in self._members if member.process is not None]

    @property
    def at_work(self) -> bool:
        """True until every process that decides when the job is over has ended for good."""
        return any(member.decides and not member.ended for member in self._members)

    @property
    def restarts(self) -> int:
        return sum(member.restarts for member in self._members)

    def workers_left(self) -> bool:
        """True while a worker that does not decide is still there: it may be about to end by itself."""
        return any(
            member.alive
            for member in self._members
            if not member.decides and member.planned.task is not None and member.planned.task.task.role == "worker"
        )

    def exit_code(self) -> int:
        """Of the first deciding process that ended with another than 0."""
        codes = (member.process.returncode for member in self._members if member.decides and member.process is not None)
        return next((code for code in codes if code), 0)

    def tell(self, rank: int, word: str) -> bool:
        """Say a word (see dtrain._control) to the guard of a rank on another host; False for any other rank."""
        member = self._elsewhere(rank)
        if member is not None and member.connection is not None:
            member.connection.tell(word)
            return True
        return self.agents.tell(rank, word) or order(self._run, rank, word)

    def pause(self, seconds: float) -> None:
        """Wait, and take over meanwhile what comes from hosts that do not see the run folder."""
        time.sleep(seconds)
        self.agents.heard()

    def pass_on(self, number: int) -> None:
        """Send a signal to what was started here; mpirun and srun pass SIGUSR1 and SIGUSR2 on to their ranks."""
        for member in self._members:
            if member.process is not None and member.connection is None:
                member.process.send_signal(number)

    def has_left(self, rank: int) -> bool:
        """True when there is no connection any more to a rank on another host."""
        member = self._elsewhere(rank)
        if member is None:
            return self.agents.has_left(rank)
        return not member.alive or self.agents.is_gone(rank)  # what an agent says may be about the one before, that was killed

    def _elsewhere(self, rank: int) -> Member | None:
        """The task of that rank, where it was started over a connection to another host."""
        member = self._of_rank.get(rank)
        return member if member is not None and member.connection is not None else None

    def tell_all_to_end(self) -> None:
        """Tell what was started to end, with its ranks."""
        for member in self._members:
            if member.process is None or not member.alive:
                continue
            if member.connection is not None:
                member.connection.tell("leave")
            else:
                os.killpg(member.process.pid, signal.SIGTERM)

    def cut_off(self) -> None:
        """End what is left on other hosts: no rank there outlives its connection."""
        for member in self._members:
            if member.connection is not None:
                member.connection.close()
        self.agents.close()

    def remote_alive(self) -> bool:
        """True while a connection to another host is open."""
        return self.agents.alive() or any(member.alive for member in self._members if member.connection is not None)

    def release(self) -> None:
        """When all have ended: give their descriptors back."""
        for member in self._members:
            if member.connection is not None:
                member.connection.release()
            if member.port is not None:
                member.port.close()
        self.agents.release()

    def step(self) -> list[RankFailure]:
        """Look at every process, start what may start now, and return the failures that end the job. Waits for nobody.

        Raises NotRunnable when a command cannot be started.
        """
        failures = [failure for member in self._members if (failure := self._look_at(member)) is not None]
        failures += self.agents.look()
        self._failed = self._failed or bool(failures)
        if self._failed:
            return failures
        waiting = [member for member in self._members if member.process is None]
        stage = min((member.stage for member in waiting), default=0)
        if not all(member.listens for member in self._members if member.stage < stage):
            return failures
        beginning = collections.Counter(member.planned.host for member in self._members if member.beginning)
        for member in (each for each in waiting if each.stage == stage):
            if beginning[member.planned.host] < ssh.MOST_BEGINNING:
                if (failure := self._start_when_free(member)) is not None:
                    failures.append(failure)
                beginning[member.planned.host] += member.beginning
        return failures

    def _look_at(self, member: Member) -> RankFailure | None:
        process, task = member.process, member.planned.task
        if process is None or member.ended:
            return None
        code = process.poll()
        if task is None:
            member.ended = code is not None  # its ranks leave records
            return None
        if member.connection is not None:
            member.connection.attend()
            member.connection.hear()
        if code is None:
            member.seen_alive = time.time()
            return None if member.listens else self._probe(member, task)
        is_lost = member.connection is not None and member.connection.broke()
        if not is_lost and not self.agents.has_all(task.rank):
            return None
        failure = self._failure_of(member, code) if code != 0 else self._left_early(member, task)
        if failure is not None and failure.kind == "signal" and member.restarts < task.max_restarts and not self._failed:
            self._let_start_again(member, task, failure)
            return None
        member.ended = member.listens = True
        return failure

    def _left_early(self, member: Member, task: PlannedTask) -> RankFailure | None:
        """The failure of a task that ended with 0 and never listened: the others would wait for it for ever.

        A server that did listen may end by itself: some TF1 scripts make it wait for the workers' word.
        """
        if member.decides or member.listens:
            return None
        how = "does its script call dtrain.tensorflow.serve_if_server(), or make a server?"
        return _failure(member.planned, f"ended with 0 before it listened on {_address(task)}; {how}")

    def _failure_of(self, member: Member, code: int) -> RankFailure:
        """How a task failed: as its guard recorded it, else (the guard was killed as well) by the exit code."""
        planned, task = member.planned, member.planned.task
        assert task is not None
        if member.connection is not None:
            self._run.rank(task.rank).look_again()
        recorded = read_failure(self._run, task.rank)
        if member.connection is not None and (code < 0 or recorded is None or recorded.message == ORPHANED):
            return self._lost(planned, member.connection, code, member.seen_alive)
        if recorded is None:
            how = f"killed by {signal_name(-code)}" if code < 0 else f"exited with code {code}"
            # Before others noticed that it was gone, and failed of that.
            return _failure(
                planned,
                how,
                kind="signal" if code < 0 else "exit",
                exit_code=128 - code if code < 0 else code,
                when=member.seen_alive,
            )
        if recorded.kind == "ended":  # nobody here has told it to
            message = f"{recorded.message}, which dtrain did not send"
            return _failure(planned, message, kind="signal", exit_code=recorded.exit_code, when=recorded.time)
        return recorded

    def _lost(self, planned: PlannedProcess, connection: Connection, code: int, when: float) -> RankFailure:
        """The failure of a task on another host of which its ssh client knows more than the run folder."""
        assert planned.task is not None
        said = connection.said()
        for line in said.splitlines():
            if (told := failure_from_line(line)) is not None:  # of one that cannot write into the run folder
                return told
        begun = self._run.rank(planned.task.rank).process.is_file()
        if connection.broke():
            self.agents.give_up(planned.host)
        kind, exit_code, message = connection.how_it_ended(code, planned.host, begun=begun)
        return _failure(planned, message, kind=kind, exit_code=exit_code, when=when)

    def _probe(self, member: Member, task: PlannedTask) -> RankFailure | None:
        assert member.port is not None
        member.listens = bool(member.port.look())
        if not member.listens and time.monotonic() - member.started > self._start_timeout_s:
            message = f"does not listen on {_address(task)}, {self._start_timeout_s:g} s after its start (--start-timeout)"
            return _failure(member.planned, message)
        return None

    def _start_when_free(self, member: Member) -> RankFailure | None:
        """Start a process, unless its port is taken, or that is not known yet: then a later step does."""
        planned, task = member.planned, member.planned.task
        waits = time.monotonic() < member.port_free_by
        if waits and member.killed is not None and (left := member.killed.find()) is not None:
            with contextlib.suppress(psutil.Error):
                left.kill()  # its guard was killed too
            return None
        taken = member.port is not None and member.port.look()
        if taken is None or (taken and waits):
            return None
        if taken:
            assert task is not None
            return _failure(planned, f"cannot have its port: another process listens on {_address(task)}; start the job again")
        self._start(member)
        return None

    def _start(self, member: Member) -> None:
        planned = member.planned
        supervised = env.supervised_variables(self._run.attempt or 0)
        prepare = functools.partial(begin_group, signal.SIGTERM)  # which comes when this process is killed
        try:
            self.agents.start(prepare)
            if planned.over_ssh:
                member.connection = self._connect(planned, supervised, prepare)
                member.process = member.connection.process
            else:
                member.process = subprocess.Popen(
                    planned.argv,
                    cwd=planned.cwd,
                    env={**env.inherited(), **self._secrets, **planned.environment, **supervised},
                    stdin=subprocess.DEVNULL,
                    stdout=self._output,
                    stderr=self._output,
                    preexec_fn=prepare,
                )
        except OSError as error:
            program = "the ssh client" if planned.over_ssh else planned.argv[0]
            raise NotRunnable(f"{program} cannot be started: {error}") from error
        member.started, member.seen_alive = time.monotonic(), time.time()

    def _connect(self, planned: PlannedProcess, supervised: Mapping[str, str], prepare: Callable[[], None]) -> Connection:
        environment = {**planned.environment, **supervised, **env.control_variables()}
        argv = ssh.command(planned.host, planned.cwd, environment, planned.argv, lost_s=self.agents.lost_s)
        connection = ssh.connect(argv, planned.cwd, {env.RUN_DIR: str(self._run.root)}, prepare)
        others = {name: value for name, value in ssh.sent_variables().items() if name not in environment}
        connection.introduce({**others, **self._secrets})
        return connection

    def _let_start_again(self, member: Member, task: PlannedTask, failure: RankFailure) -> None:
        """Have later steps start a killed task anew, once its port is free."""
        member.restarts += 1
        files = self._run.rank(task.rank)
        if files.error.exists():
            os.replace(files.error, files.earlier_error(member.restarts))
        self._say(
            f"dtrain: {task.task} {_was(failure)}; it is started again on {_address(task)} "
            f"({member.restarts} of {task.max_restarts} restarts)"
        )
        member.killed = read_process(self._run, task.rank)
        for record in (files.process, files.heartbeat):  # by these is seen whether the next one began, and lives
            record.unlink(missing_ok=True)
        if member.connection is not None:
            member.connection.release()
        member.process = member.connection = None
        member.listens, member.port_free_by = member.port is None, time.monotonic() + _PORT_FREE_S


def _was(failure: RankFailure) -> str:
    return failure.message if failure.message.startswith("vanished") else f"was {failure.message}"


def order(run: RunLayout, rank: int, word: str) -> bool:
    """Say a word (see dtrain._control) to a rank on another host by a file; False for one that looks for none there, or of this
    host, or that has not begun."""
    record = read_process(run, rank)
    if record is None or not record.ordered or record.host == socket.gethostname():
        return False
    with contextlib.suppress(OSError), open(run.rank(rank).orders, "ab") as file:
        file.write(f"{word}\n".encode())
        return True
    return False


def ask_elsewhere(run: RunLayout) -> Callable[[int, str], bool]:
    """What says ``stacks`` to ranks on other hosts for who does not supervise the run: by a file, or by its supervisor.

    That is asked once, and tells them all. It returns False where neither can be: the supervisor is on another host, too.
    """
    asked: list[bool] = []

    def tell(rank: int, word: str) -> bool:
        if order(run, rank, word):
            return True
        if not asked:
            record = read_status(run).supervisor
            process = record.find() if record is not None else None
            asked.append(process is not None and answers_stacks(process.pid))
            if process is not None and asked[0]:
                process.send_signal(DUMP_STACKS)
        return asked[0]

    return tell


def _failure(
    planned: PlannedProcess, message: str, *, kind: Kind = "exit", exit_code: int = 1, when: float | None = None
) -> RankFailure:
    assert planned.task is not None
    return RankFailure(
        rank=planned.task.rank,
        task=str(planned.task.task),
        host=planned.host,
        time=time.time() if when is None else when,
        exit_code=exit_code,
        kind=kind,
        message=message,
    )


def _address(task: PlannedTask) -> str:
    return Host(task.address[0]).address(task.address[1]) if task.address is not None else "no port"
