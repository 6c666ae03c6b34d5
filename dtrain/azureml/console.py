"""What control scripts and jobs are shown on standard output."""

from __future__ import annotations

import sys


def say(text: str, *, end: str = "\n") -> None:
    """Print, and let it be seen at once."""
    print(text, end=end, flush=True)


def warn(text: str) -> None:
    """A warning, on standard error."""
    print(f"dtrain: {text}", file=sys.stderr, flush=True)
