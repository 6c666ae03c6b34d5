"""What is recorded about a run's processes and its outcome: written by ranks and supervisor, read by everybody.

``ranks/N/process.json`` when a rank starts, ``done.json`` when it ended well, ``error.json`` when it did not;
``status.json`` for the run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import orjson

from dtrain.errors import DtrainError, WorkspaceError
from dtrain.files import read_json, write_json
from dtrain.layout import RunLayout
from dtrain.processes import ProcessRecord

Kind = Literal["exception", "exit", "signal", "ended", "consequence"]
State = Literal["queued", "running", "completed", "failed", "canceled"]
T = TypeVar("T")

# A line with this beginning on a rank's own stderr carries its error record when its files cannot be written (disk full).
ERROR_LINE = "dtrain-rank-error "

LOST_PEER = {"openmpi": 14, "slurm": 14}
"""The exit code of ranks that Open MPI ends because they lost their connection to another (MPI_ERR_UNKNOWN), by vocabulary."""

ORPHANED = "ended because what launched it was gone"
"""What a rank's guard says of a rank whose mpirun, or mpirun's daemon on that host, has died."""

VANISHED = "vanished without a record: it was killed together with the process that watched it"
"""What is said of a rank that began and has no record of its end."""

_UNRECORDED = "its supervisor (dtrain run) was killed or its host restarted, or a full disk kept its end from being recorded"
_MOST_LISTED = 8
# What Horovod raises in the ranks that go on when one has left, or died.
_SHUT_DOWN = "Horovod has been shut down"
_KILLED = (128 + signal.SIGKILL, 128 + signal.SIGTERM)  # what comes from outside; SIGABRT may follow from another's failure
_KILL_NOTICED_S = 1.0
# For so long after it a rank that left by no end of its script may be why others were killed: MPI does that at once, but what it
# killed with its guard is seen when all is over.
_KILLED_WITHIN_S = 30.0
_MESSAGE_LENGTH = 1_000
_TRACEBACK_LENGTH = 50_000


@dataclass(frozen=True, kw_only=True)
class RankProcess(ProcessRecord):
    """The process of a rank's script. ``guard`` is the one that waits for its end; None where nobody launched the rank.
    ``ordered``: it looks for orders in its folder, for there is no other way to tell it."""

    guard: ProcessRecord | None = None
    ordered: bool = False


@dataclass(frozen=True, kw_only=True)
class RankFailure:
    """How one rank failed.

    ``kind``: ``exception`` (uncaught), ``exit`` (a code other than 0), ``signal`` (killed by one that dtrain did not send),
    ``ended`` (by the launcher or dtrain, because of something else), ``consequence`` (of what another rank raised as well).
    ``task``: role and index where ranks have roles, else empty.
    """

    rank: int
    host: str
    time: float
    exit_code: int
    kind: Kind
    message: str
    traceback: str = ""
    task: str = ""

    @staticmethod
    def now(rank: int, kind: Kind, exit_code: int, message: str, traceback: str = "", *, task: str = "") -> RankFailure:
        """The failure of a rank of this host at this moment, of texts as a file can hold them."""
        first_line = message.strip().partition("\n")[0]
        return RankFailure(
            rank=rank,
            task=task,
            host=os.uname().nodename,
            time=time.time(),
            exit_code=exit_code,
            kind=kind,
            message=_encodable(first_line)[:_MESSAGE_LENGTH],
            traceback=_encodable(traceback)[-_TRACEBACK_LENGTH:],
        )

    @property
    def who(self) -> str:
        """The rank, and its host."""
        return f"{self.task or f'rank {self.rank}'} on {self.host}"

    @property
    def of_shut_down(self) -> bool:
        """Whether it is Horovod's word that another rank has left, or died."""
        # Of Keras's fit the exception's first line says only "Graph execution error".
        return self.kind == "consequence" and (_SHUT_DOWN in self.message or _SHUT_DOWN in self.traceback)

    def describe(self) -> str:
        return f"{self.who}: {self.message}"

    def then(self, what: str) -> RankFailure:
        """This failure, and what followed from it."""
        return dataclasses.replace(self, message=f"{self.message}; then {what}")


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """The outcome of a run so far; times in Unix seconds; ``cause`` is one sentence, empty when there is nothing to say.

    ``tasks``: role and index of every rank (``worker 0``), by rank; empty where ranks have no roles. ``restarts``: how often a
    killed worker was started again. ``earlier``: the causes of the attempts before this one, after which the whole job was.
    Of an ``elastic`` job ``size`` counts the workers that were started until now, numbered in that order.
    """

    state: State
    size: int
    started: float
    ended: float | None = None
    exit_code: int | None = None
    cause: str = ""
    failure: RankFailure | None = None
    supervisor: ProcessRecord | None = None
    tasks: list[str] = field(default_factory=list)
    restarts: int = 0
    earlier: list[str] = field(default_factory=list)
    elastic: bool = False

    @property
    def is_over(self) -> bool:
        return self.state not in ("queued", "running")

    @property
    def duration_s(self) -> float | None:
        return None if self.ended is None else self.ended - self.started


@dataclass(frozen=True, kw_only=True)
class World:
    """The workers of an elastic job that train together: their numbers, by rank; ``since`` when, in Unix seconds; how many had
    been ``started`` until then."""

    since: float
    workers: list[int]
    started: int


def exception_message(error: BaseException) -> str:
    """``ValueError: bad batch``: an exception in a line."""
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    text = str(error).strip().partition("\n")[0]
    return f"{name}: {text}" if text else name


def exception_kind(error: BaseException, rank: int) -> Kind:
    """Whether an uncaught exception of this rank is its own, or follows from what became of another one."""
    elsewhere = isinstance(error, DtrainError) and error.of_rank not in (None, rank)
    return "consequence" if elsewhere or _SHUT_DOWN in str(error) else "exception"


def _encodable(text: str) -> str:
    # An exception may quote bytes that are no text ("\udc80"), which no file of ours could hold.
    return text.encode(errors="backslashreplace").decode()


def write_record(path: Path, record: Any, *, durable: bool = True) -> None:
    """Write one of this module's records atomically; raises OSError."""
    write_json(path, dataclasses.asdict(record), durable=durable)


def failure_to_line(failure: RankFailure) -> str:
    """One line, short enough to pass a pipe in one piece (PIPE_BUF), also when many ranks write theirs at once."""
    short = dataclasses.replace(failure, message=failure.message[:500], traceback=failure.traceback[-1500:])
    return ERROR_LINE + orjson.dumps(dataclasses.asdict(short)).decode()


def failure_from_line(line: str) -> RankFailure | None:
    """What :func:`failure_to_line` made a line of; None for any other line."""
    if not line.startswith(ERROR_LINE):
        return None
    try:
        return RankFailure(**orjson.loads(line.removeprefix(ERROR_LINE)))
    except (orjson.JSONDecodeError, TypeError):
        return None


def _read_record(path: Path, kind: Callable[..., T]) -> T | None:
    try:
        values = read_json(path)
    except FileNotFoundError:
        return None
    with _of_this_version(path):
        return kind(**values)


@contextlib.contextmanager
def _of_this_version(path: Path) -> Iterator[None]:
    try:
        yield
    except TypeError as error:
        raise WorkspaceError(f"{path} does not hold what this dtrain writes ({error}); it may be of another version") from error


def read_failure(run: RunLayout, rank: int) -> RankFailure | None:
    return _read_record(run.rank(rank).error, RankFailure)


def read_process(run: RunLayout, rank: int) -> RankProcess | None:
    return _read_record(run.rank(rank).process, _rank_process)


def _rank_process(guard: dict[str, Any] | None = None, **values: Any) -> RankProcess:
    return RankProcess(guard=None if guard is None else ProcessRecord(**guard), **values)


def read_world(run: RunLayout) -> World:
    """The workers that train together now, or did last; none where they have not yet begun to, or the job is not elastic."""
    return _read_record(run.world, World) or World(since=0.0, workers=[], started=0)


def worker_names(count: int) -> list[str]:
    """What messages call the workers of an elastic job, by their numbers."""
    return [f"worker {number}" for number in range(count)]


def listed(names: Iterable[object]) -> str:
    """Names in a sentence: the first ones, and how many more there are."""
    words = [str(name) for name in names]
    shown = ", ".join(words[:_MOST_LISTED])
    return shown if len(words) <= _MOST_LISTED else f"{shown} and {len(words) - _MOST_LISTED} more"


def first_failure(failures: list[RankFailure]) -> RankFailure | None:
    """The earliest failure that was not the consequence of another.

    Tasks of a cluster lose the connections of one that is gone before its guard has noted its end, and fail of that within a
    millisecond: who was killed, or left with a code, goes before who raised within :data:`_KILL_NOTICED_S`. (Of ranks under
    mpirun that can't be said: mpirun kills the others itself.)
    """
    own = [failure for failure in failures if failure.kind not in ("ended", "consequence")]
    own = own or [failure for failure in failures if failure.kind == "consequence"]
    own.sort(key=lambda failure: (failure.time, failure.rank))
    first = own[0] if own else None
    gone = [each for each in own if each.task and (each.kind == "exit" or (each.kind == "signal" and each.exit_code in _KILLED))]
    return next((each for each in gone if first is not None and each.time - first.time < _KILL_NOTICED_S), first)


def blame_who_left(run: RunLayout, failure: RankFailure, size: int) -> RankFailure:
    """The failure; or that of a rank which had left with exit code 0 before, where it is only what followed from that.

    Who vanished may have been killed by MPI for that; not where there is a record of it, which is made of ranks that MPI did not
    start. Tasks of a cluster, and workers of an elastic job, may leave when they like: none is blamed.
    """
    by_end: Literal["none", "process", "script"] = "none"
    if failure.task:
        return failure
    if failure.kind == "consequence" and failure.exit_code in LOST_PEER.values():
        how, by_end = "lost its connection to another rank", "process"
    elif failure.of_shut_down:
        how, by_end = _SHUT_DOWN, "script"
    elif failure.message.startswith(VANISHED) and read_failure(run, failure.rank) is None:
        how = failure.message
    else:
        return failure
    left = who_left(run, size, failure.time, by_end=by_end)
    return failure if left is None else left.then(f"{failure.who}: {how}")


def who_left(
    run: RunLayout, size: int, before: float, *, by_end: Literal["none", "process", "script"] = "none"
) -> RankFailure | None:
    """The first rank that had left with exit code 0 before that time (Unix seconds), as a failure; None where none had.

    One counts that left by no end of its script (``os._exit(0)``), for which MPI ends the others. It does so before that one's
    guard has noted the end: so up to :data:`_KILL_NOTICED_S` later counts as before. Who left longer before than
    :data:`_KILLED_WITHIN_S` is not why. ``by_end``: also one whose ``process`` had ended; or whose ``script`` had, which ends
    Horovod in all ranks while MPI_Finalize still keeps the process.
    """
    until = {"none": -math.inf, "process": before, "script": before + _KILL_NOTICED_S}[by_end]
    left = []
    for rank in range(size):
        when, early = _left_with_0(run, rank, script=by_end == "script")
        if when is not None and (when <= until or (early and -_KILLED_WITHIN_S < when - before < _KILL_NOTICED_S)):
            left.append((when, rank))
    if not left:
        return None
    when, rank = min(left)
    process = read_process(run, rank)
    return RankFailure(
        rank=rank,
        host=os.uname().nodename if process is None else process.host,
        time=when,
        exit_code=1,  # its own says that all is well
        kind="exit",
        message="left with exit code 0 while others still needed it",
    )


def _left_with_0(run: RunLayout, rank: int, *, script: bool) -> tuple[float | None, bool]:
    """When the rank's process ended with 0, or with ``script`` when its script was over; None where it did not. And whether it
    left by no end of its script."""
    files = run.rank(rank)
    if script:
        failure = read_failure(run, rank)
        if failure is not None and failure.kind != "ended":
            return None, False
        # Without a beat yet, or one that a full disk kept from being written, the process's end has to do.
        if (over := script_over(run, rank)) is not None:
            return over, False
    if not files.done.is_file():
        return None, False
    done = read_json(files.done)
    return done.get("time"), bool(done.get("early"))


def script_over(run: RunLayout, rank: int) -> float | None:
    """When (Unix seconds) the rank's script was over, by its last beat; None where it was not, or nothing is known."""
    with contextlib.suppress(FileNotFoundError, orjson.JSONDecodeError):
        over: float | None = orjson.loads(run.rank(rank).heartbeat.read_bytes()).get("over")
        return over
    return None


def read_status(run: RunLayout) -> RunStatus:
    """The run's status, judged from the ranks' records where nobody supervises it, or no longer does.

    Raises WorkspaceError when the folder holds no run or a damaged one.
    """
    try:
        values = read_json(run.status)
    except FileNotFoundError:
        raise WorkspaceError(f"{run.root} holds no started run: there is no {run.status.name}") from None
    with _of_this_version(run.status):
        for name, kind in (("failure", RankFailure), ("supervisor", ProcessRecord)):
            if values.get(name) is not None:
                values[name] = kind(**values[name])
        status = RunStatus(**values)
    if status.state != "running":
        return status
    if status.elastic:
        started = run.newest_attempt().count_ranks()
        status = dataclasses.replace(status, size=started, tasks=worker_names(started))
    if status.supervisor is not None:
        if not status.supervisor.vanished():
            return status
        return dataclasses.replace(status, state="failed", exit_code=1, cause=_UNRECORDED)
    return _judge(run, status)


def _judge(run: RunLayout, status: RunStatus) -> RunStatus:
    """The status of a run that mpirun or a person started, from what its ranks left."""
    ranks = range(status.size)
    failure = first_failure([found for rank in ranks if (found := read_failure(run, rank)) is not None])
    if failure is not None:
        failure = blame_who_left(run, failure, status.size)
        state: State = "canceled" if failure.exit_code == 128 + signal.SIGINT else "failed"
        return dataclasses.replace(
            status, state=state, exit_code=failure.exit_code, ended=failure.time, cause=failure.describe(), failure=failure
        )
    done = {rank: run.rank(rank).done for rank in ranks if run.rank(rank).done.is_file()}
    if len(done) == status.size:
        return dataclasses.replace(
            status, state="completed", exit_code=0, ended=max(path.stat().st_mtime for path in done.values())
        )
    for rank in ranks:
        process = read_process(run, rank)
        if rank not in done and process is not None and process.vanished():
            cause = f"rank {rank} on {process.host} vanished without a word: it was killed, or its host restarted"
            return dataclasses.replace(status, state="failed", exit_code=1, cause=cause)
    return status
