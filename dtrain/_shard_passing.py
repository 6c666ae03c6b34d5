"""Shards on their way between hosts that share no file system: by the communicator, to the folder of rank 0 and from it.

So a checkpoint is whole where rank 0 is when it is committed, and can be read by ranks that do not see it.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from dtrain import _shards
from dtrain._shards import Array, FileRecord, Manifest, TensorRecord
from dtrain.comm.base import Communicator
from dtrain.errors import CheckpointError
from dtrain.layout import StepFolder

PIECE_BYTES = 16 << 20


def who_sees(folder: Path, comm: Communicator) -> list[bool]:
    """By rank, whether it sees what rank 0 writes into ``folder``, which is there on rank 0. Collective.

    All are taken to see it when rank 0 cannot write there: what it writes next will say why.
    """
    if comm.size == 1:
        return [True]
    token = folder / f".seen-{comm.bcast_obj(secrets.token_hex(8))}"
    if comm.rank == 0:
        with contextlib.suppress(OSError):
            token.touch()
    comm.barrier()
    seen = comm.allgather_obj(token.exists())
    if comm.rank == 0:
        token.unlink(missing_ok=True)
    return seen if seen[0] else [True] * comm.size


def holds(folder: StepFolder, manifest: Manifest) -> bool:
    """Whether this rank sees the step that has this manifest, and not another one of its name, or none."""
    try:
        return _shards.read_manifest(folder.manifest) == manifest
    except (OSError, CheckpointError):
        return False


def gather_shards(
    comm: Communicator, mine: list[bytes], passed: Mapping[int, FileRecord], folder: StepFolder, staging: Path
) -> OSError | None:
    """Write, on rank 0, the shards of the ranks in ``passed``, who give theirs as the one of ``mine``. Collective.

    Returns, on rank 0, what kept it from that: raised, the other ranks would wait for it.
    """
    trouble = None
    for rank, file in passed.items():
        pieces = _pass(comm, mine[0] if mine else b"", file.size_bytes, rank, 0)
        if comm.rank == 0:
            try:
                _shards.write_shard(folder.root / file.name, pieces, staging)
            except OSError as error:
                trouble = trouble or error
        for _ in pieces:  # on the other ranks, and what is left after trouble
            pass
    return trouble


def broadcast_tensors(comm: Communicator, records: list[TensorRecord], tensors: dict[str, Array]) -> dict[str, Array]:
    """The tensors of ``records`` on every rank, from rank 0, which has them all in ``tensors``. Collective."""
    here = {record.name: tensors.get(record.name, _empty(record)) for record in records}
    comm.broadcast_([_octets(tensor) for tensor in here.values()])
    return here


def send_tensors(comm: Communicator, records: list[TensorRecord], tensors: dict[str, Array], to: int) -> dict[str, Array]:
    """The tensors of ``records`` on rank ``to``, from rank 0, which has them in ``tensors``; else nothing. Collective."""
    sent: dict[str, Array] = {}
    for record in records:
        tensor = tensors[record.name] if comm.rank == 0 else _empty(record)
        octets = _octets(tensor)
        data = octets.tobytes() if comm.rank == 0 else b""
        for number, piece in enumerate(_pass(comm, data, octets.size, 0, to)):
            if comm.rank == to:
                octets[number * PIECE_BYTES :][: len(piece)] = np.frombuffer(piece, np.uint8)
        if comm.rank == to:
            sent[record.name] = tensor
    return sent


def _pass(comm: Communicator, data: bytes, size_bytes: int, source: int, to: int) -> Iterator[bytes]:
    """The ``data`` of rank ``source`` in pieces: on rank ``to``, on the others empty ones. Collective at each piece."""
    for start in range(0, size_bytes, PIECE_BYTES):
        pieces = comm.gather_obj(data[start : start + PIECE_BYTES] if comm.rank == source else b"", root=to)
        yield pieces[source] if pieces is not None else b""


def _empty(record: TensorRecord) -> Array:
    return np.empty(record.shape, dtype=record.dtype)


def _octets(tensor: Array) -> Array:
    """The tensor's own memory, in bytes."""
    return tensor.reshape(-1).view(np.uint8)
