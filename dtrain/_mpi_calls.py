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

BLOCKING = {
    "Comm": """
        Barrier Bcast Gather Gatherv Scatter Scatterv Allgather Allgatherv Alltoall Alltoallv Alltoallw Reduce Allreduce
        Reduce_scatter Reduce_scatter_block barrier bcast gather scatter allgather alltoall reduce allreduce
        Send Rsend Ssend Recv Sendrecv Sendrecv_replace Probe Mprobe send ssend recv sendrecv probe mprobe
        Clone Create Disconnect Dup Dup_with_info Free Split Split_type""",
    "Intracomm": """
        Scan Exscan scan exscan Create_cart Create_dist_graph Create_dist_graph_adjacent Create_graph
        Create_from_group Create_group Create_intercomm Accept Connect Spawn Spawn_multiple""",
    "Intercomm": "Merge",
    "Topocomm": """
        Neighbor_allgather Neighbor_allgatherv Neighbor_alltoall Neighbor_alltoallv Neighbor_alltoallw
        neighbor_allgather neighbor_alltoall""",
    "Cartcomm": "Sub",
    "Request": "Wait Waitall Waitany Waitsome wait waitall waitany waitsome",
    "Message": "Recv Probe recv probe",
    "Win": """
        Allocate Allocate_shared Create Create_dynamic Free Fence Start Complete Wait Lock Lock_all Unlock Unlock_all
        Flush Flush_all""",
    "File": """
        Open Close Set_size Set_view Preallocate Sync Read_all Read_at_all Read_ordered Write_all Write_at_all Write_ordered
        Read_all_end Read_at_all_end Read_ordered_end Write_all_end Write_at_all_end Write_ordered_end""",
}
"""The methods that return only when another rank has done its part, by the class that has them. Not what only begins something
(Isend, Put), asks (Test, Iprobe), or first copies what it sends (Bsend)."""


def watch_calls(mpi: ModuleType) -> None:
    """Note in :data:`PROGRESS` when the script's main thread enters and leaves a blocking call of ``mpi4py.MPI``.

    Called once in a rank, when that has been imported. A call takes about a microsecond longer. Its classes refuse new
    attributes, as all that are written in C do, and a subclass would not be what ``Split`` returns; so the entries in their own
    tables are replaced. Where a class has no such table (no CPython), or not that method, nothing is noted.
    """
    for name, methods in BLOCKING.items():
        kind = getattr(mpi, name)
        tables = [each for each in gc.get_referents(vars(kind)) if isinstance(each, dict)]
        for table in tables:
            for method in methods.split():
                if method in table:
                    table[method] = _noted(method, table[method])
            ctypes.pythonapi.PyType_Modified(ctypes.py_object(kind))  # the interpreter remembers where it found a method
    finalize = mpi.Finalize

    @functools.wraps(finalize)
    def finalize_and_note() -> None:
        finalize()
        PROGRESS.end(finalizes=False)

    mpi.Finalize = _noted("Finalize", finalize_and_note)  # type: ignore[attr-defined]


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
