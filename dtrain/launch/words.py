"""What the launcher itself (mpirun, srun) says while a job runs: kept in its log, shown unless a rank has failed."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import time

from dtrain.launch.console import Console, LineReader
from dtrain.launch.plan import LaunchPlan
from dtrain.layout import RunLayout
from dtrain.masking import MaskedStream
from dtrain.status import RankFailure, failure_from_line

# The launcher's words are shown this much later, to know by then whether they are about a rank that failed.
_HOLD_S = 0.5


class LauncherWords:
    """Of one attempt. Used by its supervisor, which reads and shows them again and again."""

    def __init__(self, plan: LaunchPlan, run: RunLayout, console: Console) -> None:
        self._plan, self._run, self._console = plan, run, console
        pipe, self.pipe_end = os.pipe()
        """``pipe_end`` is the descriptor that the plan's processes write to."""
        self._reader, self._mask = LineReader(pipe), MaskedStream(plan.masker)
        self._lines: list[tuple[float, str]] = []
        self._shown = 0

    def read(self, max_chunks: int | None, *, final: bool) -> list[RankFailure]:
        """Take in what came since the last time; return the failures of ranks that could tell them in no other way."""
        data = self._mask.feed(self._reader.read(max_chunks=max_chunks))
        data += self._mask.flush() if final else b""
        if data:
            with contextlib.suppress(OSError), open(self._run.launcher_log, "ab") as log:  # a full disk: shown, though not kept
                log.write(data)
        failures = []
        for line in self._reader.lines(data, final=final):
            if (failure := failure_from_line(line)) is not None:
                failures.append(failure)
            elif not (self._plan.noise and re.search(self._plan.noise, line)):
                self._lines.append((time.monotonic(), line))
        return failures

    def show(self, *, final: bool) -> None:
        """Show those that were held back for long enough; in the end all."""
        shown_until = time.monotonic() - (0 if final else _HOLD_S)
        lines = [line for came, line in self._lines[self._shown :] if came <= shown_until]
        self._shown += len(lines)
        self._console.rank_lines(socket.gethostname(), self._plan.launcher, lines)

    def last(self, count: int) -> list[str]:
        """The last of them that are no blank lines."""
        return [line for _, line in self._lines[-count:] if line.strip()]

    def close(self) -> None:
        self._reader.close()
        os.close(self.pipe_end)
