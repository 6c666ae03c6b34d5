"""What a rank is doing, in memory that it shares with the process that watches it.

A rank that does nothing any more cannot say so itself. So what counts as progress (a metric, a collective, a checkpoint) is noted
here, and the rank's guard, which was forked from the same process, reads it: also while native code holds the interpreter.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_COUNT = struct.Struct("<Q")
_COLLECTIVE = struct.Struct(
    "<d32s"
)  # when it was entered (time.monotonic, the same clock in all of a host's processes), its name


SCRIPT_OVER = "MPI_Finalize (script is over)"
"""In place of a collective's name."""


@dataclass(frozen=True, kw_only=True)
class Doing:
    """``count`` of what has been done so far; ``collective`` that the rank is in, ``since_s`` seconds, or empty."""

    count: int
    collective: str
    since_s: float


class Progress:
    """One rank's; :data:`PROGRESS` is this process's. Marking takes less than a microsecond, and blocks for nothing."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 64)  # anonymous: shared with the processes that are forked from here, and with no other
        self._count = 0

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
        _COLLECTIVE.pack_into(self._memory, _COUNT.size, time.monotonic(), name.encode()[:32])
        self.mark()
        try:
            yield
        finally:
            _COLLECTIVE.pack_into(self._memory, _COUNT.size, 0.0, b"")
            self.mark()

    def end(self) -> None:
        """The script is over, and what waits now is MPI, for the other ranks' scripts. No progress."""
        _COLLECTIVE.pack_into(self._memory, _COUNT.size, time.monotonic(), SCRIPT_OVER.encode())

    def read(self) -> Doing:
        """What the other process, that shares this memory, does now."""
        (count,) = _COUNT.unpack_from(self._memory, 0)
        entered, name = _COLLECTIVE.unpack_from(self._memory, _COUNT.size)
        collective = name.rstrip(b"\0").decode(errors="replace")
        return Doing(count=count, collective=collective, since_s=time.monotonic() - entered if collective else 0.0)

    def write(self, path: Path) -> None:
        """Write that, as a beat, into a file that is made or overwritten. Raises OSError."""
        doing = self.read()
        values = {"time": time.time(), "count": doing.count, "collective": doing.collective, "since_s": round(doing.since_s, 1)}
        # Opened anew each time: it is when a file is closed that a network file system shows other hosts what was written.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            # In one piece and of one length: who reads it sees the old one or the new one.
            os.pwrite(descriptor, f"{json.dumps(values):<254}\n".encode(), 0)
        finally:
            os.close(descriptor)


PROGRESS = Progress()
