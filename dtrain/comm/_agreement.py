"""What the ranks must agree on before arrays are exchanged, and how a disagreement is told.

Every communicator describes a call by a :class:`CallSignature`. A rank whose own arrays cannot be exchanged puts the reason
into its signature instead of raising: it would otherwise leave the other ranks waiting in a collective for ever.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

MAX_TOLD = 5  # differing arrays that one message lists


class CallSignature(NamedTuple):
    """One rank's view of one collective call on arrays; equal on all ranks or the call is refused."""

    operation: str
    arrays: tuple[tuple[tuple[int, ...], str], ...]
    """(shape, dtype) of each array; the dtype as NumPy's ``dtype.str``, byte order included."""
    refusal: str | None = None
    """Why this rank's arrays cannot be exchanged at all."""

    def digest(self) -> int:
        """A 62-bit number, the same in every process for the same call (Python's own ``hash`` of text is not)."""
        text = repr(tuple(self)).encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 2


def sign_mean(arrays: Sequence[Any]) -> CallSignature:
    """Describe ``allreduce_mean_(arrays)``: float16, float32 and float64 only."""
    return _sign("allreduce_mean_", arrays, "efd", "allreduce_mean_ takes float16, float32 and float64")


def sign_broadcast(arrays: Sequence[Any], root: int, size: int) -> CallSignature:
    """Describe ``broadcast_(arrays, root)``: every boolean, integer, float and complex dtype."""
    signature = _sign(f"broadcast_(root={root})", arrays, "?bBhHiIlLqQefdgFDG", "broadcast_ takes booleans and numbers")
    if not 0 <= root < size:
        return signature._replace(refusal=f"root={root} is not a rank; ranks are 0 to {size - 1}")
    return signature


def _sign(operation: str, arrays: Sequence[Any], allowed: str, allowed_text: str) -> CallSignature:
    if isinstance(arrays, np.ndarray):
        return CallSignature(operation, (), "a single array was passed; pass a list of arrays")
    described: list[tuple[tuple[int, ...], str]] = []
    for index, array in enumerate(arrays):
        if not isinstance(array, np.ndarray):
            reason = f"array {index} is a {type(array).__name__}, not a numpy.ndarray; copy it to one first"
            return CallSignature(operation, (), reason)
        dtype = array.dtype
        if dtype.char not in allowed:
            return CallSignature(operation, (), f"array {index} has dtype {dtype}; {allowed_text}")
        if not array.flags.writeable:
            return CallSignature(operation, (), f"array {index} is read-only, and is to be changed in place; pass a copy")
        described.append((array.shape, dtype.str))
    return CallSignature(operation, tuple(described))


def explain_disagreement(signatures: Sequence[CallSignature]) -> str:
    """The message for signatures (by rank) that are not all the same, or of which some are refused."""
    refused = _group((s.refusal, rank) for rank, s in enumerate(signatures) if s.refusal is not None)
    if refused:
        operation = next(s.operation for s in signatures if s.refusal is not None)
        return f"{operation} refused on all ranks: " + "; ".join(f"{ranks}: {reason}" for reason, ranks in refused)
    operations = _group((s.operation, rank) for rank, s in enumerate(signatures))
    if len(operations) > 1:
        told = "; ".join(f"{ranks} called {operation}" for operation, ranks in operations)
        return f"the ranks called different collectives: {told}; every rank must make the same calls in the same order"
    counts = _group((len(s.arrays), rank) for rank, s in enumerate(signatures))
    problems = [] if len(counts) == 1 else ["; ".join(f"{ranks} passed {count} arrays" for count, ranks in counts)]
    for index in range(min(len(s.arrays) for s in signatures)):
        variants = _group((s.arrays[index], rank) for rank, s in enumerate(signatures))
        if len(variants) > 1:
            told = ", ".join(f"{_describe(*array)} on {ranks}" for array, ranks in variants)
            problems.append(f"array {index} is {told}")
    more = [f"and {len(problems) - MAX_TOLD} more"] if len(problems) > MAX_TOLD else []
    advice = "pass arrays of the same shapes and dtypes in the same order on every rank"
    return f"{signatures[0].operation}: the ranks' arrays differ: " + "; ".join([*problems[:MAX_TOLD], *more]) + f"; {advice}"


def name_ranks(ranks: Sequence[int]) -> str:
    """``rank 3`` or ``ranks 0-2, 5``: ranks in rising order, runs of them folded."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][-1] == rank - 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    told = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"rank {told}" if len(ranks) == 1 else f"ranks {told}"


def _group(items: Iterable[tuple[Any, int]]) -> list[tuple[Any, str]]:
    found: dict[Any, list[int]] = {}
    for value, rank in items:
        found.setdefault(value, []).append(rank)
    return [(value, name_ranks(ranks)) for value, ranks in found.items()]


def _describe(shape: tuple[int, ...], dtype: str) -> str:
    return f"{shape} {np.dtype(dtype)}"
