"""The communicator over Horovod: for ranks that horovodrun started with Gloo, where there may be no MPI at all."""

from __future__ import annotations

import itertools
import os
import pickle
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dtrain import install
from dtrain.comm._agreement import CallSignature, explain_disagreement, name_ranks, sign_broadcast, sign_mean
from dtrain.comm._fusion import Buckets, plan_messages
from dtrain.comm.base import Array
from dtrain.env import other_world
from dtrain.errors import CommunicationError, MissingDependency
from dtrain.progress import PROGRESS

BUCKET_BYTES = 4 * 2**20

_numbers = itertools.count()


class HorovodCommunicator:
    """All ranks of Horovod's global process set.

    Horovod matches operations by name, so every one has a name of its own: the number of the communicator, which all ranks
    make in the same order, and that of the call. They never meet those of the script, or of another communicator. Works
    within a ``tf.function`` while that is traced: it leaves the graph.
    """

    def __init__(self, *, expected_size: int | None = None, bucket_bytes: int = BUCKET_BYTES) -> None:
        """Collective. ``expected_size`` is the number of ranks the launcher started; another one raises RankError.

        Raises MissingDependency without Horovod or TensorFlow.
        """
        self._hvd = _import_horovod()
        with self._translated("init"):
            self._hvd.init()
        if expected_size is not None and self._hvd.size() != expected_size:
            raise other_world(expected_size, self._hvd.size(), "Horovod")
        self._number = next(_numbers)
        self._calls = itertools.count()
        self._buckets = Buckets(bucket_bytes)
        self._closed = False

    @property
    def rank(self) -> int:
        return int(self._hvd.rank())

    @property
    def size(self) -> int:
        return int(self._hvd.size())

    @property
    def local_rank(self) -> int:
        return int(self._hvd.local_rank())

    @property
    def local_size(self) -> int:
        return int(self._hvd.local_size())

    def barrier(self) -> None:
        self._exchange("barrier", pickle.dumps(None))

    def allreduce_mean_(self, arrays: Sequence[Array]) -> None:
        signature = sign_mean(arrays)
        self._agree(signature)
        mpi_ops = self._hvd.mpi_ops

        def reduce_flat(flat: NDArray[Any]) -> None:
            with self._graph_left("allreduce_mean_") as (tensorflow, name):
                summed = mpi_ops._allreduce(tensorflow.constant(flat), name=name, op=mpi_ops.Sum, ignore_name_scope=True)
                np.divide(summed.numpy(), self.size, out=flat)

        # float16 is summed in float32, as by every communicator.
        for message in plan_messages(signature.arrays, self._buckets.limit_bytes, {"e": "f", "f": "f", "d": "d"}):
            self._buckets.exchange(arrays, message, reduce_flat)

    def broadcast_(self, arrays: Sequence[Array], root: int = 0) -> None:
        signature = sign_broadcast(arrays, root, self.size)
        self._agree(signature)

        def broadcast_flat(flat: NDArray[Any]) -> None:
            with self._graph_left("broadcast_") as (tensorflow, name):
                octets = flat.view(np.uint8)
                octets[...] = self._hvd.broadcast(tensorflow.constant(octets), root, name=name, ignore_name_scope=True).numpy()

        for message in plan_messages(signature.arrays, self._buckets.limit_bytes, None):
            self._buckets.exchange(arrays, message, broadcast_flat)

    def bcast_obj(self, obj: Any, root: int = 0) -> Any:
        self._check_root(root)
        packed = self._exchange("bcast_obj", _pack(obj) if self.rank == root else b"")
        return obj if self.rank == root and packed[root][:1] == _GOOD else self._unpack("bcast_obj", {root: packed[root]})[0]

    def gather_obj(self, obj: Any, root: int = 0) -> list[Any] | None:
        self._check_root(root)
        gathered = self._unpack("gather_obj", dict(enumerate(self._exchange("gather_obj", _pack(obj)))))
        return gathered if self.rank == root else None

    def allgather_obj(self, obj: Any) -> list[Any]:
        return self._unpack("allgather_obj", dict(enumerate(self._exchange("allgather_obj", _pack(obj)))))

    def abort(self, exit_code: int) -> None:
        # Horovod cannot end other processes; its launcher, or mpirun, does when one of them fails.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)

    def close(self) -> None:
        """Refuse further calls. Horovod itself stays: the script may use it."""
        self._closed = True

    def _exchange(self, operation: str, mine: bytes) -> list[bytes]:
        """The bytes of all ranks, by rank: Horovod's allgather takes parts of different lengths."""
        with self._graph_left(operation) as (tensorflow, name):
            sizes = self._hvd.allgather(
                tensorflow.constant([len(mine)], dtype=tensorflow.int64), name=f"{name}.sizes", ignore_name_scope=True
            ).numpy()
            part = tensorflow.constant(np.frombuffer(mine, dtype=np.uint8))
            whole = self._hvd.allgather(part, name=name, ignore_name_scope=True).numpy().tobytes()
        ends = np.cumsum(sizes)
        return [whole[end - size : end] for size, end in zip(sizes, ends, strict=True)]

    def _agree(self, signature: CallSignature) -> None:
        """Raise CommunicationError on all ranks unless all are about to exchange the same."""
        mine = signature.digest()
        packed = self._exchange(signature.operation, mine.to_bytes(8, "little"))
        if any(other != packed[0] for other in packed) or signature.refusal is not None:
            raise CommunicationError(explain_disagreement(self.allgather_obj(signature)))

    @contextmanager
    def _graph_left(self, operation: str) -> Iterator[tuple[ModuleType, str]]:
        """TensorFlow outside any graph that is being traced, and the next name."""
        import tensorflow

        if self._closed:
            raise CommunicationError("the communicator is closed; make a new one")
        with self._translated(operation), tensorflow.init_scope(), tensorflow.device("/cpu:0"):
            yield tensorflow, f"dtrain.{self._number}.{next(self._calls)}"

    @contextmanager
    def _translated(self, operation: str) -> Iterator[None]:
        from tensorflow.errors import OpError

        try:
            with PROGRESS.collective(operation):
                yield
        except (OpError, ValueError, RuntimeError) as error:
            raise CommunicationError(f"{operation}: Horovod failed: {error}") from error

    def _check_root(self, root: int) -> None:
        if not 0 <= root < self.size:
            raise CommunicationError(f"root={root} is not a rank; ranks are 0 to {self.size - 1}")

    def _unpack(self, operation: str, packed: dict[int, bytes]) -> list[Any]:
        failed = [f"{name_ranks([rank])}: {data[1:].decode()}" for rank, data in packed.items() if data[:1] != _GOOD]
        if failed:
            raise CommunicationError(f"{operation}: an object could not be pickled: {'; '.join(failed)}")
        try:
            return [pickle.loads(data[1:]) for data in packed.values()]
        except Exception as error:  # whatever a foreign __setstate__ or a missing module raises
            raise CommunicationError(f"{operation}: rank {self.rank} could not unpickle what it received: {error!r}") from error


_GOOD, _BAD = b"+", b"-"


def _pack(obj: Any) -> bytes:
    """The pickle, or the reason why there is none: a rank that raised here would leave the others waiting."""
    try:
        return _GOOD + pickle.dumps(obj, protocol=pickle.HIGHEST_PROTOCOL)
    except Exception as error:  # pickle raises nearly anything
        return _BAD + f"{type(obj).__name__}: {error}".encode()


def _import_horovod() -> ModuleType:
    try:
        import horovod.tensorflow
    except ImportError as error:  # Horovod's own message for an absent or unfit extension is one, too
        raise MissingDependency(
            f"communicator 'horovod' needs Horovod for TensorFlow ({error}); run: {install.HOROVOD}"
        ) from error
    module: ModuleType = horovod.tensorflow
    return module
