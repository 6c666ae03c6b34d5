"""What a rank is doing, in memory that it shares with the process that watches it.

A rank that does nothing any more cannot say so itself. So what counts as progress (a metric, a collective, a checkpoint) is noted
here, and the rank's guard, which was forked from the same process, reads it: also while native code holds the interpreter.
"""

from __future__ import annotations

import contextlib
import functools
import json
import mmap
import os
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_COUNT = struct.Struct("<Q")
# When a collective was entered (time.monotonic, the same clock in all of a host's processes), its name, and the number of
# times that one was entered or left.
_COLLECTIVE = struct.Struct("<d32sQ")
_CALLS = struct.Struct("<Q")
_CALLS_AT = _COUNT.size + _COLLECTIVE.size - _CALLS.size
_OVER = struct.Struct("<d")  # Unix seconds, 0 while the script goes on
_OVER_AT = _COUNT.size + _COLLECTIVE.size

FINALIZE = "MPI_Finalize"
SCRIPT_OVER = f"{FINALIZE} (script is over)"
"""In place of a collective's name."""

FINALIZES = (SCRIPT_OVER, "Finalize")
"""What a rank that is done is in, until the others are: the second where the script itself calls it."""


@dataclass(frozen=True, kw_only=True)
class Doing:
    """``count`` of what the script told dtrain so far, ``calls`` of collectives and MPI calls entered and left; ``collective``
    (or call) that the rank is in, ``since_s`` seconds, or empty. ``over``: when (Unix seconds) the script returned, or called
    ``sys.exit`` or ``MPI.Finalize``, from where on it exchanges nothing; None while it goes on."""

    count: int
    calls: int
    collective: str
    since_s: float
    over: float | None


class Progress:
    """One rank's; :data:`PROGRESS` is this process's. Marking takes less than a microsecond, and blocks for nothing."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 64)  # anonymous: shared with the processes that are forked from here, and with no other
        self._count = 0
        self.calls = 0
        """How often a collective, or a call of MPI's, was entered or left."""
        self.waits = False
        """Whether this process is in one."""
        self.write_left = functools.partial(_COLLECTIVE.pack_into, self._memory, _COUNT.size, 0.0, b"")
        """Called with :attr:`calls`: this process is in none. Native code, which no handler of a signal interrupts."""

    def begin(self) -> None:
        """From here on it is the script that does something."""
        self._count = 0
        _COUNT.pack_into(self._memory, 0, 0)

    def mark(self) -> None:
        """Something was done."""
        self._count += 1
        _COUNT.pack_into(self._memory, 0, self._count)

    @contextlib.contextmanager
    def collective(self, name: str) -> Iterator[None]:
        """Waiting for the other ranks, in the collective ``name``; entering and leaving it are progress."""
        try:
            self.waits = False  # an exception of a signal's handler may have kept the last one from being left
            self.enter(name.encode())
            self.mark()
            yield
        finally:
            self.waits = False
            self.calls += 1
            self.write_left(self.calls)
            self.mark()

    def enter(self, name: bytes) -> None:
        """Begin to wait for other ranks, in a collective or a call of MPI's; it tells dtrain nothing, but is progress.

        Within another one it is a part of that: ``name`` is not noted. Who enters leaves, also where this raises.
        """
        self.calls += 1
        if self.waits:
            _CALLS.pack_into(self._memory, _CALLS_AT, self.calls)
            return
        self.waits = True
        _COLLECTIVE.pack_into(self._memory, _COUNT.size, time.monotonic(), name, self.calls)

    def end(self, *, finalizes: bool) -> None:
        """The script is over, or done with MPI; where the process ``finalizes`` now, MPI waits for the other ranks' scripts."""
        if self.read().over is None:
            _OVER.pack_into(self._memory, _OVER_AT, time.time())
        if finalizes:
            self.waits = True
            self.calls += 1
            _COLLECTIVE.pack_into(self._memory, _COUNT.size, time.monotonic(), SCRIPT_OVER.encode(), self.calls)

    def read(self) -> Doing:
        """What the other process, that shares this memory, does now."""
        (count,) = _COUNT.unpack_from(self._memory, 0)
        entered, name, calls = _COLLECTIVE.unpack_from(self._memory, _COUNT.size)
        collective = name.rstrip(b"\0").decode(errors="replace")
        since_s = time.monotonic() - entered if collective else 0.0
        (over,) = _OVER.unpack_from(self._memory, _OVER_AT)
        return Doing(count=count, calls=calls, collective=collective, since_s=since_s, over=over or None)

    def write(self, path: Path) -> None:
        """Write that, as a beat, into a file that is made or overwritten. Raises OSError."""
        doing = self.read()
        values = {
            "time": time.time(),
            "count": doing.count,
            "calls": doing.calls,
            "collective": doing.collective,
            "since_s": round(doing.since_s, 1),
            "over": doing.over,
        }
        # Opened anew each time: it is when a file is closed that a network file system shows other hosts what was written.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            # In one piece and of one length: who reads it sees the old one or the new one.
            os.pwrite(descriptor, f"{json.dumps(values):<254}\n".encode(), 0)
        finally:
            os.close(descriptor)


PROGRESS = Progress()
