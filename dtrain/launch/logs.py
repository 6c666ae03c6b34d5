"""What the ranks of a run wrote, afterwards or while it goes on."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping

from dtrain.errors import UsageError, WorkspaceError
from dtrain.launch.console import Console, LineReader
from dtrain.launch.queue import status_reader
from dtrain.layout import RunLayout
from dtrain.status import read_process, read_status

_POLL_S = 0.1
_LOOK_AGAIN_S = 1.0


def print_logs(
    run: RunLayout,
    *,
    rank: int | None,
    attempt: int | None,
    follow: bool,
    is_over: Callable[[], bool] | None = None,
    console: Console | None = None,
) -> None:
    """Print the output of one rank, raw, or of all, each line with its host and rank in front.

    ``attempt`` None means the newest. With ``follow`` it blocks until the run has ended, and goes on with the attempts that come;
    ``is_over`` says that it has, where that is not its status's to say; who gives it shows the launcher's words. ``console``
    None: a new one.
    Raises UsageError for a rank or attempt that the run does not have, WorkspaceError when nothing was kept: who starts ranks by
    hand has their output in the terminal.
    """
    console = console or Console()
    newest = run.newest_attempt()
    if attempt is not None and attempt not in range((newest.attempt or 0) + 1):
        raise UsageError(f"--attempt {attempt}: run {run.id} has attempts 0 to {newest.attempt}")
    shown = newest if attempt is None else RunLayout(run.root, attempt)
    ends = is_over or (lambda: read_status(run).is_over)
    while True:
        launcher = LineReader(shown.launcher_log) if rank is None and is_over is None else None
        _print_attempt(shown, rank, ends if follow else None, console, launcher)
        newest = shown.newest_attempt()
        if not follow or newest == shown or attempt is not None:
            return
        shown = RunLayout(run.root, (shown.attempt or 0) + 1)
        console.say(f"dtrain: attempt {shown.attempt}")


def _print_attempt(
    run: RunLayout, rank: int | None, is_over: Callable[[], bool] | None, console: Console, launcher: LineReader | None
) -> None:
    """``is_over`` None: print what is there. Else until it is, or the next attempt has begun."""
    status = read_status(run)
    size = status.size
    if rank is not None and not 0 <= rank < size:
        raise UsageError(f"--rank {rank}: run {run.id} has ranks 0 to {size - 1}")
    ranks = [each for each in range(size) if console.shows(each)] if rank is None else [rank]
    if is_over is None and not any(run.rank(each).output_log.is_file() for each in ranks) and not run.launcher_log.is_file():
        raise WorkspaceError(_why_nothing(run))
    readers = {each: LineReader(run.rank(each).output_log) for each in ranks}
    hosts: dict[int, str] = {}
    next_look = 0.0
    while True:
        ended = is_over is None or is_over() or run.newest_attempt() != run
        if status.elastic and rank is None:  # some may have been started since
            status = read_status(run)
            readers |= {n: LineReader(run.rank(n).output_log) for n in range(len(readers), status.size)}
        if ended or time.monotonic() >= next_look:
            next_look = time.monotonic() + _LOOK_AGAIN_S
            _look_again(run, readers, launcher)
        labels = [task.replace(" ", "") for task in status.tasks]
        for each, reader in readers.items():
            data = reader.read()
            if rank is not None:
                sys.stdout.buffer.write(data)
                sys.stdout.buffer.flush()
            else:
                if lines := reader.lines(data, final=ended):
                    console.rank_lines(_host(run, each, hosts), each, lines, label=labels[each] if labels else "")
        if launcher is not None:
            console.rank_lines("launcher", "", launcher.lines(launcher.read(), final=ended))
        if ended:
            return
        time.sleep(_POLL_S)


def _why_nothing(run: RunLayout) -> str:
    """Why there is no output of a run's ranks. Asks Slurm of one that was submitted to it."""
    status = status_reader([run])(run)
    if status.state == "queued":
        waits = status.cause or "waits in Slurm's queue"
        return f"run {run.id} has no output yet: it {waits}; `dtrain logs -f {run.id}` waits with it"
    if status.supervisor is None and not run.slurm_job.is_file():
        return f"run {run.id} kept no output: it was not started by `dtrain run`, and its output is where it was started"
    if not status.is_over:
        return f"run {run.id} has no output yet: its ranks have not begun; `dtrain logs -f {run.id}` follows it"
    how = "was canceled" if status.state == "canceled" else status.state
    return f"run {run.id} has no output: it {how} before its ranks began{f': {status.cause}' if status.cause else ''}"


def _look_again(run: RunLayout, readers: Mapping[int, LineReader], launcher: LineReader | None) -> None:
    """See what other hosts have written since."""
    for rank, reader in readers.items():
        run.rank(rank).look_again()
        reader.look_again()
    if launcher is not None:
        launcher.look_again()


def _host(run: RunLayout, rank: int, known: dict[int, str]) -> str:
    """The name of a rank's host, which is read once and then ``known``."""
    if rank not in known and (process := read_process(run, rank)) is not None:
        known[rank] = process.host
    return known.get(rank, "?")
