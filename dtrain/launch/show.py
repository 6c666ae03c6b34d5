"""Whose output the console shows: ``--show 0,3``."""

from __future__ import annotations

import re
from collections.abc import Sequence

from dtrain.errors import UsageError
from dtrain.spec import JobSpec

_MOST_WORKERS = 10_000  # of an elastic job, in all: nobody knows how many will be started


def parse_show(text: str, spec: JobSpec) -> frozenset[int]:
    """The ranks that ``--show`` means: numbers and ranges (``0,4-7``), in a cluster also roles and tasks (``chief,worker0``), all
    or none; workers of an elastic job by the order of their starts.

    Raises UsageError for what the job does not have.
    """
    tasks = [(task.role, task.label) for task in spec.tasks]
    size = _MOST_WORKERS if spec.horovod_options.elastic else spec.size
    shown: set[int] = set()
    for word in (word.strip() for word in text.split(",")):
        numbers = re.fullmatch(r"(\d+)(?:-(\d+))?", word)
        if word in ("all", "none"):
            found: Sequence[int] = range(size) if word == "all" else ()
        elif numbers is not None:
            found = range(int(numbers[1]), int(numbers[2] or numbers[1]) + 1)
        else:
            found = [rank for rank, names in enumerate(tasks) if word.replace(":", "") in names]
        if word != "none" and not (found and all(rank < size for rank in found)):
            names = sorted({name for names in tasks for name in names})
            roles = f", or {', '.join(names)}" if names else ""
            there = f"ranks 0 to {size - 1}" if size > 1 else "rank 0 alone"
            raise UsageError(
                f"--show {text}: there is no {word!r} in this job of {there}; use numbers as 0,2-3{roles}; all; none"
            )
        shown.update(found)
    return frozenset(shown)
