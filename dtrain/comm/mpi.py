"""The communicator over MPI: the one module that imports mpi4py."""

from __future__ import annotations

import pickle
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dtrain import install
from dtrain.comm._agreement import CallSignature, explain_disagreement, name_ranks, sign_broadcast, sign_mean
from dtrain.comm._fusion import Buckets, plan_messages
from dtrain.comm.base import Array
from dtrain.env import other_world
from dtrain.errors import CommunicationError, MissingDependency
from dtrain.progress import PROGRESS

if TYPE_CHECKING:
    from mpi4py import MPI

MAX_COUNT = 2**31 - 1  # an element count is a C int in MPI-3 and in many a library under MPI-4

BUCKET_BYTES = 4 * 2**20
"""Stays in a core's cache between sum and division: 100 MB on two ranks of one host took 19 ms, in parts of 32 MiB 45 ms."""

_LAST_WORDS_S = 0.3  # MPICH's mpiexec ends at once on an abort, and drops what it has not passed on by then


class MpiCommunicator:
    """All ranks of an MPI world, over a duplicate of it.

    It works on a duplicate (``Dup``) of the communicator it is given: MPI matches messages within one communicator only, so
    ours never meet those of the script, of Horovod or of a second MpiCommunicator, in whatever order each is used.

    Arrays travel through MPI's buffer interface, fused into flat buckets that are kept between calls (see ``_fusion``).
    """

    def __init__(
        self, mpi_comm: MPI.Comm | None = None, *, expected_size: int | None = None, bucket_bytes: int = BUCKET_BYTES
    ) -> None:
        """Collective over ``mpi_comm`` (default: the world).

        ``expected_size`` is the number of ranks the launcher started; another one raises RankError. ``bucket_bytes``, the same
        on all ranks, bounds a bucket and the part of a large array that goes in one message. Raises MissingDependency without
        mpi4py or an MPI library for it.
        """
        if not 8 <= bucket_bytes <= MAX_COUNT:
            raise CommunicationError(f"bucket_bytes={bucket_bytes} is not allowed; use 8 to {MAX_COUNT}")
        self._mpi = _import_mpi()
        base = self._mpi.COMM_WORLD if mpi_comm is None else mpi_comm
        if expected_size is not None and base.Get_size() != expected_size:
            raise other_world(expected_size, base.Get_size(), _library(self._mpi))
        self._comm: MPI.Comm | None = None
        with self._translated("Dup"):
            comm: MPI.Comm = base.Dup()
            comm.Set_errhandler(self._mpi.ERRORS_RETURN)  # else an error ends the process before Python can tell which
            host = comm.Split_type(self._mpi.COMM_TYPE_SHARED)
            self._local_rank, self._local_size = host.Get_rank(), host.Get_size()
            host.Free()
            limits = comm.allgather(bucket_bytes)
        self._rank, self._size = comm.Get_rank(), comm.Get_size()
        if len(set(limits)) > 1:
            raise CommunicationError(f"bucket_bytes differs between the ranks: {limits} by rank; give all the same")
        self._comm = comm
        self._buckets = Buckets(bucket_bytes)
        self._digests: dict[CallSignature, int] = {}

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def size(self) -> int:
        return self._size

    @property
    def local_rank(self) -> int:
        return self._local_rank

    @property
    def local_size(self) -> int:
        return self._local_size

    @property
    def mpi_comm(self) -> MPI.Comm:
        """mpi4py's communicator under this one, for what the Protocol has not (messages from rank to rank)."""
        return self._open_comm()

    def barrier(self) -> None:
        comm = self._open_comm()
        with self._translated("barrier"):
            comm.Barrier()

    def allreduce_mean_(self, arrays: Sequence[Array]) -> None:
        comm = self._open_comm()
        signature = sign_mean(arrays)
        self._agree(comm, signature)
        in_place, size = self._mpi.IN_PLACE, self._size

        def reduce_flat(flat: NDArray[Any]) -> None:
            comm.Allreduce(in_place, flat)
            np.divide(flat, size, out=flat)

        with self._translated("allreduce_mean_"):
            # float16 is summed in float32: MPI has no float16 of its own, and 4 x 20000 is already beyond its range.
            for message in plan_messages(signature.arrays, self._buckets.limit_bytes, {"e": "f", "f": "f", "d": "d"}):
                self._buckets.exchange(arrays, message, reduce_flat)

    def broadcast_(self, arrays: Sequence[Array], root: int = 0) -> None:
        comm = self._open_comm()
        signature = sign_broadcast(arrays, root, self._size)
        self._agree(comm, signature)

        def broadcast_flat(flat: NDArray[Any]) -> None:
            comm.Bcast(flat.view(np.uint8), root)

        with self._translated("broadcast_"):
            for message in plan_messages(signature.arrays, self._buckets.limit_bytes, None):
                self._buckets.exchange(arrays, message, broadcast_flat)

    def bcast_obj(self, obj: Any, root: int = 0) -> Any:
        comm = self._open_comm()
        self._check_root(root)
        packed = _pack(obj) if self._rank == root else None
        with self._translated("bcast_obj"):
            packed = comm.bcast(packed, root)
        if self._rank == root and packed is not None and packed[0]:
            return obj
        return self._unpack("bcast_obj", {root: packed})[0]

    def gather_obj(self, obj: Any, root: int = 0) -> list[Any] | None:
        """As the Protocol says. An object that cannot be pickled raises on its rank and on ``root`` only."""
        comm = self._open_comm()
        self._check_root(root)
        packed = _pack(obj)
        with self._translated("gather_obj"):
            gathered = comm.gather(packed, root)
        if gathered is None:
            self._unpack("gather_obj", {self._rank: packed})
            return None
        return self._unpack("gather_obj", dict(enumerate(gathered)))

    def allgather_obj(self, obj: Any) -> list[Any]:
        comm = self._open_comm()
        with self._translated("allgather_obj"):
            gathered = comm.allgather(_pack(obj))
        return self._unpack("allgather_obj", dict(enumerate(gathered)))

    def abort(self, exit_code: int) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        time.sleep(_LAST_WORDS_S)
        self._mpi.COMM_WORLD.Abort(exit_code)

    def close(self) -> None:
        """Free the duplicate; a second call, or one after MPI's end, does nothing."""
        comm, self._comm = self._comm, None
        if comm is not None and not self._mpi.Is_finalized():
            with self._translated("close"):
                comm.Free()

    def _open_comm(self) -> MPI.Comm:
        if self._comm is None:
            raise CommunicationError("the communicator is closed; make a new one")
        return self._comm

    def _check_root(self, root: int) -> None:
        if not 0 <= root < self._size:
            raise CommunicationError(f"root={root} is not a rank; ranks are 0 to {self._size - 1}")

    def _agree(self, comm: MPI.Comm, signature: CallSignature) -> None:
        """Raise CommunicationError on all ranks unless all are about to exchange the same: one message of 16 bytes a call.

        The maximum of h and that of -h are one number and its opposite exactly when all h are the same.
        """
        digest = self._digests.get(signature)
        if digest is None:
            if len(self._digests) >= 256:  # a script whose shapes change with every call must not grow us
                self._digests.clear()
            digest = self._digests[signature] = signature.digest()
        ends = np.array([digest, -digest], dtype=np.int64)
        with self._translated(signature.operation):
            comm.Allreduce(self._mpi.IN_PLACE, ends, self._mpi.MAX)
        # A rank that refuses comes here by itself and makes the others' test fail, so that all or none gather.
        if ends[0] != -ends[1] or signature.refusal is not None:
            raise CommunicationError(explain_disagreement(self.allgather_obj(signature)))

    def _unpack(self, operation: str, packed: dict[int, tuple[bool, Any]]) -> list[Any]:
        failed = [f"{name_ranks([rank])}: {reason}" for rank, (good, reason) in packed.items() if not good]
        if failed:
            raise CommunicationError(f"{operation}: an object could not be pickled: {'; '.join(failed)}")
        try:
            return [pickle.loads(data) for _, data in packed.values()]
        except Exception as error:  # whatever a foreign __setstate__ or a missing module raises
            raise CommunicationError(f"{operation}: rank {self._rank} could not unpickle what it received: {error!r}") from error

    @contextmanager
    def _translated(self, operation: str) -> Iterator[None]:
        try:
            with PROGRESS.collective(operation):
                yield
        except self._mpi.Exception as error:
            rank = self._mpi.COMM_WORLD.Get_rank()
            raise CommunicationError(f"{operation}: MPI failed on rank {rank} of the world: {error}") from error


def _pack(obj: Any) -> tuple[bool, Any]:
    """(True, pickle) or (False, reason): the reason travels, for a rank that raised here would leave the others waiting."""
    try:
        return True, pickle.dumps(obj, protocol=pickle.HIGHEST_PROTOCOL)
    except Exception as error:  # pickle raises nearly anything
        return False, f"{type(obj).__name__}: {error}"


def _import_mpi() -> ModuleType:
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise MissingDependency(f"communicator 'mpi' needs mpi4py ({error}); run: {install.MPI}") from error
    except RuntimeError as error:  # mpi4py's wheel looks for an MPI library when it is imported
        raise MissingDependency(
            f"mpi4py found no MPI library ({error}); install one into this environment with: {install.MPI}"
        ) from error
    return MPI


def _library(mpi: ModuleType) -> str:
    return str(mpi.Get_library_version()).strip("\0 \n").splitlines()[0].split(",")[0]
