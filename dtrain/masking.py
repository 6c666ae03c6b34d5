"""Secrets out of what dtrain writes: their values become ``***``, wherever they stand in a text or a stream of bytes.

A value is found as it is, as Python's ``repr`` and JSON write it, and each of its lines where it has several. What a script makes
of it (base64, a part, another encoding) is not found, nor what the script itself writes to files, metrics and tags.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

MASK = "***"
SHORTEST = 4
"""What is shorter stands in every other word; masking it would make the output unreadable and give the secret away."""


class Masker:
    """Masks the given values; without any it changes nothing."""

    def __init__(self, values: Iterable[str] = ()) -> None:
        """``values`` are as ``os.environ`` has them."""
        texts: set[str] = set()
        for value in values:
            lines = (line.strip() for line in value.splitlines())
            texts.update((value, *(line for line in lines if len(line) >= SHORTEST)))
        texts.update(form for text in list(texts) for form in (repr(text)[1:-1], json.dumps(text)[1:-1]))
        forms = sorted(texts - {""}, key=len, reverse=True)
        self._text = re.compile("|".join(map(re.escape, forms)))
        self.forms = [os.fsencode(form) for form in forms]
        self.pattern = re.compile(b"|".join(map(re.escape, self.forms)))

    def data(self, data: bytes) -> bytes:
        return self.pattern.sub(MASK.encode(), data) if self.forms else data

    def text(self, text: str) -> str:
        return self._text.sub(MASK, text) if self.forms else text

    def value(self, value: Any) -> Any:
        """A value of JSON's types, or with tuples, mappings and paths in it, with all of its texts masked."""
        if isinstance(value, (str, Path)):
            return type(value)(self.text(str(value)))
        if isinstance(value, Mapping):
            return {self.value(key): self.value(each) for key, each in value.items()}
        return type(value)(self.value(each) for each in value) if isinstance(value, (list, tuple)) else value


class MaskedStream:
    """Masks what comes in pieces, cut anywhere. What could be the beginning of a secret is held back until more comes."""

    def __init__(self, masker: Masker) -> None:
        self._masker, self._held = masker, b""
        self._longest = max(map(len, masker.forms), default=1)
        # Overlapping ones, too: so it looks ahead. A whole form is at least so long.
        beginnings = {form[:SHORTEST] for form in masker.forms}
        self._beginning = re.compile(b"(?=" + b"|".join(map(re.escape, beginnings)) + b")")

    def feed(self, data: bytes) -> bytes:
        """What can be told of all that came so far, and was not told before."""
        data = self._held + data
        keep = self._first_open(data)
        # A secret that is whole may end in what begins another: it is masked when that is known.
        for found in self._masker.pattern.finditer(data) if self._masker.forms else ():
            if found.start() < keep < found.end():
                keep = found.start()
        self._held = data[keep:]
        return self._masker.data(data[:keep])

    def flush(self) -> bytes:
        """The rest, when nothing more comes."""
        held, self._held = self._held, b""
        return self._masker.data(held)

    def _first_open(self, data: bytes) -> int:
        """Where the first end of ``data`` begins that more bytes could make a secret of; its length when there is none."""
        begin, sure = max(0, len(data) - self._longest + 1), max(0, len(data) - SHORTEST + 1)
        likely = (found.start() for found in self._beginning.finditer(data, begin)) if self._masker.forms else ()
        place: int
        for place in (*likely, *range(max(begin, sure), len(data))):
            end = data[place:]
            if any(len(form) > len(end) and form.startswith(end) for form in self._masker.forms):
                return place
        return len(data)
