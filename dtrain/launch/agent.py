"""One process on every other host where mpirun starts ranks: it ends them when nobody else is left who would.

``python -m dtrain.launch.agent RUN ATTEMPT SCRATCH COPIED RANK...`` is started there by ssh. Its standard input is told what to
do with a rank (``end 3``, ``stacks 3``); when that ends, for whatever reason, it leaves no process of the run on its host. Once a
second it says that it is there, and which ranks are no longer (``gone 3``). Where the run folder there is a copy, which COPIED
says, it also sends what its ranks write (launch/mirror.py), and when asked (``all 3``) says that it has sent all (``all 3``).
launch/agents.py is the supervisor's side.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import sys
import time
from pathlib import Path

import psutil

from dtrain.launch.mirror import Outgoing
from dtrain.launch.run_processes import processes_of, signal_guard
from dtrain.layout import RunLayout
from dtrain.processes import DUMP_STACKS, END_SCRIPT, LAUNCHER_IS_GONE, answers_stacks
from dtrain.status import read_process

GONE = b"gone "
ALL = b"all "
_BEAT_S = 1.0
_LOOK_S = 0.1
# How long guards may take to record why their scripts ended.
_RECORD_S = 1.0
# How long to look for ranks that may yet begin, when not all of them have.
_BEGIN_S = 3.0


def main() -> None:
    root, attempt, scratch, copied, *ranks = sys.argv[1:]
    run = RunLayout(Path(root), int(attempt))
    own = [int(rank) for rank in ranks]
    outgoing = Outgoing(run, own if copied else (), 1)
    _listen(run, own, outgoing)
    _leave_nothing(run, own)
    outgoing.finish()
    if scratch:
        shutil.rmtree(scratch, ignore_errors=True)


def _listen(run: RunLayout, ranks: list[int], outgoing: Outgoing) -> None:
    """Do what is said until nobody is there to say anything."""
    os.set_blocking(1, False)
    pending, next_beat, here = b"", 0.0, set(ranks)
    while True:
        if time.monotonic() >= next_beat:
            next_beat = time.monotonic() + _BEAT_S
            gone = {rank for rank in here if (record := read_process(run, rank)) is not None and record.find() is None}
            here -= gone
            # Over a connection that broke unnoticed, it is by this that this host's sshd finds out, and ends.
            outgoing.say(b"".join(b"%s%d\n" % (GONE, rank) for rank in gone) or b"\n")
        with contextlib.suppress(OSError):
            outgoing.write()
        wait_s = min(next_beat, outgoing.next_look) - time.monotonic()
        ready, _, _ = select.select([0], [1] if outgoing.is_waiting else [], [], max(0.0, wait_s))
        if not ready:
            continue
        data = os.read(0, 65536)
        if not data:
            return
        *lines, pending = (pending + data).split(b"\n")
        for line in lines:
            word, _, rank = line.decode().partition(" ")
            if word == "all":
                outgoing.confirm(b"%s%d\n" % (ALL, int(rank)))
            else:
                _do(word, run, int(rank))


def _do(word: str, run: RunLayout, rank: int) -> None:
    if word == "end":
        signal_guard(run, rank, END_SCRIPT)
    elif word == "stacks":
        record = read_process(run, rank)
        if record is not None and (script := record.find()) is not None and answers_stacks(record.pid):
            script.send_signal(DUMP_STACKS)


def _leave_nothing(run: RunLayout, ranks: list[int]) -> None:
    """End what of the run is on this host: guards first, which then record why their scripts were ended.

    Not what a later attempt has started: this one may learn late that its connection is gone.
    """
    told = [signal_guard(run, rank, LAUNCHER_IS_GONE) for rank in ranks]
    deadline = time.monotonic() + (_RECORD_S if any(told) else 0.0)
    while time.monotonic() < deadline and processes_of(run.root, run.attempt):
        time.sleep(_LOOK_S)
    begun = all(run.rank(rank).process.is_file() for rank in ranks)
    deadline = time.monotonic() + (0.0 if begun else _BEGIN_S)
    while (left := processes_of(run.root, run.attempt)) or time.monotonic() < deadline:
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        time.sleep(_LOOK_S)


if __name__ == "__main__":
    main()
