"""Few large messages out of many arrays: which arrays share a message, and the buckets they are copied through.

How arrays are fused follows from their shapes and dtypes alone, never from how they lie in memory: the ranks agree on the former,
and each must send the same messages. Elements travel in C order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dtrain.comm.base import Array

ALONE_BYTES = 1 * 2**20
"""From this size on an array travels alone: copying it into a bucket and back costs more than one more message does."""


class Message(NamedTuple):
    """One flat exchange: several small arrays through a bucket, or one array, which may take several parts."""

    dtype: str | None
    """dtype (a character) in which the elements travel; None: as bytes, whatever they are."""
    members: tuple[tuple[int, int, int], ...]
    """(index of the array, offset in the bucket, length), in elements of ``dtype`` or in bytes."""


def plan_messages(
    arrays: tuple[tuple[tuple[int, ...], str], ...], limit_bytes: int, travel: Mapping[str, str] | None
) -> tuple[Message, ...]:
    """Divide arrays, given by (shape, dtype), into messages. ``travel`` maps a dtype's character to the one it is summed in."""
    return _plan(arrays, limit_bytes, None if travel is None else tuple(travel.items()))


@lru_cache(maxsize=256)
def _plan(
    arrays: tuple[tuple[tuple[int, ...], str], ...], limit_bytes: int, travel: tuple[tuple[str, str], ...] | None
) -> tuple[Message, ...]:
    messages: list[Message] = []
    filling: dict[str | None, list[tuple[int, int, int]]] = {}
    for index, (shape, dtype_text) in enumerate(arrays):
        dtype = np.dtype(dtype_text)
        char = None if travel is None else dict(travel)[dtype.char]
        item = 1 if char is None else np.dtype(char).itemsize
        length = math.prod(shape) * (dtype.itemsize if char is None else 1)  # Python's integers: no count overflows
        if length == 0:
            continue
        if length * item >= min(ALONE_BYTES, limit_bytes):
            messages.append(Message(char, ((index, 0, length),)))
            continue
        members = filling.setdefault(char, [])
        offset = members[-1][1] + members[-1][2] if members else 0
        if (offset + length) * item > limit_bytes:
            messages.append(Message(char, tuple(members)))
            filling[char], offset = [], 0
        filling[char].append((index, offset, length))
    messages.extend(Message(char, tuple(members)) for char, members in filling.items() if members)
    return tuple(messages)


class Buckets:
    """Flat buffers of at most ``limit_bytes``, one a dtype, made when first needed and used again by every call."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._kept: dict[str | None, NDArray[Any]] = {}

    def exchange(self, arrays: Sequence[Array], message: Message, transfer: Callable[[NDArray[Any]], None]) -> None:
        """Run ``transfer``, which changes a flat contiguous array in place, over the arrays of one message."""
        if len(message.members) == 1:
            self._exchange_alone(arrays[message.members[0][0]], message.dtype, transfer)
            return
        _, offset, length = message.members[-1]
        bucket = self._bucket(message.dtype, offset + length)
        views = []
        for index, offset, length in message.members:
            array, part = arrays[index], bucket[offset : offset + length]
            views.append((array, (part.view(array.dtype) if message.dtype is None else part).reshape(array.shape)))
        for array, view in views:
            view[...] = array
        transfer(bucket)
        for array, view in views:
            array[...] = view

    def _exchange_alone(self, array: Array, char: str | None, transfer: Callable[[NDArray[Any]], None]) -> None:
        """A contiguous array of a dtype that can travel is changed where it lies; another one through a copy or a bucket."""
        contiguous = array.flags.c_contiguous
        flat: NDArray[Any] = (array if contiguous else np.array(array, order="C")).reshape(-1)
        dtype = flat.dtype if char is None else np.dtype(char)
        step = max(1, self.limit_bytes // dtype.itemsize)
        for start in range(0, flat.size, step):
            part = flat[start : start + step]
            if part.dtype == dtype:
                transfer(part)
            else:
                bucket = self._bucket(char, part.size)
                bucket[...] = part
                transfer(bucket)
                part[...] = bucket
        if not contiguous:
            array[...] = flat.reshape(array.shape)

    def _bucket(self, char: str | None, length: int) -> NDArray[Any]:
        kept = self._kept.get(char)
        if kept is None or kept.size < length:
            kept = self._kept[char] = np.empty(length, dtype=np.uint8 if char is None else np.dtype(char))
        return kept[:length]
