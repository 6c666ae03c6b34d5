"""The output of one attempt, of its ranks and of what launched them, on its way to the console."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import socket
import time
from collections.abc import Callable

from dtrain import env
from dtrain.binding import parse_cpus
from dtrain.launch.chatter import Chatter
from dtrain.launch.console import Console, LineReader
from dtrain.launch.plan import LaunchPlan
from dtrain.layout import RunLayout
from dtrain.masking import MaskedStream
from dtrain.status import RankFailure, failure_from_line

_CAUSE_LINES = 20
_AT_ONCE = 16  # MiB
# The launcher's words are shown this much later, to know by then whether they are about a rank that failed.
_LAUNCHER_HOLD_S = 0.5
# How long the record of a rank that has begun may take to be seen here, from its end on.
_RECORD_S = 3.0


class Output:
    """Used by the attempt's supervisor alone. Nothing here blocks."""

    def __init__(self, plan: LaunchPlan, run: RunLayout, console: Console, host: Callable[[int], str]) -> None:
        """``host`` gives the name of a rank's host."""
        self._plan, self._run, self._console, self._host = plan, run, console, host
        self._labels: dict[int, str] = {}
        self._readers: dict[int, LineReader] = {}
        environ = {**os.environ, **plan.processes[0].environment}
        self._chatter = None if env.wants_tensorflow_messages(environ) else Chatter()
        self.printed: Callable[[int], None] = lambda rank: None
        """Called with each rank that wrote something."""
        reading_end, self.pipe = os.pipe()
        """What the plan's processes write to: the launcher, and ranks whose files cannot be written."""
        self._launcher = LineReader(reading_end)
        self._launcher_mask = MaskedStream(plan.masker)
        self._launcher_lines: list[tuple[float, str]] = []
        self._ended: dict[int, tuple[float, str, str]] = {}
        """Ranks that the launcher says have ended, and it is not yet seen whether they had begun: when it said so, host, how."""
        self._shown = 0
        """Of the launcher's lines, how many."""

    def add(self, rank: int, *, label: str) -> None:
        """Show the output of this rank from now on; ``label`` is its role and index, empty of a rank that has none."""
        self._labels[rank], self._readers[rank] = label, LineReader(self._run.rank(rank).output_log)

    def look_again(self, rank: int) -> None:
        """See what this rank has written on another host, see :meth:`LineReader.look_again`."""
        self._readers[rank].look_again()

    def show(self, *, final: bool) -> list[RankFailure]:
        """Show what the ranks wrote since, ``final``: all of it; return the failures that came through the pipe, or that the
        launcher tells of: ranks that ended and had never begun."""
        if final or not self._console.is_behind:
            self._show_ranks(final)
        else:
            for rank, reader in self._readers.items():
                if reader.grows():
                    self.printed(rank)
        return self._read_launcher(final) + self._never_began()

    def show_launcher(self, *, final: bool) -> None:
        """Show the launcher's own words, once they were held back for long enough; ``final``: all."""
        until = time.monotonic() - (0 if final else _LAUNCHER_HOLD_S)
        lines = [line for came, line in self._launcher_lines[self._shown :] if came <= until]
        self._shown += len(lines)
        self._console.rank_lines(socket.gethostname(), self._plan.launcher, lines)

    def last_words(self, count: int) -> list[str]:
        """Of the last lines of the launcher's own, at most ``count``, those that are not blank."""
        return [line for _, line in self._launcher_lines[-count:] if line.strip()]

    def first_to_end(self, *, before: re.Pattern[str]) -> set[int]:
        """The ranks of which the launcher said first that they had ended, where it did so before a line like ``before``."""
        for _, line in self._launcher_lines:
            if before.search(line):
                break
            if self._plan.ended and (said := re.search(self._plan.ended, line)) is not None:
                return parse_cpus(said["ranks"])
        return set()

    def _show_ranks(self, final: bool) -> None:
        bars = {}
        for rank, reader in self._readers.items():
            data = reader.read(max_chunks=None if final else _AT_ONCE)
            if data:
                self.printed(rank)
            if not self._console.shows(rank):
                continue
            lines = reader.lines(data, final=final)
            if self._chatter is not None:
                lines = self._chatter.drop(rank, lines)
            if lines:
                self._console.rank_lines(self._host(rank), rank, lines, label=self._labels[rank])
            if bar := reader.bar():
                bars[rank] = (self._host(rank), self._labels[rank], bar)
        self._console.rank_bars({} if final else bars, final=final)

    def _read_launcher(self, final: bool) -> list[RankFailure]:
        data = self._launcher_mask.feed(self._launcher.read(max_chunks=None if final else _AT_ONCE))
        data += self._launcher_mask.flush() if final else b""
        if data:
            with contextlib.suppress(OSError), open(self._run.launcher_log, "ab") as log:  # a full disk: shown, though not kept
                log.write(data)
        failures = []
        for line in self._launcher.lines(data, final=final):
            if (failure := failure_from_line(line)) is not None:
                failures.append(failure)
            elif not (self._plan.noise and re.search(self._plan.noise, line)):
                self._launcher_lines.append((time.monotonic(), line))
                if self._plan.ended and (said := re.search(self._plan.ended, line)) is not None:
                    about = (time.monotonic(), said["host"], said["how"])
                    self._ended.update(dict.fromkeys(parse_cpus(said["ranks"]), about))
        return failures

    def _never_began(self) -> list[RankFailure]:
        """Ranks that ended before dtrain's first code in them could record anything: they did not find what they need there."""
        failures = []
        for rank, (when, host, how) in list(self._ended.items()):
            if time.monotonic() - when < _RECORD_S:
                continue
            self._ended.pop(rank)
            self._run.rank(rank).look_again()
            if self._run.rank(rank).process.is_file() or self._run.rank(rank).error.is_file():
                continue
            code = re.search(r"exit code (\d+)", how)
            trouble = [line for line in self.last_words(_CAUSE_LINES) if line.startswith(("slurmstepd", "dtrain: "))][-1:]
            message = "; ".join([f"ended before it began: {how}", *trouble])
            failure = RankFailure.now(rank, "exit", int(code[1]) if code is not None else 1, message)
            failures.append(dataclasses.replace(failure, host=host))
        return failures

    def close(self) -> None:
        for reader in (*self._readers.values(), self._launcher):
            reader.close()
        os.close(self.pipe)
