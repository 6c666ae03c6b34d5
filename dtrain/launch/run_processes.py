"""The processes of a run on this host: found by the folder in their environment, and its guards by their records."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import psutil

from dtrain import env
from dtrain.layout import RunLayout
from dtrain.status import read_process


def processes_of(run: Path, last: int | None = None) -> list[psutil.Process]:
    """All processes of this host that belong to the run in this folder: they carry it in their environment.

    ``last``: only those of that attempt and of the ones before it; None: of all.
    """
    marker, attempt, found = os.fsencode(f"{env.RUN_DIR}={run}"), f"{env.ATTEMPT}=".encode(), []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError, psutil.Error), open(f"/proc/{name}/environ", "rb") as environ:
            variables = environ.read().split(b"\0")  # a zombie's is empty
            number = next((each.removeprefix(attempt) for each in variables if each.startswith(attempt)), b"")
            if marker in variables and (last is None or int(number or 0) <= last):
                found.append(psutil.Process(int(name)))
    return found


def signal_guard(run: RunLayout, rank: int, number: int) -> bool:
    """Send the guard of a rank a signal; False when the rank does not run on this host, or its guard is gone."""
    record = read_process(run, rank)
    if record is None or record.guard is None or record.find() is None:
        return False
    guard = record.guard.find()  # not the script's parent: that may be init by now
    if guard is None:
        return False
    with contextlib.suppress(psutil.Error):
        guard.send_signal(number)
    return True
