"""TensorFlow's own messages below errors, some of which from 2.16 on come at any log level: the console leaves them out."""

from __future__ import annotations

import re

# absl's form before its InitializeLog, which TensorFlow does not call: level, no date, seconds, thread, place.
_MESSAGE = re.compile(r"(?P<level>[IWEF])0000 00:00:\d+\.\d+ +\d+ [\w.]+:\d+\] ")
_NOTICE = "WARNING: All log messages before absl::InitializeLog() is called are written to STDERR"
# The lines that follow a message which ends with an opened brace: protocol buffers' text, up to an empty line.
_PRINTED = re.compile(r"\s*(\w+ \{|\}|\w+: \S.*|)")


class Chatter:
    """Drops them from the ranks' lines; in each rank's file they stay."""

    def __init__(self) -> None:
        self._within: set[int] = set()

    def drop(self, rank: int, lines: list[str]) -> list[str]:
        """The lines of ``rank`` that came now, without information and warnings of TensorFlow's native code."""
        kept = []
        for line in lines:
            message = _MESSAGE.match(line)
            is_chatter = message["level"] in "IW" if message is not None else line == _NOTICE
            printed = rank in self._within and message is None and _PRINTED.fullmatch(line) is not None
            if not is_chatter and not printed:
                kept.append(line)
            if line and (printed or (is_chatter and line.endswith("{"))):
                self._within.add(rank)
            else:
                self._within.discard(rank)
        return kept
