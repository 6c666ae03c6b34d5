"""The registry's files: where they lie, how a blob gets in and out, and how a number is claimed. No locks.

Everything is written under a random name in ``incoming/``, synced, and only then given its name in one step. A writer
that dies at any point leaves at most files in ``incoming/`` and blobs that no record names; neither is ever read.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from blake3 import blake3

from dtrain.errors import RegistryError
from dtrain.files import fsync_folder, link_new
from dtrain.registry.records import VERSION_PATTERN, seal

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class RegistryLayout:
    """The names of the registry's files and folders; nothing else in the registry joins them."""

    root: Path

    @property
    def incoming(self) -> Path:
        """Files without a name yet; not in the folder of their later name, because a blob has one only when it is copied."""
        return self.root / "incoming"

    @property
    def models(self) -> Path:
        return self.root / "models"

    @property
    def blobs(self) -> Path:
        return self.root / "blobs"

    def blob(self, digest: str) -> Path:
        return self.blobs / digest[:2] / digest

    def versions(self, name: str) -> Path:
        """The folder of a model's records, ``<N>.json`` each."""
        return self.models / name

    def record(self, name: str, version: int) -> Path:
        return self.versions(name) / f"{version}.json"

    def deleted(self, name: str) -> Path:
        """The folder of what is left of a model's deleted versions, ``<N>.json`` each: their numbers, which stay taken."""
        return self.root / "deleted" / name

    def tombstone(self, name: str, version: int) -> Path:
        return self.deleted(name) / f"{version}.json"

    def model_events(self, name: str) -> Path:
        return self.root / "events" / name

    def events(self, name: str, version: int) -> Path:
        """The folder of a version's tag events, ``<N>.json`` each, in the order of their numbers."""
        return self.model_events(name) / str(version)

    def event(self, name: str, version: int, number: int) -> Path:
        return self.events(name, version) / f"{number}.json"


class BlobError(RegistryError):
    """A blob that is absent, unreadable or not what its name says; the message names its file."""


@dataclass(frozen=True)
class Blob:
    blake3: str
    size_bytes: int


class BlobStore:
    """Content-addressed files: ``blobs/<2 hex>/<BLAKE3>``, read-only, shared by all versions."""

    def __init__(self, layout: RegistryLayout) -> None:
        self._layout = layout

    def add_all(self, sources: Iterable[Path]) -> list[Blob]:
        """Copy the files in; on return they are durable. Blocks. Raises RegistryError (a source), OSError (the registry)."""
        blobs = [self._add(source) for source in sources]
        for folder in {self._layout.blob(blob.blake3).parent for blob in blobs}:
            fsync_folder(folder)
        fsync_folder(self._layout.blobs)
        fsync_folder(self._layout.root)
        return blobs

    def _add(self, source: Path) -> Blob:
        with _incoming(self._layout) as (temporary, file):
            blob = _copy_unchanging(source, file)
            target = self._layout.blob(blob.blake3)
            try:
                # An older blob of this name is reused only after reading all of it: one that rotted would make the new
                # version worthless. The good copy is at hand, so a bad blob is replaced, which mends older versions too.
                for _ in self.read(blob):
                    pass
            except BlobError:
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(temporary, target)
        return blob

    def restore_missing(self, pairs: Iterable[tuple[Path, Blob]]) -> None:
        """Copy in again what was removed since :meth:`add_all`: a version with the same files may have been deleted meanwhile.

        To be called when the new version's record is there. Raises as :meth:`add_all` does.
        """
        for source, blob in pairs:
            if not self._layout.blob(blob.blake3).exists() and self._add(source) != blob:
                raise RegistryError(f"{source} changed while it was registered; register it again when nothing writes to it")

    def remove(self, digests: set[str], used: Callable[[], set[str]]) -> None:
        """Remove those of these blobs that no record names, as ``used()`` tells. Blocks. Raises OSError.

        No version loses one that comes meanwhile: blobs are put aside before it is asked for the last time who uses them, and a
        new version looks for its own when its record is there (:meth:`restore_missing`).
        """
        aside: dict[str, Path] = {}
        self._layout.incoming.mkdir(parents=True, exist_ok=True)
        for digest in digests - used():
            path = self._layout.incoming / f"{os.getpid()}-{secrets.token_hex(8)}"
            with suppress(FileNotFoundError):
                os.replace(self._layout.blob(digest), path)
                aside[digest] = path
        still_used = used()
        for digest, path in aside.items():
            if digest in still_used:
                os.replace(path, self._layout.blob(digest))
            else:
                path.unlink()

    def read(self, blob: Blob) -> Iterator[memoryview]:
        """The blob's bytes, in pieces that are valid until the next is asked for; after the last they are known to be good.

        Raises BlobError, at the end at the latest, unless size and BLAKE3 are right. Never writes.
        """
        path = self._layout.blob(blob.blake3)
        digest, size_bytes = blake3(), 0
        try:
            with open(path, "rb", buffering=0) as file:
                for piece in _pieces(file):
                    digest.update(piece)
                    size_bytes += len(piece)
                    yield piece
        except FileNotFoundError as error:
            raise BlobError(f"blob {path} is absent") from error
        except OSError as error:
            raise BlobError(f"blob {path} cannot be read: {error.strerror}") from error
        if digest.hexdigest() != blob.blake3:
            raise BlobError(
                f"blob {path} is damaged: expected BLAKE3 {blob.blake3}, found {digest.hexdigest()} ({size_bytes} bytes)"
            )
        if size_bytes != blob.size_bytes:
            raise BlobError(f"blob {path} has {size_bytes} bytes where the record says {blob.size_bytes}")


def _pieces(file: Any) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(CHUNK_BYTES))
    while count := file.readinto(buffer):
        yield buffer[:count]


def _copy_unchanging(source: Path, target: BinaryIO) -> Blob:
    """Copy and hash ``source`` in one pass, and sync the copy. Raises RegistryError when the source changed meanwhile."""
    digest, size_bytes = blake3(), 0
    for piece in _unchanging(source):
        digest.update(piece)
        size_bytes += len(piece)
        target.write(piece)
    target.flush()
    os.fsync(target.fileno())
    return Blob(digest.hexdigest(), size_bytes)


def _unchanging(source: Path) -> Iterator[memoryview]:
    """The pieces of a regular file; raises RegistryError, not OSError, so that a source is not taken for the registry."""
    size_bytes = 0
    try:
        with open(source, "rb", buffering=0, opener=_open_no_link) as file:
            before = os.fstat(file.fileno())
            if not stat.S_ISREG(before.st_mode):
                raise RegistryError(f"{source} is not a regular file; only files can be registered")
            pieces = _pieces(file)
            while (piece := next(pieces, None)) is not None:
                size_bytes += len(piece)
                yield piece
        after = os.stat(source, follow_symlinks=False)
    except OSError as error:
        raise RegistryError(f"{source} cannot be read: {error.strerror}") from error
    if size_bytes != before.st_size or _identity(before) != _identity(after):
        raise RegistryError(f"{source} changed while it was copied; wait until nothing writes to it, then register again")


def _open_no_link(path: str, flags: int) -> int:
    # The path was resolved; if a link stands there now, somebody has put it there since.
    return os.open(path, flags | os.O_NOFOLLOW)


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


@contextmanager
def _incoming(layout: RegistryLayout) -> Iterator[tuple[Path, BinaryIO]]:
    """A new file in ``incoming/``, open for writing but of mode 0444 less the umask; its name there goes at the end."""
    layout.incoming.mkdir(parents=True, exist_ok=True)
    path = layout.incoming / f"{os.getpid()}-{secrets.token_hex(8)}"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444)
    try:
        with open(descriptor, "wb") as file:
            yield path, file
    finally:
        path.unlink(missing_ok=True)


def numbers_in(folder: Path, suffix: str = ".json") -> list[int]:
    """The N of all ``<N><suffix>`` in the folder, ascending; none when there is no such folder."""
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    stems = [name.removesuffix(suffix) for name in names if name.endswith(suffix)]
    return sorted(int(stem) for stem in stems if VERSION_PATTERN.fullmatch(stem))


def claim_next(
    layout: RegistryLayout,
    folder: Path,
    body_of: Callable[[int], Mapping[str, Any]],
    above: Callable[[], int] = lambda: 0,
    is_spent: Callable[[int], bool] = lambda number: False,
) -> int:
    """Write ``body_of(N)`` as ``folder/<N>.json``, N being the first free number after all that are there, and ``above()``.

    ``is_spent(N)`` says that N was taken and given up meanwhile, by others, and is not to be used again.

    Versions and tag events are both claimed so: the finished, synced file gets its name by ``os.link``, which fails when
    the name is taken, on network file systems too. (An ``O_APPEND`` log would be shorter, but NFS clients find the end of the
    file themselves, and two of them overwrite each other; names made of clocks would order events by whose clock is fast.)
    On return the file is durable. Raises OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    while True:
        # What was given up is noted before it goes, and so has to be looked for after what is there.
        number = max([number, *numbers_in(folder), above()]) + 1
        target = folder / f"{number}.json"
        with _incoming(layout) as (temporary, file):
            file.write(seal(body_of(number)))
            file.flush()
            os.fsync(file.fileno())
            if not link_new(temporary, target):
                continue
        if is_spent(number):
            target.unlink(missing_ok=True)
            continue
        # Up to the root, because another writer may have made one of these folders and not have synced it yet.
        while folder != layout.root.parent:
            fsync_folder(folder)
            folder = folder.parent
        return number


@contextmanager
def explain_errors(what: str) -> Iterator[None]:
    """Turn an OSError into a RegistryError that begins with ``what`` (a sentence without its end) and says what to do."""
    try:
        yield
    except OSError as error:
        advice = {
            errno.ENOSPC: "; free some space there, or choose another place",
            errno.EDQUOT: "; free some space there, or choose another place",
            errno.EACCES: "; you need writing rights there, or choose another place",
            errno.EROFS: "; it is mounted read-only: choose another place",
            errno.EPERM: "; writing rights are missing, or its file system has no hard links, which the registry needs",
            errno.EOPNOTSUPP: "; its file system has no hard links, which the registry needs: choose another place",
        }.get(error.errno or 0, "")
        raise RegistryError(f"{what}: {error.strerror or error}{advice}") from error
