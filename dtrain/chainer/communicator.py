"""A ChainerMN communicator over dtrain's."""

from __future__ import annotations

import functools
import operator
import platform
import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import chainer
import numpy as np
from chainermn.communicators.communicator_base import CommunicatorBase
from numpy.typing import NDArray

from dtrain.chainer.messages import Messages, find_mpi_comm
from dtrain.chainer.staging import Collective, DeviceMemory, Staging, cupy_memory
from dtrain.comm import Communicator
from dtrain.comm.local import LocalCommunicator
from dtrain.errors import CommunicationError, UsageError

if TYPE_CHECKING:
    from dtrain.run import Run


def create_communicator(source: Run | Communicator | None = None) -> DtrainCommunicator:
    """Make a communicator for every part of ChainerMN; collective, blocks until all ranks have called it.

    ``source`` is the Run, or one of dtrain's communicators; None means ``dtrain.init()``. It stays the owner of the
    connection: ``finalize()`` of what is returned does not close it.
    """
    if source is None:
        from dtrain.run import init

        source = init()
    inner: Any = source if hasattr(source, "allreduce_mean_") else source.comm
    return DtrainCommunicator(inner)


def device_memory(array: Any) -> DeviceMemory | None:
    """The memory an array is carried through: None for NumPy's, which needs none. Raises UsageError for ChainerX arrays."""
    if isinstance(array, np.ndarray):
        return None
    xp = chainer.backend.get_array_module(array)
    if xp is np or xp.__name__ != "cupy":
        name = f"{type(array).__module__}.{type(array).__name__}"
        raise UsageError(f"an array of {name} cannot be exchanged; allowed are NumPy's and CuPy's")
    return cupy_memory()


class DtrainCommunicator(CommunicatorBase):
    """All of ChainerMN's calls, on NumPy and CuPy arrays of any number of elements.

    Methods are collective and block, except ``send``, ``recv`` and their ``_obj`` namesakes, which two ranks call. Arrays
    received lie where the sender's did (for ``gather``, ``allgather``, ``alltoall``, ``allreduce``: where one's own do), on the
    current device. What is refused is refused on all ranks where the fault can be known there, never by leaving others waiting.
    """

    parts_module = "dtrain.chainer.multi_node"  # dtrain.chainer.compatibility sends ChainerMN's functions there

    def __init__(
        self, inner: Communicator, *, owned: bool = False, memory_of: Callable[[Any], DeviceMemory | None] = device_memory
    ) -> None:
        """``inner`` does the exchange; ``owned``: :meth:`finalize` closes it. ``memory_of`` tells how to carry an array."""
        super().__init__()
        self.inner = inner
        self._owned = owned
        self._memory_of = memory_of
        self._staging: Staging | None = None
        self._messages = Messages(inner)
        self._exchanges = Messages(inner, private=True)
        hosts = inner.allgather_obj(platform.node())
        names = list(dict.fromkeys(hosts))
        self._inter_rank, self._inter_size = names.index(hosts[inner.rank]), len(names)

    @property
    def mpi_comm(self) -> Any:
        """mpi4py's communicator, as ChainerMN's own have it; AttributeError where there is no MPI."""
        found = find_mpi_comm(self.inner)
        if found is None:
            raise AttributeError(f"{type(self.inner).__name__} has no MPI communicator")
        return found

    @property
    def rank(self) -> int:
        return self.inner.rank

    @property
    def size(self) -> int:
        return self.inner.size

    @property
    def intra_rank(self) -> int:
        return self.inner.local_rank

    @property
    def intra_size(self) -> int:
        return self.inner.local_size

    @property
    def inter_rank(self) -> int:
        """The number of this host, counted by the lowest rank on each."""
        return self._inter_rank

    @property
    def inter_size(self) -> int:
        return self._inter_size

    def split(self, color: int, key: int) -> DtrainCommunicator:
        if self.size == 1:
            return DtrainCommunicator(LocalCommunicator(), owned=True, memory_of=self._memory_of)
        from dtrain.comm.mpi import MpiCommunicator

        base = self.mpi_comm.Split(color, key)
        inner = MpiCommunicator(base)
        base.Free()
        return DtrainCommunicator(inner, owned=True, memory_of=self._memory_of)

    def finalize(self) -> None:
        self._exchanges.close()
        self._messages.close()
        if self._owned:
            self.inner.close()

    # Objects

    def send_obj(self, obj: Any, dest: int, tag: int = 0) -> None:
        self._messages.send(obj, dest, tag)

    def recv_obj(self, source: int, status: Any = None, tag: int | None = None) -> Any:
        """Receive with ``tag``, None for any; ``status`` may be an ``mpi4py.MPI.Status`` to fill."""
        return self._messages.receive(source, None if tag is not None and tag < 0 else tag, status)

    def bcast_obj(self, obj: Any, max_buf_len: int | None = None, root: int = 0) -> Any:
        """``max_buf_len`` is accepted for ChainerMN's sake; the communicator below cuts messages by itself."""
        return self.inner.bcast_obj(obj, root)

    def gather_obj(self, obj: Any, root: int = 0) -> list[Any] | None:
        return self.inner.gather_obj(obj, root)

    def allreduce_obj(self, obj: Any) -> Any:
        """The sum, taken in the order of ranks, so that it is the same on all."""
        return functools.reduce(operator.add, self.inner.allgather_obj(obj))

    # Arrays

    def send(self, data: Any, dest: int, tag: int) -> None:
        self._messages.send(_pack(data), dest, tag)

    def recv(self, source: int, tag: int) -> Any:
        return _unpack(self._messages.receive(source, tag))

    def bcast(self, x: Any, root: int = 0) -> Any:
        fault, header = None, None
        if self.rank == root:
            if hasattr(x, "dtype") and hasattr(x, "shape"):
                header = (not isinstance(x, np.ndarray), x.shape, np.dtype(x.dtype))
            else:
                fault = f"bcast takes one NumPy or CuPy array, not {type(x).__name__}"
        fault, header = self.inner.bcast_obj((fault, header), root)
        if header is None:
            raise TypeError(fault)
        on_device, shape, dtype = header
        host = _to_host(x) if self.rank == root else np.empty(shape, dtype)
        self.inner.broadcast_([host], root)
        return x if self.rank == root else _place(host, on_device)

    def gather(self, x: Any, root: int = 0) -> tuple[Any, ...] | None:
        gathered = self.inner.gather_obj(_to_host(x), root)
        return None if gathered is None else tuple(_place(each, not isinstance(x, np.ndarray)) for each in gathered)

    def allgather(self, x: Any) -> tuple[Any, ...]:
        return tuple(_place(each, not isinstance(x, np.ndarray)) for each in self.inner.allgather_obj(_to_host(x)))

    def allreduce(self, x: Any) -> Any:
        """The sum over the ranks, in the dtype of ``x``."""
        host = _to_host(x)
        if host.dtype.kind == "f":
            total: NDArray[Any] = np.array(host)
            self.inner.allreduce_mean_([total])
            total *= self.size
        else:
            total = functools.reduce(operator.add, self.inner.allgather_obj(host))
        return _place(total, not isinstance(x, np.ndarray))

    def alltoall(self, xs: Sequence[Any]) -> tuple[Any, ...]:
        if len(xs) != self.size:
            raise ValueError(f"alltoall got {len(xs)} arrays for {self.size} ranks; give one for each")
        on_device = not isinstance(xs[0], np.ndarray)
        hosts = [_to_host(x) for x in xs]
        # All sends are begun before anything is received, so that no order of ranks can block.
        started = [self._exchanges.start(host, rank) for rank, host in enumerate(hosts)]
        received = tuple(_place(self._exchanges.receive(rank, 0), on_device) for rank in range(self.size))
        for each in started:
            self._exchanges.finish(each)
        return received

    def scatter(self, xs: Any, root: int = 0) -> Any:
        fault = None
        if self.rank == root and (not hasattr(xs, "__len__") or len(xs) != self.size):
            fault = f"scatter got {len(xs) if hasattr(xs, '__len__') else 'no'} arrays for {self.size} ranks; give one for each"
        fault = self.inner.bcast_obj(fault, root)
        if fault is not None:
            raise ValueError(fault)
        return self.scatter_obj(None if xs is None or self.rank != root else map(_pack, xs), root, _unpack)

    def scatter_obj(self, objs: Any, root: int, receive: Callable[[Any], Any] = lambda obj: obj) -> Any:
        """Send each rank its own of ``objs``, one object a rank; ``root`` gives them, and each is made as it is sent."""
        mine = None
        if self.rank == root:
            for rank, obj in enumerate(objs):
                if rank == root:
                    mine = obj
                else:
                    self._exchanges.send(obj, rank)
        else:
            mine = self._exchanges.receive(root, 0)
        return receive(mine)

    # Models

    def bcast_data(self, model: Any) -> None:
        """Replace the model's weights by rank 0's, in one exchange; those without a shape yet are left out."""
        params = [(name, param) for name, param in sorted(model.namedparams()) if param.array is not None]
        self._exchange([param.array for _, param in params], self.inner.broadcast_, _describe(params, "array"))

    def bcast_grad(self, model: Any) -> None:
        """Replace the model's gradients by rank 0's; a gradient that is None counts as zeros."""
        params = _with_grads(model, zero_fill=True)
        self._exchange([param.grad for _, param in params], self.inner.broadcast_, _describe(params, "grad"))

    def multi_node_mean_grad(self, model: Any, zero_fill: bool = False) -> None:
        """Replace the model's gradients by their mean over the ranks, in one exchange of flat buckets.

        A gradient that is None becomes zeros with ``zero_fill``, and is left out without. Raises CommunicationError on all
        ranks, naming the parameters, when some have a gradient on some ranks only.
        """
        params = _with_grads(model, zero_fill)
        described = _describe(params, "grad")
        # Two models of equal shapes would pass as the same. Their names' checksum travels with the gradients, a bit an element:
        # a mean other than 0 and 1 shows every rank that one of them differs, and costs no message of its own.
        dtype = np.dtype(params[0][1].grad.dtype if params else np.float32)
        digest = zlib.crc32("\n".join(described).encode()).to_bytes(4, "big")
        checksum = np.unpackbits(np.frombuffer(digest, np.uint8)).astype(dtype)
        self._exchange([*(param.grad for _, param in params), checksum], self.inner.allreduce_mean_, described)
        if np.any(np.minimum(checksum, 1 - checksum) > 0.5 / self.size):
            raise CommunicationError(self._explain(described))
        if chainer.is_debug():
            for name, param in params:
                if not param.xp.isfinite(param.grad).all():
                    raise ValueError(f"the mean gradient of {name} is not finite")

    def _multi_node_mean(self, sendbuf: Any, recvbuf: Any) -> None:
        """ChainerMN's parts call this: the mean of ``sendbuf`` (None: of ``recvbuf``) over the ranks, into ``recvbuf``."""
        if sendbuf is not None:
            recvbuf[...] = sendbuf
        self._exchange([recvbuf], self.inner.allreduce_mean_, [f"an array of shape {recvbuf.shape}, {recvbuf.dtype}"])

    def _exchange(self, arrays: Sequence[Any], collective: Collective, described: list[str]) -> None:
        memories = [self._memory_of(array) for array in arrays]
        on_host = [array for array, memory in zip(arrays, memories, strict=True) if memory is None]
        on_device = [array for array, memory in zip(arrays, memories, strict=True) if memory is not None]
        try:
            if on_device:
                if self._staging is None:
                    self._staging = Staging(next(memory for memory in memories if memory is not None))
                self._staging.exchange(on_device, on_host, collective)
            else:
                collective(on_host)
        except CommunicationError as error:  # raised on all ranks, so that all come to explain it by the names
            raise CommunicationError(f"{self._explain(described)} ({error})") from error

    def _explain(self, described: list[str]) -> str:
        """Say which ranks' parameters differ from rank 0's; collective."""
        everyone = self.inner.allgather_obj(described)
        lines = []
        for rank, each in enumerate(everyone):
            more, less = sorted(set(each) - set(everyone[0])), sorted(set(everyone[0]) - set(each))
            if more or less:
                lines.append(f"rank {rank} has {', '.join(more) or 'nothing'} where rank 0 has {', '.join(less) or 'nothing'}")
        found = "; ".join(lines) or "all ranks have the same parameters"
        advice = "give all ranks one model, and zero_fill=True if some leave parts of it unused"
        return f"the ranks do not exchange the same: {found}; {advice}"


def _with_grads(model: Any, zero_fill: bool) -> list[tuple[str, Any]]:
    """The parameters, by name, whose gradients take part; each gradient is an array of its own that may be written."""
    params = [(name, param) for name, param in sorted(model.namedparams()) if param.array is not None]
    for _, param in params:
        if param.grad is None and zero_fill:
            param.grad = param.xp.zeros_like(param.array)
        elif isinstance(param.grad, np.ndarray) and not param.grad.flags.writeable:
            param.grad = np.array(param.grad)  # the gradient of a sum is a read-only view of one number
    return [(name, param) for name, param in params if param.grad is not None]


def _describe(params: list[tuple[str, Any]], kind: str) -> list[str]:
    return [f"{name} ({kind} {getattr(param, kind).shape}, {getattr(param, kind).dtype})" for name, param in params]


def _to_host(x: Any) -> NDArray[Any]:
    """A NumPy array with the elements of ``x``, without a copy where it is one."""
    if not hasattr(x, "dtype") or not hasattr(x, "shape"):
        raise TypeError(f"one NumPy or CuPy array is needed, not {type(x).__name__}")
    return np.asarray(chainer.backends.cuda.to_cpu(x))


def _place(host: NDArray[Any], on_device: bool) -> Any:
    return chainer.backends.cuda.to_gpu(host) if on_device else host


def _pack(data: Any) -> tuple[bool, bool, list[NDArray[Any]]]:
    """(is it a tuple, do its arrays lie on a device, the arrays)."""
    several = isinstance(data, (tuple, list))
    arrays = data if several else [data]
    return several, bool(arrays) and not isinstance(arrays[0], np.ndarray), [_to_host(array) for array in arrays]


def _unpack(packed: tuple[bool, bool, list[NDArray[Any]]]) -> Any:
    several, on_device, arrays = packed
    placed = tuple(_place(array, on_device) for array in arrays)
    return placed if several else placed[0]
