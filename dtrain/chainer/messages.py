"""Messages from one rank to another, for ChainerMN's point-to-point calls; dtrain.comm has collectives only."""

from __future__ import annotations

import pickle
from collections import deque
from typing import Any

import numpy as np

from dtrain.comm import Communicator
from dtrain.errors import CommunicationError, UsageError

PART_BYTES = 2**30  # MPI counts bytes in a C int


def find_mpi_comm(communicator: Communicator) -> Any:
    """Return mpi4py's communicator under ours, or None where there is none."""
    return getattr(communicator, "mpi_comm", None)


class Messages:
    """Pickled objects, and arrays within them as they lie in memory, of any size.

    Messages of one rank to another with one tag arrive in the order they were sent. A rank's messages to itself are kept in
    this process, so one rank needs no MPI.
    """

    def __init__(self, communicator: Communicator, *, private: bool = False) -> None:
        """``private`` messages never meet those of other instances; making such an instance is collective."""
        self._rank = communicator.rank
        self._size = communicator.size
        self._to_self: dict[int, deque[bytes]] = {}
        mpi_comm = find_mpi_comm(communicator)
        self._private = private and mpi_comm is not None
        self._mpi_comm = mpi_comm.Dup() if self._private else mpi_comm

    def start(self, obj: Any, dest: int, tag: int = 0) -> list[Any]:
        """Begin to send; returns what :meth:`finish` takes. Arrays in ``obj`` must not change before it has returned."""
        self._check(dest)
        if dest == self._rank:
            self._to_self.setdefault(tag, deque()).append(pickle.dumps(obj))
            return []
        comm = self._require_mpi()
        buffers: list[pickle.PickleBuffer] = []
        body = pickle.dumps(obj, protocol=5, buffer_callback=buffers.append)
        parts = [memoryview(body), *(buffer.raw() for buffer in buffers)]
        requests = [comm.isend((self._rank, tag, [part.nbytes for part in parts]), dest, tag)]
        for part in parts:
            requests += [comm.Isend(part[start : start + PART_BYTES], dest, tag) for start in range(0, part.nbytes, PART_BYTES)]
        return [*requests, parts]

    def finish(self, started: list[Any]) -> None:
        """Block until what :meth:`start` began has left."""
        for request in started[:-1]:
            request.wait()

    def send(self, obj: Any, dest: int, tag: int = 0) -> None:
        """Send, and block until ``obj`` may be changed again; a large one until ``dest`` receives it."""
        self.finish(self.start(obj, dest, tag))

    def receive(self, source: int, tag: int | None = None, status: Any = None) -> Any:
        """Block until a message of ``source`` with ``tag`` (None: with any) is here, and return its object."""
        if source == self._rank:
            return self._receive_own(tag)
        comm = self._require_mpi()
        chosen = {} if tag is None else {"tag": tag}  # mpi4py's default is any
        source, tag, sizes = comm.recv(source=source, status=status, **chosen)
        parts = [np.empty(size, dtype=np.uint8) for size in sizes]
        for part in parts:
            for start in range(0, part.size, PART_BYTES):
                comm.Recv(part[start : start + PART_BYTES], source, tag)
        return pickle.loads(parts[0].data, buffers=parts[1:])

    def close(self) -> None:
        if self._private and self._mpi_comm is not None:
            self._mpi_comm.Free()
        self._mpi_comm = None

    def _receive_own(self, tag: int | None) -> Any:
        waiting = [kept for name, kept in self._to_self.items() if kept and tag in (None, name)]
        if not waiting:
            wanted = "" if tag is None else f" with tag {tag}"
            raise CommunicationError(f"rank {self._rank} receives from itself, and has sent itself nothing{wanted}")
        return pickle.loads(waiting[0].popleft())

    def _check(self, dest: int) -> None:
        if not 0 <= dest < self._size:
            raise CommunicationError(f"dest={dest} is not a rank; ranks are 0 to {self._size - 1}")

    def _require_mpi(self) -> Any:
        if self._mpi_comm is None:
            raise UsageError("messages from one rank to another need the communicator 'mpi'; start with dtrain.init(comm='mpi')")
        return self._mpi_comm
