"""What the ranks are doing: their Python stacks, asked for from outside, and the collectives that they are in."""

from __future__ import annotations

import re
import socket
import sysconfig
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import orjson
import psutil

from dtrain.layout import RunLayout
from dtrain.processes import DUMP_STACKS, answers_stacks
from dtrain.progress import SCRIPT_OVER
from dtrain.status import read_process

_ANSWER_S = 2.0
_FRAME = re.compile(r'  File "(.+)", line (\d+) in (.+)')
# Files in angle brackets are no files: Python's own, or what a library has made.
_LIBRARIES = (str(Path(__file__).parents[1]), sysconfig.get_path("stdlib"), "<")
# What Horovod has made of its operations for TensorFlow; within a tf.function they are not seen.
_HOROVOD = re.compile(r'  File "<string>", line \d+ in (horovod_\w+)')


@dataclass(frozen=True, kw_only=True)
class Beat:
    """What a rank's guard said last: how many things were told and calls made, and the collective that the rank is in, or empty
    (see :class:`dtrain.progress.Doing`)."""

    count: int = 0
    calls: int = 0
    collective: str = ""
    since_s: float = 0.0

    @classmethod
    def parse(cls, data: bytes) -> Beat:
        """The beat in a file's bytes; an empty one when there is none yet."""
        try:
            values = orjson.loads(data)
        except orjson.JSONDecodeError:  # between the file's making and its first beat
            return cls()
        return cls(count=values["count"], calls=values["calls"], collective=values["collective"], since_s=values["since_s"])


def read_beat(run: RunLayout, rank: int) -> Beat:
    """The rank's last beat; an empty one when there is none yet."""
    try:
        return Beat.parse(run.rank(rank).heartbeat.read_bytes())
    except FileNotFoundError:
        return Beat()


def collect_stacks(
    run: RunLayout,
    ranks: Iterable[int],
    tell: Callable[[int, str], bool] | None = None,
    pause: Callable[[float], None] = time.sleep,
) -> dict[int, str]:
    """Ask the ranks of this host for the stacks of all their threads and return what each answered, or why it did not.

    ``tell`` says a word to a rank on another host, False where there is no connection to it; who supervises the run has it.
    ``pause`` waits that many seconds, and takes over meanwhile what comes from hosts that do not see the run folder.
    Blocks for :data:`_ANSWER_S` at most. What they answer is also in their ``stack.txt``.
    """
    answers, asked = {}, {}
    for rank in ranks:
        answer, size = _ask(run, rank, tell)
        if answer:
            answers[rank] = answer
        else:
            asked[rank] = size
    deadline = time.monotonic() + _ANSWER_S
    before: dict[int, str] = {}
    while asked and time.monotonic() < deadline:
        pause(0.1)
        for rank, size in list(asked.items()):
            file = run.rank(rank).stack
            text = file.read_bytes()[size:].decode(errors="replace") if file.exists() else ""
            if text and before.get(rank) == text:  # and nothing more came
                answers[rank] = text
                del asked[rank]
            before[rank] = text
    for rank in asked:
        answers[rank] = f"(did not answer within {_ANSWER_S:g} s)\n"
    return dict(sorted(answers.items()))


def _ask(run: RunLayout, rank: int, tell: Callable[[int, str], bool] | None) -> tuple[str, int]:
    """Send the signal; why it cannot be, or the length of what the rank answered before."""
    record = read_process(run, rank)
    if record is None:
        return "(has not begun)\n", 0
    files = run.rank(rank)
    size = files.stack.stat().st_size if files.stack.exists() else 0
    process = record.find()
    if process is None:
        elsewhere = record.host != socket.gethostname() and not (files.done.exists() or files.error.exists())
        if elsewhere and tell is not None and tell(rank, "stacks"):
            return "", size
        return (f"(is on host {record.host}; ask there, or where `dtrain run` is)\n" if elsewhere else "(has ended)\n"), 0
    if not answers_stacks(record.pid):
        if read_beat(run, rank).collective == SCRIPT_OVER:
            return "(its script is over)\n", 0
        why = "its script has not begun, is over, has executed another program, or was not started by `dtrain run`"
        return f"(cannot be asked: {why})\n", 0
    try:
        state = process.status()
        if state in (psutil.STATUS_STOPPED, psutil.STATUS_DISK_SLEEP):
            what = "stopped (by SIGSTOP, or a debugger)" if state == psutil.STATUS_STOPPED else "in uninterruptible sleep"
            return f"(process {record.pid} is {what}, and cannot answer)\n", 0
        process.send_signal(DUMP_STACKS)
    except psutil.Error as error:
        return f"({error})\n", 0
    return "", size


def collective(stacks: str) -> str:
    """The operation of Horovod's that the main thread waits in; empty where it is in none."""
    match = _HOROVOD.search(_main_thread(stacks))
    return match[1] if match is not None else ""


def _main_thread(stacks: str) -> str:
    # faulthandler shows the thread that took the signal last: the main one. Its frames come innermost first.
    return stacks[stacks.rfind("\nCurrent thread") + 1 :]


def place(stacks: str) -> str:
    """Where the main thread is, in a few words: the innermost line that is the user's own, or of a library of theirs."""
    if not stacks.startswith(("Current thread", "Thread")):
        return stacks.strip().strip("()")
    frames = _FRAME.findall(_main_thread(stacks))
    own = next((frame for frame in frames if not frame[0].startswith(_LIBRARIES) and "site-packages" not in frame[0]), None)
    if own is None and not frames:
        return "in no Python code"
    file, line, function = own or frames[0]
    return f"{Path(file).name}:{line} in {function}"
