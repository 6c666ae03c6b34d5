"""What the console shows while a job runs: every rank's lines as they come, each with its rank in front."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from pathlib import Path
from typing import TextIO

# Colours of rank prefixes, of the 16 that every terminal has: cyan, green, magenta, yellow, blue, and their bright ones.
_COLOURS = (36, 32, 35, 33, 34, 96, 92, 95, 93, 94)

# What moves the cursor or erases (Chainer's PrintReport does) would take away other ranks' lines; colours may pass.
_MOVES = re.compile(r"\x1b\[[0-9;?]*[A-HJKSTfhlsu]")


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

    def read(self, *, max_chunks: int | None = None) -> bytes:
        """The bytes that came since the last call; at most ``max_chunks`` MiB: a flood must not hold up the others."""
        if self._descriptor is None:
            assert self._path is not None
            try:
                self._descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return b""
        chunks: list[bytes] = []
        with contextlib.suppress(BlockingIOError):
            while (max_chunks is None or len(chunks) < max_chunks) and (chunk := os.read(self._descriptor, 1 << 20)):
                chunks.append(chunk)
        return b"".join(chunks)

    def lines(self, data: bytes, *, final: bool = False) -> list[str]:
        """The whole lines that end in ``data``, without their ends; with ``final`` also a last one that has no end."""
        if not data and not final:
            return []
        *lines, self._rest = (self._rest + data).split(b"\n")
        # Of a bar that is still being drawn only its last state can matter; all of them would be read again and again.
        self._rest = self._rest[self._rest.rfind(b"\r", 0, max(0, len(self._rest) - 1)) + 1 :]
        if final and self._rest:
            lines.append(self._rest)
            self._rest = b""
        # A progress bar overwrites its line by carriage returns: what counts is what stands there in the end.
        shown = (line.removesuffix(b"\r").rpartition(b"\r")[2].decode(errors="replace") for line in lines)
        return [_MOVES.sub("", line) for line in shown]

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class Console:
    """Shows ranks' lines on standard output and dtrain's own words on standard error."""

    def __init__(self, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self._out = sys.stdout if out is None else out
        self._err = sys.stderr if err is None else err
        self._colour = has_colour(self._out)
        self._colour_err = has_colour(self._err)

    def rank_lines(self, host: str, rank: int | str, lines: list[str], *, label: str = "") -> None:
        """Show whole lines of one rank (or of the launcher, by its name); ``label`` names a rank that has a role."""
        if not lines:
            return
        prefix = f"[{host}:{label or rank}]"
        if self._colour:
            number = _COLOURS[rank % len(_COLOURS)] if isinstance(rank, int) else 2
            prefix = f"\x1b[{number}m{prefix}\x1b[0m"
        self._write(self._out, "".join(f"{prefix} {line}\n" for line in lines))

    def say(self, text: str, *, bad: bool = False) -> None:
        """Show words of dtrain's own."""
        self._write(self._err, f"\x1b[31m{text}\x1b[0m\n" if self._colour_err and bad else f"{text}\n")

    def _write(self, stream: TextIO, text: str) -> None:
        # Who reads us may go away (`dtrain run ... | head`); the job goes on, and its output is in its files.
        with contextlib.suppress(BrokenPipeError):
            stream.write(text)
            stream.flush()
