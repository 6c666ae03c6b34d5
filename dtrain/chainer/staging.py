"""Arrays of a device, carried through host memory for communicators that see host memory only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dtrain.comm import Array

Collective = Callable[[Sequence[Array]], None]
"""Changes host arrays in place, on all ranks."""


@dataclass(frozen=True, kw_only=True)
class DeviceMemory:
    """How the arrays of one array module get to the host and back."""

    xp: Any
    """The array module: ``concatenate`` is all that is used of it."""
    pinned_empty: Callable[[int, np.dtype[Any]], NDArray[Any]]
    """Make host memory for that many elements, which the device can copy to and from directly."""
    download: Callable[[Any, NDArray[Any]], None]
    """Copy a flat device array into a flat host array of its size and dtype; done when it returns."""
    upload: Callable[[NDArray[Any], Any], None]
    """Copy a flat host array into a flat device array; done when it returns."""


def cupy_memory() -> DeviceMemory:
    """CuPy's, on the current device and stream."""
    import cupy
    import cupyx

    def upload(host: NDArray[Any], device: Any) -> None:
        device.set(host)
        cupy.cuda.get_current_stream().synchronize()  # the host buffer is used again at once

    def download(device: Any, host: NDArray[Any]) -> None:
        device.get(out=host)
        cupy.cuda.get_current_stream().synchronize()

    return DeviceMemory(xp=cupy, pinned_empty=cupyx.empty_pinned, download=download, upload=upload)


class Staging:
    """Runs collectives on device arrays: one copy to the host and one back for each dtype, through buffers that are kept."""

    def __init__(self, memory: DeviceMemory) -> None:
        self._memory = memory
        self._buffers: dict[np.dtype[Any], NDArray[Any]] = {}

    def exchange(self, arrays: Sequence[Any], on_host: Sequence[Array], collective: Collective) -> None:
        """Call ``collective`` once with ``on_host`` and the contents of the device ``arrays``, which it replaces by what it made.

        Arrays may be of any shape, empty and non-contiguous ones too. What ``collective`` raises comes through, and the device
        arrays then stay as they were.
        """
        groups: dict[np.dtype[Any], list[Any]] = {}
        for array in arrays:
            groups.setdefault(np.dtype(array.dtype), []).append(array)
        flats: list[tuple[Any, NDArray[Any], list[Any]]] = []
        for dtype, members in groups.items():
            flat = self._memory.xp.concatenate([member.ravel() for member in members])
            host = self._buffer(dtype, flat.size)
            self._memory.download(flat, host)
            flats.append((flat, host, members))
        collective([*on_host, *(host for _, host, _ in flats)])
        for flat, host, members in flats:
            self._memory.upload(host, flat)
            start = 0
            for member in members:
                member[...] = flat[start : start + member.size].reshape(member.shape)
                start += member.size

    def _buffer(self, dtype: np.dtype[Any], size: int) -> NDArray[Any]:
        kept = self._buffers.get(dtype)
        if kept is None or kept.size < size:
            kept = self._buffers[dtype] = self._memory.pinned_empty(size, dtype)
        return kept[:size]
