"""Tracebacks of a rank's script, without what is dtrain's in them."""

from __future__ import annotations

import runpy
import traceback
from pathlib import Path
from types import TracebackType

from dtrain.errors import DtrainError

_FOLDER = Path(__file__).parent
# What runs the script, and the calls of mpi4py, which each leave a frame.
_BEFORE_SCRIPT = (*(str(_FOLDER / name) for name in ("_rank_main.py", "legacy.py")), runpy.__file__, "<frozen runpy>")
_CALLS = str(_FOLDER / "_mpi_calls.py")


def tell(error: BaseException) -> str:
    """The traceback as it is repeated at the end; of dtrain's own errors, which say all that is needed, only the user's lines."""
    told = traceback.TracebackException.from_exception(error)
    if isinstance(error, DtrainError):
        told.__cause__ = told.__context__ = None
        last = max((n for n, frame in enumerate(told.stack) if not _is_library(frame.filename)), default=-1)
        del told.stack[last + 1 :]
    return "".join(told.format())


def strip_frames(trace: TracebackType | None) -> TracebackType | None:
    """The traceback without the frames that are not the user's: of what runs the script, and of :mod:`dtrain._mpi_calls`."""
    while trace is not None and _file(trace) in _BEFORE_SCRIPT:
        trace = trace.tb_next
    entry = trace
    while entry is not None:
        while entry.tb_next is not None and _file(entry.tb_next) == _CALLS:
            entry.tb_next = entry.tb_next.tb_next
        entry = entry.tb_next
    return trace


def _file(entry: TracebackType) -> str:
    return entry.tb_frame.f_code.co_filename


def _is_library(filename: str) -> bool:
    return filename.startswith((str(_FOLDER), "<frozen")) or "site-packages" in filename
