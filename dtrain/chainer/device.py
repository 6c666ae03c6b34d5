"""Where a rank computes: on NumPy, or on the GPU of its local rank through CuPy."""

from __future__ import annotations

import importlib
import socket
from dataclasses import dataclass
from typing import Any

import chainer

from dtrain.comm import Communicator
from dtrain.errors import MissingDependency, NotRunnable, UsageError
from dtrain.install import CUPY

DEVICES = ("auto", "cpu", "gpu")


@dataclass(frozen=True, kw_only=True)
class FoundGpus:
    """What one rank sees: how many GPUs, and the first one's identity, or why there is none."""

    host: str
    local_rank: int
    local_size: int
    count: int
    first: str = ""
    missing: str = ""

    def index(self) -> int:
        """The GPU for this rank. A launcher may show each rank its own GPU only: that is then number 0 for everyone."""
        return self.local_rank if self.count >= self.local_size else 0


def choose_device(kind: str, comm: Communicator) -> Any:
    """Return the ``chainer.backend.Device`` of this rank and make it current. Collective (all ranks look, then agree).

    ``auto`` takes GPUs when every rank sees one, and the CPU when none does. Raises UsageError for another ``kind``, for more
    ranks on a host than it has GPUs, or when only some ranks see one; for ``gpu`` without any, MissingDependency (no CuPy) or
    NotRunnable.
    """
    if kind not in DEVICES:
        raise UsageError(f"device={kind!r} is not known; choose one of {', '.join(DEVICES)}")
    device = chainer.get_device("@numpy")
    if kind != "cpu":
        found = comm.allgather_obj(find_gpus(comm))
        if check_gpus(kind, found):
            device = chainer.get_device(f"@cupy:{found[comm.rank].index()}")
    device.use()
    return device


def find_gpus(comm: Communicator) -> FoundGpus:
    """Look for CuPy and GPUs; never raises and never communicates."""
    place: dict[str, Any] = {"host": socket.gethostname(), "local_rank": comm.local_rank, "local_size": comm.local_size}
    try:
        cupy = importlib.import_module("cupy")
    except ImportError as error:
        return FoundGpus(**place, count=0, missing=f"CuPy cannot be imported ({error})")
    try:
        count = int(cupy.cuda.runtime.getDeviceCount())
        first = cupy.cuda.runtime.getDeviceProperties(0) if count else {}
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return FoundGpus(**place, count=0, missing=f"CUDA finds no GPU ({error})")
    identity = first.get("uuid") or (first.get("pciDomainID"), first.get("pciBusID"))
    return FoundGpus(**place, count=count, first=str(identity), missing="" if count else "CUDA finds no GPU")


def check_gpus(kind: str, found: list[FoundGpus]) -> bool:
    """Decide, from what all ranks found, whether they compute on GPUs; the same answer or error on every rank."""
    without = [rank for rank, each in enumerate(found) if each.count == 0]
    if len(without) == len(found) and kind == "auto":
        return False
    if without:
        reason = found[without[0]].missing
        some = f"device={kind!r} was asked for, and rank {without[0]} on {found[without[0]].host} has no GPU: {reason}"
        if len(without) < len(found):
            raise UsageError(f"{some}, while other ranks have one; use hosts that are alike, or --device cpu")
        if "CuPy" in reason:
            raise MissingDependency(f"{some}; install it with: {CUPY}; or use --device cpu")
        raise NotRunnable(f"{some}; check the driver with nvidia-smi and CUDA_VISIBLE_DEVICES, or use --device cpu")
    for each in found:
        if each.count >= each.local_size:
            continue
        others = [other for other in found if other.host == each.host and other.first == each.first]
        if each.count > 1 or len(others) > 1:
            raise UsageError(
                f"{each.local_size} ranks on {each.host} exceed its {each.count} GPU(s), and a GPU serves one rank; "
                f"start at most {each.count} on this host, or use --device cpu"
            )
    return True
