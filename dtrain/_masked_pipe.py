"""A rank's output on its way to its file, where secrets have to be masked in it: through a pipe, and a thread of its guard.

Only where there are secrets: else a rank writes straight into its file. It costs the guard a copy of every byte, and while the
file system is slow the rank waits, as it would by itself. What goes wrong differs: on a full disk output is dropped and the rank
is not told; what a rank's children write after the rank has ended is lost, and they are told by SIGPIPE; of a guard that is
killed, up to 64 KiB are lost.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading

from dtrain.masking import MaskedStream, Masker

_CHUNK = 1 << 16
_PIPE = 1 << 20
"""More than any pipe holds: what was written before the end has been read by then."""


class MaskedPipe:
    """Made by the guard before it forks; the script's process writes to it, the guard's thread reads it to the file."""

    def __init__(self, masker: Masker, output: int) -> None:
        """``output`` is the descriptor of the rank's file."""
        self._stream, self._output = MaskedStream(masker), output
        self._read, self._write = os.pipe()
        self._ended, self._end = os.pipe()
        self._thread = threading.Thread(target=self._pump, daemon=True)

    def be_output(self) -> None:
        """In the script's process: from here on standard output and error lead here."""
        os.dup2(self._write, 1)
        os.dup2(self._write, 2)
        for descriptor in (self._read, self._write, self._ended, self._end, self._output):
            os.close(descriptor)

    def begin(self) -> None:
        """In the guard, after the fork."""
        os.close(self._write)
        self._thread.start()

    def finish(self) -> None:
        """In the guard, when the script's process has ended: returns when all that it wrote is in the file."""
        os.close(self._end)
        self._thread.join()

    def _pump(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # they are the main thread's, which waits
        os.set_blocking(self._read, False)
        has_ended = False
        while not has_ended:
            ready, _, _ = select.select([self._read, self._ended], [], [])
            has_ended = self._ended in ready
            if not self._copy(_PIPE if has_ended else _CHUNK):
                break
        self._keep(self._stream.flush())

    def _copy(self, most: int) -> bool:
        """Copy what is there, up to ``most`` bytes; False when nobody can write any more."""
        while most > 0:
            try:
                data = os.read(self._read, _CHUNK)
            except BlockingIOError:
                return True
            if not data:
                return False
            most -= len(data)
            self._keep(self._stream.feed(data))
        return True

    def _keep(self, data: bytes) -> None:
        with contextlib.suppress(OSError):
            while data:
                data = data[os.write(self._output, data) :]
