"""What ranks write on a host that does not see the run folder, as they write it: from there into the folder here.

These are the files by which a run is watched while it goes on: the ranks' own folders, and their metrics. The host's agent sends
them through its ssh connection (:class:`Outgoing`), the supervisor takes them over (:class:`Incoming`): all else on its side
reads the run folder, and need not know. What the script itself writes is brought back in the end (launch/copies.py).

A message is a line ``file SIZE AT NAME`` and SIZE bytes, which the file in the run folder has from byte AT on, and nothing after
them; AT is ``-`` for a file that is replaced as a whole. Other lines are the agent's own.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from dtrain.errors import WorkspaceError
from dtrain.files import atomic_file, read_json
from dtrain.layout import RankLayout, RunLayout

_FILE = b"file "
_LOOK_S = 0.1
_PIECE_BYTES = 1 << 18


class Outgoing:
    """The agent's side. Nothing here waits but :meth:`finish`."""

    def __init__(self, run: RunLayout, ranks: Sequence[int], channel: int) -> None:
        """``ranks`` are those whose files are sent, none where the host sees the run folder; ``channel`` is a descriptor."""
        self._run, self._ranks, self._channel = run, ranks, channel
        self._sizes: dict[Path, int] = {}
        self._seen: dict[Path, tuple[int, int, int]] = {}
        if ranks:  # what the copy came with is there already
            sent = read_json(run.copy_record)["files"]
            self._sizes = {run.root / name: size for name, (size, _) in sent.items()}
        self._lines: list[bytes] = []
        self._asked: list[bytes] = []
        self._to_confirm: list[bytes] = []
        self._messages: Iterator[bytes] | None = None
        self._pending = b""
        self.next_look = 0.0
        """When there may be something to send, of time.monotonic."""

    @property
    def is_waiting(self) -> bool:
        """Whether something is to be written as soon as the channel takes it."""
        return bool(self._pending or self._lines or self._messages is not None)

    def say(self, line: bytes) -> None:
        """Write a line, or several, when the message is over that is on its way."""
        self._lines.append(line)

    def confirm(self, line: bytes) -> None:
        """Write a line when all that the ranks have written by now was sent."""
        self._asked.append(line)
        self.next_look = 0.0

    def write(self) -> None:
        """Write what the channel takes at once. Raises OSError when nobody reads it any more."""
        self._pending = self._pending or self._next()
        with contextlib.suppress(BlockingIOError):
            if self._pending:
                self._pending = self._pending[os.write(self._channel, self._pending) :]

    def finish(self) -> None:
        """Write all that is left, however long that takes; nothing when nobody reads it any more."""
        os.set_blocking(self._channel, True)
        with contextlib.suppress(OSError):
            while self.is_waiting:
                self.write()
            self.next_look = 0.0
            self.write()
            while self.is_waiting:
                self.write()

    def _next(self) -> bytes:
        if self._lines:
            lines, self._lines = self._lines, []
            return b"".join(lines)
        if self._messages is None:
            if time.monotonic() < self.next_look:
                return b""
            self._messages, self._to_confirm, self._asked = self._changes(), self._asked, []
        message = next(self._messages, None)
        if message is not None:
            return message
        self._messages, self.next_look = None, time.monotonic() + _LOOK_S
        return b"".join(self._to_confirm)

    def _changes(self) -> Iterator[bytes]:
        """What was written since the last time."""
        for rank in self._ranks:
            files = self._run.rank(rank)
            for path in rank_files(files):
                yield from self._grown(path) if path in (files.output_log, files.stack) else self._replaced(path)
            for path in self._run.metrics.glob(f"rank-{rank:05d}*.jsonl"):
                yield from self._grown(path)

    def _grown(self, path: Path) -> Iterator[bytes]:
        with contextlib.suppress(FileNotFoundError), open(path, "rb", buffering=0) as file:
            size, at = os.fstat(file.fileno()).st_size, self._sizes.get(path)
            if at is None or at > size:
                at = self._sizes[path] = 0
                yield self._message(path, b"0", b"")
            file.seek(at)
            while at < size and (data := file.read(min(_PIECE_BYTES, size - at))):
                yield self._message(path, b"%d" % at, data)
                at = self._sizes[path] = at + len(data)

    def _replaced(self, path: Path) -> Iterator[bytes]:
        with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
            status = os.fstat(file.fileno())
            now = (status.st_ino, status.st_size, status.st_mtime_ns)
            if self._seen.get(path) != now:
                self._seen[path] = now
                yield self._message(path, b"-", file.read())

    def _message(self, path: Path, at: bytes, data: bytes) -> bytes:
        return _FILE + b"%d %s %s\n" % (len(data), at, os.fsencode(path.relative_to(self._run.root))) + data


class Incoming:
    """The supervisor's side, of one host."""

    def __init__(self, run: RunLayout, say: Callable[[str], None]) -> None:
        """``say`` shows, once, that the run folder cannot be written."""
        self._run, self._say = run, say
        self._rest = b""
        self._has_failed = False

    def feed(self, data: bytes) -> list[bytes]:
        """Write what has come into the run folder; return the whole lines that are about no file."""
        data, self._rest, start = self._rest + data, b"", 0
        lines = []
        while (end := data.find(b"\n", start)) >= 0:
            line = data[start:end]
            if not line.startswith(_FILE):
                lines.append(line)
                start = end + 1
                continue
            _, size, at, name = line.split(b" ", 3)
            after = end + 1 + int(size)
            if len(data) < after:
                break
            self._keep(os.fsdecode(name), at, data[end + 1 : after])
            start = after
        self._rest = data[start:]
        return lines

    def _keep(self, name: str, at: bytes, data: bytes) -> None:
        try:
            path = self._run.within(name)
            if at == b"-":
                with atomic_file(path, durable=False) as whole:
                    whole.write(data)
            else:
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
                with os.fdopen(descriptor, "wb", buffering=0) as file:
                    if os.fstat(descriptor).st_size > int(at):
                        file.truncate(int(at))
                    file.seek(int(at))
                    file.write(data)
        except (OSError, WorkspaceError) as error:
            if not self._has_failed:
                self._has_failed = True
                self._say(f"dtrain: what ranks on other hosts write cannot be kept here meanwhile: {error}")


def mirrors(name: str, ranks: Sequence[int]) -> bool:
    """Whether a file of the run folder is one that these ranks alone write, and that is mirrored."""
    folder, _, file = name.rpartition("/")
    own = {f"{rank:05d}" for rank in ranks}
    if folder == "outputs/metrics":
        return any(file.startswith(f"rank-{rank}") for rank in own)
    return folder.startswith("attempts/") and folder.rpartition("/")[2] in own


def rank_files(files: RankLayout) -> list[Path]:
    """The files of a rank's folder that its host has to tell: not those that are being written, nor what it is told."""
    with contextlib.suppress(FileNotFoundError):
        found = [Path(entry.path) for entry in os.scandir(files.root)]
        return [path for path in found if not path.name.startswith(".") and path != files.orders]
    return []
