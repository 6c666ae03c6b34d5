"""A rank's side of a launcher on another host.

Over ssh its guard's standard input says what to do, and ends when nobody is left: the first line holds the environment that the
script is to have, as JSON, the others are words of :data:`WORDS`. Where another program starts the ranks there (srun, mpirun),
the same words come in a file of the run folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
from pathlib import Path

from dtrain.files import open_anew
from dtrain.processes import DUMP_STACKS, END_SCRIPT, LAUNCHER_IS_GONE, answers_stacks

WORDS = {"end": END_SCRIPT, "leave": signal.SIGTERM}
"""What the guard does at a word is what it does at the signal that it is sent on its own host; ``stacks`` is the script's."""


class Control:
    """Standard input and output of a guard that was started through ssh; the script gets /dev/null for its input.

    Made before anything is read or written.
    """

    def __init__(self) -> None:
        self._lines = os.fdopen(os.dup(0), "rb")
        self._channel = os.dup(1)
        os.set_blocking(self._channel, False)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.close(null)
        self.beat()  # by this the launcher sees that it may connect to the next ones

    def learn_environment(self) -> None:
        """Take over the launcher's variables. Ends the process where the launcher is gone already."""
        line = self._lines.readline()
        if not line.endswith(b"\n"):
            sys.exit("the connection to dtrain ended before it said what to do")
        os.environ.update(json.loads(line))

    @property
    def connection(self) -> int:
        """The descriptor whose other end is the launcher's."""
        return self._lines.fileno()

    def drop(self) -> None:
        """In the script's process: leave all this to the guard. ssh would wait for who still holds it."""
        self._lines.close()
        os.close(self._channel)

    def beat(self) -> None:
        """Write something: over a connection that broke unnoticed, so that this host's sshd finds out and ends."""
        with contextlib.suppress(OSError):
            os.write(self._channel, b"\n")

    def obey(self, child: int) -> None:
        """From the guard's main thread: send this process, from now on, the signals that the launcher means."""
        guard = threading.get_ident()

        def listen() -> None:
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # they are the main thread's, which waits
            for line in self._lines:
                _do(line, child, guard)
            signal.pthread_kill(guard, LAUNCHER_IS_GONE)

        threading.Thread(target=listen, daemon=True).start()


class Orders:
    """The file in which a supervisor on another host writes words. The guard looks into it at each beat.

    ``over`` is a file that is there when the attempt is over, also for a rank that nobody could reach.
    """

    def __init__(self, path: Path, over: Path) -> None:
        self._path, self._over, self._read = path, over, 0

    def obey(self, child: int) -> None:
        """From the guard's main thread: do what has been written since the last time. ``child`` is the script's process."""
        with contextlib.suppress(OSError):
            open_anew(self._over.parent)
            if self._over.is_file():
                signal.pthread_kill(threading.get_ident(), LAUNCHER_IS_GONE)
        with contextlib.suppress(OSError):
            open_anew(self._path.parent)
            with open(self._path, "rb") as file:
                file.seek(self._read)
                lines = file.read().splitlines(keepends=True)
            for line in lines:
                if line.endswith(b"\n"):
                    self._read += len(line)
                    _do(line, child, threading.get_ident())


def _do(line: bytes, child: int, guard: int) -> None:
    word = line.decode().strip()
    if word == "stacks":
        with contextlib.suppress(ProcessLookupError):
            if answers_stacks(child):
                os.kill(child, DUMP_STACKS)
    elif word in WORDS:
        signal.pthread_kill(guard, WORDS[word])
