"""What is in a run folder, and how it goes from host to host: as a tar stream, whose last member says that it is whole."""

from __future__ import annotations

import os
import shutil
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from dtrain.layout import RunLayout

_LAST = ".dtrain-all-of-it"
_CHUNK = 1 << 20

Stat = tuple[int, int]
"""Size in bytes and time of the last change in nanoseconds; of a folder, which is there or not, zeros."""


def names(run: RunLayout, below: str = "") -> Iterator[str]:
    """All files and folders of a run, or those ``below`` one, relative to it. A folder comes before what is in it, and the
    manifest of a checkpoint after all else: without it a step does not exist.

    Not those of one host alone: the ranks' folders, what is still being written, what Python makes again.
    """
    relative = [str(path.relative_to(run.root)) for path in _walk(run.root / below, run)]
    yield from sorted(relative, key=lambda name: (name.endswith("/manifest.json"), name))


def stat(path: Path) -> Stat | None:
    """None when there is nothing."""
    try:
        status = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return (0, 0) if path.is_dir() and not path.is_symlink() else (status.st_size, status.st_mtime_ns)


def pack(stream: IO[bytes], base: Path, members: Iterable[str]) -> None:
    """Write files, folders and links, named relative to ``base``. Raises OSError."""
    with tarfile.open(fileobj=stream, mode="w|", bufsize=_CHUNK, format=tarfile.PAX_FORMAT) as archive:
        for name in members:
            member = archive.gettarinfo(base / name, arcname=name)
            if member is None or not (member.isreg() or member.isdir() or member.issym() or member.islnk()):
                continue  # a socket, say
            if member.islnk():  # to a file that went before: as a file of its own
                member.type, member.size = tarfile.REGTYPE, (base / name).stat().st_size
            if not member.isreg():
                archive.addfile(member)
                continue
            with open(base / name, "rb") as file:
                archive.addfile(member, file)
        archive.addfile(tarfile.TarInfo(_LAST))


def unpack(stream: IO[bytes], base: Path, made: list[Path]) -> None:
    """Make what :func:`pack` wrote below ``base``; what is there already is left as it is. ``made`` is told what was made.

    Raises OSError: also when the stream ends before its end, or holds something else.
    """
    try:
        with tarfile.open(fileobj=stream, mode="r|", bufsize=_CHUNK) as archive:
            for member in archive:
                if member.name == _LAST:
                    return
                path = Path(os.path.normpath(base / member.name))
                if not path.is_relative_to(base):
                    raise OSError(f"a file {member.name!r} came, which would not be in {base}")
                if not os.path.lexists(path):
                    _make(archive, member, path, made)
    except tarfile.TarError as error:
        raise OSError(f"what came is not whole ({error})") from error
    raise OSError("the connection ended before all had come")


def _make(archive: tarfile.TarFile, member: tarfile.TarInfo, path: Path, made: list[Path]) -> None:
    made += [folder for folder in reversed(path.parents) if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    made.append(path)
    if member.isdir():
        path.mkdir()
    elif member.issym():
        path.symlink_to(member.linkname)
    else:
        content = archive.extractfile(member)
        assert content is not None
        with open(path, "wb") as file:
            shutil.copyfileobj(content, file, _CHUNK)
        path.chmod(member.mode & 0o777)
        os.utime(path, (member.mtime, member.mtime))


def _walk(folder: Path, run: RunLayout) -> Iterator[Path]:
    """Everything below a folder; links are not followed."""
    for entry in os.scandir(folder):
        if entry.name == "__pycache__" or run.is_of_one_host(path := Path(entry.path)):
            continue
        yield path
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(path, run)
