"""The files of one checkpoint: their names, what is in them, and whether they are whole. No communicator, no protocol.

A shard is a safetensors file with the tensors of one rank, named ``shared/<name>`` and ``own/<name>`` in it. The manifest lists
every shard with its size and BLAKE3, and carries a BLAKE3 of itself; it is written last and a step without one does not exist.
"""

from __future__ import annotations

import heapq
import json
import logging
import os
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import blake3
import numpy as np
from numpy.typing import NDArray

from dtrain.errors import CheckpointError, WorkspaceError
from dtrain.files import fsync_folder, read_json, write_json
from dtrain.layout import StepFolder

logger = logging.getLogger(__name__)

Array = NDArray[np.generic]
Kind = Literal["shared", "own"]

FORMAT = "dtrain-checkpoint"
VERSION = 1
_INTEGERS = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")
DTYPES = ("bool", *_INTEGERS, "float16", "float32", "float64", "complex64")
"""What a safetensors file can hold."""
VISIBLE_WITHIN_S = 10.0
"""How long rank 0 looks for the other ranks' files: a network file system may show them late."""

_SHARD = re.compile(r"rank-\d{5,}(?:\.(\d+))?\.safetensors")
_LEFTOVER = re.compile(rf"\.{_SHARD.pattern}\.tmp|\.manifest\.json\..*\.tmp|\.manifest\.json\.retired")


@dataclass(frozen=True, kw_only=True)
class TensorRecord:
    """Where one tensor lies."""

    name: str
    kind: Kind
    rank: int | None
    """The rank that an own tensor belongs to; None for a shared one."""
    dtype: str
    shape: tuple[int, ...]
    """Global shape; a tensor is never cut."""
    file: str
    byte_range: tuple[int, int]
    """First byte in the file, and the one after the last."""


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    name: str
    size_bytes: int
    blake3: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a committed step consists of."""

    step: int
    world_size: int
    attempt: int
    time: float
    """When it was committed, in seconds since 1970."""
    tensors: list[TensorRecord]
    files: list[FileRecord]
    meta: str
    """JSON text, not JSON: NaN, infinity and integers beyond 64 bits (states of random generators) come back exactly."""
    own_meta: list[str]
    """By rank, likewise."""


Written = tuple[FileRecord, list[TensorRecord]]
"""What one rank wrote: its file, and where each tensor lies in it."""


def check_tensors(kind: Kind, tensors: Mapping[str, Array]) -> dict[str, Array]:
    """Return the tensors in C order and native byte order, or raise CheckpointError that names the one that cannot be saved."""
    checked: dict[str, Array] = {}
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not _is_text(name):
            raise CheckpointError(f"{kind} tensor name {name!r} is not allowed; use text that can be encoded as UTF-8")
        if not isinstance(tensor, (np.ndarray, np.generic)):
            raise CheckpointError(f"{kind} tensor {name!r} is a {type(tensor).__name__}, not a numpy.ndarray; copy it first")
        native = tensor.dtype.newbyteorder("=")
        if native.name not in DTYPES:
            raise CheckpointError(f"{kind} tensor {name!r} has dtype {tensor.dtype}; a checkpoint holds {', '.join(DTYPES)}")
        checked[name] = np.asarray(tensor, dtype=native, order="C")
    return checked


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def encode_meta(kind: str, value: Any) -> str:
    """``value`` as JSON text; raises CheckpointError for what JSON cannot hold."""
    try:
        return json.dumps(value, default=_encode_scalar)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{kind} cannot be saved ({error}); use dicts, lists, text, numbers, booleans and None") from error


def _encode_scalar(value: object) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"it holds a {type(value).__name__}")


def assign_tensors(sizes_bytes: Mapping[str, int], ranks: int) -> dict[str, int]:
    """The rank that writes each shared tensor: the largest first, each to the rank with least so far; the same on all ranks."""
    loads = [(0, rank) for rank in range(ranks)]
    assigned: dict[str, int] = {}
    for name in sorted(sizes_bytes, key=lambda name: (-sizes_bytes[name], name)):
        load, rank = heapq.heappop(loads)
        assigned[name] = rank
        heapq.heappush(loads, (load + sizes_bytes[name], rank))
    return assigned


def make_shard(name: str, rank: int, shared: Mapping[str, Array], own: Mapping[str, Array]) -> tuple[bytes, Written]:
    """The content of the file ``name`` with one rank's tensors, and what the manifest says of it. Raises CheckpointError.

    It is made in memory (as much again as its tensors take): its hash is then of what was meant to be written, and a full disk
    shows as an OSError of an ordinary write.
    """
    import safetensors.numpy  # foreign, and not needed to read a manifest

    tensors = {f"shared/{key}": array for key, array in shared.items()} | {f"own/{key}": array for key, array in own.items()}
    try:
        data = safetensors.numpy.save(tensors)
    except safetensors.SafetensorError as error:  # names that make a header of more than 100 MB, say
        raise CheckpointError(f"{name} cannot be made: {error}") from error
    record = FileRecord(name=name, size_bytes=len(data), blake3=blake3.blake3(data).hexdigest())
    header_bytes = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + header_bytes])
    return data, (record, [_describe(key, array, rank, name, header[key], 8 + header_bytes) for key, array in tensors.items()])


def write_shard(path: Path, pieces: Iterable[bytes], staging: Path) -> None:
    """Write a shard to ``path``: in ``staging``, synced, moved to its place, sync of the folder. Raises OSError."""
    temporary = staging / f".{path.name}.tmp"
    with open(temporary, "wb") as file:
        for piece in pieces:
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    fsync_folder(path.parent)


def _describe(key: str, array: Array, rank: int, file: str, entry: Mapping[str, Any], base: int) -> TensorRecord:
    kind, _, name = key.partition("/")
    start, stop = entry["data_offsets"]
    shared = kind == "shared"
    return TensorRecord(
        name=name,
        kind="shared" if shared else "own",
        rank=None if shared else rank,
        dtype=array.dtype.name,
        shape=array.shape,
        file=file,
        byte_range=(base + start, base + stop),
    )


def write_manifest(folder: StepFolder, manifest: Manifest, staging: Path) -> None:
    """Commit the step: from here on it exists. Raises OSError; the step is then what it was before."""
    body = {"format": FORMAT, "version": VERSION, **asdict(manifest)}
    write_json(folder.manifest, {**body, "blake3": _digest(body)}, staging)


def _digest(body: Mapping[str, Any]) -> str:
    return blake3.blake3(json.dumps(body, sort_keys=True).encode()).hexdigest()


def read_manifest(path: Path) -> Manifest:
    """Read a manifest and check it against its own hash. Raises CheckpointError when it is damaged, or OSError."""
    try:
        body = read_json(path)
    except WorkspaceError as error:
        raise CheckpointError(str(error)) from error
    if not isinstance(body, dict) or body.pop("blake3", None) != _digest(body):
        raise CheckpointError(f"{path} is damaged: its content does not have the BLAKE3 that it states")
    if body.pop("format") != FORMAT or body.pop("version") != VERSION:
        raise CheckpointError(f"{path} is of another format than {FORMAT} {VERSION}; a newer dtrain may have written it")
    tensors = [TensorRecord(**_tuples(entry)) for entry in body.pop("tensors")]
    files = [FileRecord(**entry) for entry in body.pop("files")]
    foreign = [file.name for file in files if not _SHARD.fullmatch(file.name)]
    step = StepFolder(path.parent).step
    if foreign or step not in (None, body["step"]):
        raise CheckpointError(f"{path} does not belong here: it is of step {body['step']}, files {[f.name for f in files]}")
    return Manifest(tensors=tensors, files=files, **body)


def _tuples(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}


def check_file(path: Path, record: FileRecord) -> str | None:
    """What is wrong with a shard, or None. Read, not mapped: a failing disk is an error here, and not a SIGBUS."""
    hasher = blake3.blake3()
    size_bytes = 0
    try:
        with open(path, "rb", buffering=0) as file:
            buffer = memoryview(bytearray(4 * 2**20))
            while count := file.readinto(buffer):
                hasher.update(buffer[:count])
                size_bytes += count
    except OSError as error:
        return f"{path}: {error.strerror}"
    if size_bytes != record.size_bytes:
        return f"{path} has {size_bytes} bytes, and had {record.size_bytes} when it was written"
    if hasher.hexdigest() != record.blake3:
        return f"{path} has changed since it was written (its BLAKE3 differs)"
    return None


def check_files(folder: StepFolder, files: list[FileRecord]) -> None:
    """Raise CheckpointError with all that is wrong with some files of a step."""
    problems = [problem for file in files if (problem := check_file(folder.root / file.name, file))]
    if problems:
        raise CheckpointError("; ".join(problems))


def read_tensors(folder: StepFolder, records: Iterable[TensorRecord]) -> dict[str, Array]:
    """Read tensors into new arrays; raises OSError, and CheckpointError when a file ends too early."""
    by_file: dict[str, list[TensorRecord]] = {}
    found: dict[str, Array | None] = {}
    for record in records:
        by_file.setdefault(record.file, []).append(record)
        found[record.name] = None  # keeps the manifest's order
    for file_name, members in by_file.items():
        path = folder.root / file_name
        with open(path, "rb") as file:
            for record in members:
                tensor = np.empty(record.shape, dtype=record.dtype)
                start, stop = record.byte_range
                file.seek(start)
                if stop - start != tensor.nbytes or file.readinto(tensor.reshape(-1).view(np.uint8).data) != tensor.nbytes:
                    raise CheckpointError(f"{path} ends before tensor {record.name!r} does")
                found[record.name] = tensor
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def prepare_step(folder: StepFolder) -> int:
    """Make the folder of a step, or clear it: see :func:`clear_leftovers`."""
    folder.root.mkdir(parents=True, exist_ok=True)
    return clear_leftovers(folder)


def wait_visible(folder: StepFolder, files: list[FileRecord]) -> None:
    """Raise CheckpointError unless this rank sees these files of a step, whole, in time."""
    give_up = time.monotonic() + VISIBLE_WITHIN_S
    while missing := [f.name for f in files if not _has_size(folder.root / f.name, f.size_bytes)]:
        if time.monotonic() > give_up:
            raise CheckpointError(f"rank 0 does not see {', '.join(missing)} in {folder.root}, which the ranks wrote there")
        time.sleep(0.1)


def _has_size(path: Path, size_bytes: int) -> bool:
    try:
        return path.stat().st_size == size_bytes
    except FileNotFoundError:
        return False


def clear_leftovers(folder: StepFolder) -> int:
    """Remove what an interrupted save left here and return the generation of file names that a new save may use.

    Files that the manifest names and files that are not ours stay. A manifest that is damaged goes: its step is lost already.
    """
    kept: set[str] = set()
    if folder.manifest.is_file():
        try:
            kept = {file.name for file in read_manifest(folder.manifest).files}
        except CheckpointError:
            folder.manifest.unlink()
            fsync_folder(folder.root)
    for path in folder.root.iterdir():
        if path.name not in kept and (_SHARD.fullmatch(path.name) or _LEFTOVER.fullmatch(path.name)):
            path.unlink()
    generations = [int(match[1] or 0) for name in kept if (match := _SHARD.fullmatch(name))]
    return max(generations, default=-1) + 1


def remove_step(folder: StepFolder) -> None:
    """Delete a committed step: first it stops counting, then the files its manifest names go, then the folder if it is empty.

    May be called again for one that was interrupted. Raises OSError, and CheckpointError when its manifest is damaged; it is
    then left as it is.
    """
    if folder.manifest.is_file():
        read_manifest(folder.manifest)
        os.replace(folder.manifest, folder.retired)
        fsync_folder(folder.root)
    # The folder's name is checked against the manifest here, too, since the retired name has the same parent.
    for file in read_manifest(folder.retired).files:
        (folder.root / file.name).unlink(missing_ok=True)
    folder.retired.unlink()
    remove_if_empty(folder)


def remove_if_empty(folder: StepFolder) -> None:
    try:
        folder.root.rmdir()
    except OSError:
        return  # a file that is not ours keeps it
    fsync_folder(folder.root.parent)


def undo_step(folder: StepFolder) -> None:
    """Remove what a save that failed has written. Trouble is only warned about: without a manifest the step does not exist, and
    the next save of it clears the folder."""
    try:
        clear_leftovers(folder)
        remove_if_empty(folder)
    except OSError as error:
        logger.warning("files of an incomplete checkpoint stay in %s: %s", folder.root, error)


def explain_difference(step: int, by_rank: list[dict[str, tuple[tuple[int, ...], str]]]) -> str:
    """Why a step is not saved: the first shared tensor that is not the same, by its shape and dtype on each rank."""
    for name in dict.fromkeys(name for tensors in by_rank for name in tensors):
        seen = [tensors.get(name) for tensors in by_rank]
        if len(set(seen)) > 1:
            told = ", ".join(f"rank {rank}: {'absent' if s is None else f'{s[0]} {s[1]}'}" for rank, s in enumerate(seen))
            return f"step {step} is not saved: shared tensor {name!r} is not the same on all ranks ({told}); pass it as own"
    raise AssertionError("the ranks' tensors have different digests, but are the same")
