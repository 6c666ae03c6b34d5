"""What a script that uses mpi4py itself waits for: seen from within, without a line of dtrain's in it."""

from __future__ import annotations

import ctypes
import functools
import gc
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

from dtrain.progress import PROGRESS

_COLLECTIVES = "Barrier Bcast Gather Gatherv Scatter Scatterv Allgather Allgatherv Alltoall Alltoallv Alltoallw Reduce Allreduce"
_OBJECTS = "barrier bcast gather scatter allgather alltoall reduce allreduce"
_MESSAGES = "Send Ssend Recv Sendrecv Sendrecv_replace Probe send ssend recv sendrecv probe"
# Those that return only when another rank has done its part, by the class that has them.
_BLOCKING = {
    "Comm": f"{_COLLECTIVES} Reduce_scatter Reduce_scatter_block {_OBJECTS} {_MESSAGES}",
    "Intracomm": "Scan Exscan scan exscan",
    "Request": "Wait Waitall wait waitall",
}


def watch_calls(mpi: ModuleType) -> None:
    """Note in :data:`PROGRESS` when the script's main thread enters and leaves a blocking call of ``mpi4py.MPI``.

    Called once in a rank, when that has been imported. A call takes about a microsecond longer. Its classes refuse new
    attributes, as all that are written in C do, and a subclass would not be what ``Split`` returns; so the entries in their own
    tables are replaced. Where a class has no such table (no CPython), or not that method, nothing is noted.
    """
    for name, methods in _BLOCKING.items():
        kind = getattr(mpi, name)
        tables = [each for each in gc.get_referents(vars(kind)) if isinstance(each, dict)]
        for table in tables:
            for method in methods.split():
                if method in table:
                    table[method] = _noted(method, table[method])
            ctypes.pythonapi.PyType_Modified(ctypes.py_object(kind))  # the interpreter remembers where it found a method


def _noted(name: str, method: Any) -> Any:
    """The method, or class method, with its beginning and end noted."""
    if isinstance(method, classmethod):
        return classmethod(_noted(name, method.__func__))
    word, main, progress = name.encode(), threading.main_thread().ident, PROGRESS
    get_ident = threading.get_ident

    def call(*args: Any, **kwargs: Any) -> Any:
        if get_ident() != main:  # another thread may wait for messages all its life
            return method(*args, **kwargs)
        outer = progress.waits
        try:
            progress.enter(word)
            return method(*args, **kwargs)
        finally:  # calls no Python function: a signal's handler, which may raise, would run before its first line
            progress.waits = outer
            if not outer:
                progress.calls += 1
                progress.write_left(progress.calls)

    wrapped: Callable[..., Any] = functools.wraps(method)(call)
    return classmethod(wrapped) if type(method).__name__ == "classmethod_descriptor" else wrapped
