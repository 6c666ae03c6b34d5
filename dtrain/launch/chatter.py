"""TensorFlow's own messages below errors, some of which from 2.16 on come at any log level: the console leaves them out."""

from __future__ import annotations

import re

# absl's form before its InitializeLog, which TensorFlow does not call: level, no date, seconds, thread, place.
_MESSAGE = re.compile(r"(?P<level>[IWEF])0000 00:00:\d+\.\d+ +\d+ [\w.]+:\d+\] ")
_AFTER_LEVEL = "0000 00:00:"
_NOTICE = "WARNING: All log messages before absl::InitializeLog() is called are written to STDERR"
# Of a session's configuration, outside any block.
_SETTINGS = ("allow_soft_placement: true", "isolate_session_state: true")
# The lines that follow a message which opens a brace: protocol buffers' text, blocks and the settings above, up to an empty line.
_MOST_LINES = 50
_PRINTED = re.compile(r"\s*(\w+ \{|\}|\w+: \S.*|)")


class Chatter:
    """Drops them from the ranks' lines; in each rank's file they stay."""

    def __init__(self) -> None:
        self._open: dict[int, int] = {}
        """Of the ranks that print a configuration now: how many braces are open."""
        self._left: dict[int, int] = {}
        """How many lines that configuration may still have."""

    def drop(self, rank: int, lines: list[str]) -> list[str]:
        """The lines of ``rank`` that came now, without information and warnings of TensorFlow's native code."""
        if rank not in self._open and not any(line[1:12] == _AFTER_LEVEL or line == _NOTICE for line in lines):
            return lines  # as a rule: a look at a line costs a tenth of what it costs below
        return [line for line in lines if not self._is_chatter(rank, line)]

    def _is_chatter(self, rank: int, line: str) -> bool:
        message = _MESSAGE.match(line)
        if message is None and rank in self._open and self._left[rank] > 0 and _PRINTED.fullmatch(line):
            self._left[rank] -= 1
            self._open[rank] += line.endswith("{") - (line.strip() == "}")
            is_block = self._open[rank] > 0 or line.strip() in ("}", "") or line.endswith("{")
            if not line:
                del self._open[rank]
            return is_block or line in _SETTINGS
        self._open.pop(rank, None)
        is_chatter = message["level"] in "IW" if message is not None else line == _NOTICE
        if is_chatter and line.endswith("{"):
            self._open[rank], self._left[rank] = 1, _MOST_LINES
        return is_chatter
