"""What the console shows while a job runs: every rank's lines as they come, each with its rank in front."""

from __future__ import annotations

import contextlib
import os
import queue
import re
import shutil
import sys
import threading
import time
from collections.abc import Container, Iterator
from pathlib import Path
from typing import TextIO

from dtrain.masking import Masker

# Colours of rank prefixes, of the 16 that every terminal has: cyan, green, magenta, yellow, blue, and their bright ones.
_COLOURS = (36, 32, 35, 33, 34, 96, 92, 95, 93, 94)

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")

# On a terminal, unfinished progress bars stand below all else, and are drawn anew this often.
_BARS_EVERY_S = 0.2
_MOST_BARS = 16

# Characters that may wait for who reads the console; more stay in the ranks' files until then.
_MOST_WAITING = 4 << 20

# What moves the cursor or erases (Chainer's PrintReport does) would take away other ranks' lines; colours may pass.
_MOVES = re.compile(r"\x1b\[[0-9;?]*[A-HJKSTfhlsu]")

# The end of a bar of tqdm's, whether or not it knows its total: `3/10 [00:01<00:02, 3.00it/s, loss=0.5]`. It ends no line, and so
# what is printed next comes right after it.
_METER = re.compile(r"\w \[\d+:\d\d(:\d\d)?[<,]([^\[\]]|\[[^\[\]]{0,100}\]){0,200}\]")


def has_colour(stream: TextIO) -> bool:
    """True on a terminal, unless NO_COLOR (https://no-color.org) is set to anything but nothing."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


class LineReader:
    """Hands out the whole lines of a file that grows, or of a pipe, as they come; never blocks.

    What follows the last line end is kept until the rest of the line comes.
    """

    def __init__(self, source: Path | int) -> None:
        """``source``: a file, which need not exist yet, or the descriptor of a pipe's reading end, which is closed with this."""
        self._path = source if isinstance(source, Path) else None
        self._descriptor = source if isinstance(source, int) else None
        if self._descriptor is not None:
            os.set_blocking(self._descriptor, False)
        self._rest = b""
        self._offset = self._size = 0
        self._redraws = False
        """The unfinished line has been overwritten: it is a progress bar."""

    def read(self, *, max_chunks: int | None = None) -> bytes:
        """The bytes that came since the last call; at most ``max_chunks`` MiB: a flood must not hold up the others."""
        if not self._opens():
            return b""
        assert self._descriptor is not None
        chunks: list[bytes] = []
        with contextlib.suppress(BlockingIOError):
            while (max_chunks is None or len(chunks) < max_chunks) and (chunk := os.read(self._descriptor, 1 << 20)):
                chunks.append(chunk)
        data = b"".join(chunks)
        self._offset += len(data)
        return data

    def grows(self) -> bool:
        """Whether the file has grown since this was last asked."""
        before = self._size
        if self._opens():
            assert self._descriptor is not None
            self._size = os.fstat(self._descriptor).st_size
        return self._size > before

    def look_again(self) -> None:
        """Open the file anew before it is read the next time, and go on where this was.

        On a network file system a file that is kept open shows what another host has written up to a minute late, and one that
        is opened shows it at once (nfs(5), acregmax and close-to-open).
        """
        if self._path is not None:
            self.close()

    def _opens(self) -> bool:
        """Whether there is something to read from, now or since before."""
        if self._descriptor is None:
            assert self._path is not None
            try:
                self._descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return False
            os.lseek(self._descriptor, self._offset, os.SEEK_SET)
        return True

    def lines(self, data: bytes, *, final: bool = False) -> list[str]:
        """The whole lines that end in ``data``, without their ends; with ``final`` also a last one that has no end."""
        if not data and not final:
            return []
        whole, end, rest = (self._rest + data).rpartition(b"\n")
        if final and rest:
            whole, end, rest = whole + end + rest, b"\n", b""
        self._redraws = b"\r" in rest or (self._redraws and not end)
        # Of a bar that is still being drawn only its last state can matter; all of them would be read again and again.
        self._rest = rest[rest.rfind(b"\r", 0, max(0, len(rest) - 1)) + 1 :]
        return self.shown(whole).split("\n") if end else []

    def bar(self) -> str:
        """The last state of a progress bar that has not ended its line yet; else nothing."""
        return self.shown(self._rest).partition("\n")[0] if self._redraws else ""

    @staticmethod
    def shown(data: bytes) -> str:
        """Whole lines as they stand there in the end: a progress bar overwrites its own by carriage returns, and what is printed
        after one is a line of its own; a colour ends with its line, for the next one may be another rank's."""
        text = data.decode(errors="replace")
        if "\r" in text:
            text = "\n".join(_drawn(line) if "\r" in line else line for line in text.split("\n"))
        if "\x1b" in text:
            text = "\n".join(_uncoloured_at_end(line) for line in _MOVES.sub("", text).split("\n"))
        return text

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _drawn(line: str) -> str:
    shown = line.removesuffix("\r").rpartition("\r")[2]
    meter = _METER.search(shown)
    if meter is None or not shown[meter.end() :].strip():
        return shown
    return f"{shown[: meter.end()]}\n{shown[meter.end() :]}"


def _uncoloured_at_end(line: str) -> str:
    colours = _COLOUR.findall(line)
    is_on = bool(colours) and colours[-1][2:-1].strip("0;") != ""
    return f"{line}\x1b[0m" if is_on else line


def plain_lines(data: bytes) -> list[str]:
    """Lines of a rank's output as they stand there in the end, without colours: for what is no terminal."""
    return _COLOUR.sub("", LineReader.shown(data)).splitlines()


class Console:
    """Shows ranks' lines on standard output and dtrain's own words on standard error.

    On a terminal also progress bars that are being drawn, a line a rank below all else. Only ``ranks`` are shown, None: all.
    ``masker`` keeps secrets out of everything.
    """

    def __init__(
        self,
        out: TextIO | None = None,
        err: TextIO | None = None,
        *,
        ranks: Container[int] | None = None,
        masker: Masker | None = None,
    ) -> None:
        self._out = sys.stdout if out is None else out
        self._err = sys.stderr if err is None else err
        self._colour = has_colour(self._out)
        self._colour_err = has_colour(self._err)
        self._ranks = ranks
        self.masker = masker or Masker()
        self._draws = self._out.isatty() and os.environ.get("TERM") != "dumb"
        self._bars: list[str] = []
        self._next_bars = 0.0
        self._writer: _Writer | None = None

    def shows(self, rank: int) -> bool:
        """Whether lines of this rank are wanted."""
        return self._ranks is None or rank in self._ranks

    @contextlib.contextmanager
    def in_background(self) -> Iterator[None]:
        """While within, a thread writes: who stops reading (Ctrl-S, a pager) stops nobody else. The end blocks until all is."""
        self._writer = _Writer()
        try:
            yield
        finally:
            writer, self._writer = self._writer, None
            writer.finish()

    @property
    def is_behind(self) -> bool:
        """Whether so much is yet to be written that no more should come: ranks' lines wait in their files."""
        return self._writer is not None and self._writer.waiting > _MOST_WAITING

    def rank_lines(self, host: str, rank: int | str, lines: list[str], *, label: str = "") -> None:
        """Show whole lines of one rank (or of the launcher, by its name); ``label`` names a rank that has a role."""
        if not lines:
            return
        prefix = self._prefix(host, rank, label)
        self._write(self._out, f"{prefix} " + f"\n{prefix} ".join(lines) + "\n")

    def rank_bars(self, bars: dict[int, tuple[str, str, str]], *, final: bool = False) -> None:
        """Show the unfinished lines of ranks (host, label and text of each), in place of those shown before; in the end none."""
        if not self._draws or (not final and time.monotonic() < self._next_bars):
            return
        self._next_bars = time.monotonic() + _BARS_EVERY_S
        size = shutil.get_terminal_size()
        drawn = []
        for rank, (host, label, text) in list(bars.items())[: min(_MOST_BARS, size.lines - 1)]:
            room = size.columns - len(f"[{host}:{label or rank}] ")
            drawn.append(f"{self._prefix(host, rank, label)} {_COLOUR.sub('', text)[: max(0, room)]}\n")
        if drawn != self._bars:
            self._write(self._out, "")
            self._bars = drawn
            self._write(self._out, "".join(drawn), bars=True)

    def _prefix(self, host: str, rank: int | str, label: str) -> str:
        prefix = f"[{host}:{label or rank}]"
        if not self._colour:
            return prefix
        number = _COLOURS[rank % len(_COLOURS)] if isinstance(rank, int) else 2
        return f"\x1b[{number}m{prefix}\x1b[0m"

    def say(self, text: str, *, bad: bool = False) -> None:
        """Show words of dtrain's own."""
        self._write(self._err, f"\x1b[31m{text}\x1b[0m\n" if self._colour_err and bad else f"{text}\n")

    def _write(self, stream: TextIO, text: str, *, bars: bool = False) -> None:
        put = _put if self._writer is None else self._writer.put
        if self._bars and not bars:  # what comes now stands where they stood
            put(self._out, f"\x1b[{len(self._bars)}A\x1b[J")
            self._bars = []
        put(stream, self.masker.text(text))


def _put(stream: TextIO, text: str) -> None:
    # Who reads us may go away (`dtrain run ... | head`), or a disk be full; the job goes on, and its output is in its files.
    with contextlib.suppress(OSError):
        stream.write(text)
        stream.flush()


class _Writer:
    """A thread that writes what it is given, in this order."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[TextIO, str] | None] = queue.SimpleQueue()
        self._given = self._written = 0  # characters; each is counted by one thread alone
        self._thread = threading.Thread(target=self._write, name="console", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        return self._given - self._written

    def put(self, stream: TextIO, text: str) -> None:
        self._given += len(text)
        self._queue.put((stream, text))

    def finish(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def _write(self) -> None:
        while (given := self._queue.get()) is not None:
            _put(*given)
            self._written += len(given[1])
