"""The copy of the source folder in which the ranks of a run work."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dtrain.errors import UsageError
from dtrain.layout import Workspace

if TYPE_CHECKING:
    import pathspec

IGNORE_FILES = (".dtrainignore", ".amlignore", ".gitignore")
MAX_BYTES = 300_000_000
MAX_FILES = 2_000
# Counting goes on after the limits to name the biggest files, but not for ever: the folder may be somebody's home.
_MAX_COUNTED = 50_000
_NEVER = frozenset({".git", ".hg", ".svn", "__pycache__", ".ipynb_checkpoints"})
# These lead to the run's own folders, so that what a script writes to ./outputs and ./logs is kept.
_OF_THE_RUN = frozenset({"outputs", "logs"})


@dataclass(frozen=True)
class SnapshotFile:
    path: str
    """Relative to the source folder, with ``/``."""
    size_bytes: int
    is_link: bool


def list_files(source: Path, *, excluded: Path | None = None) -> list[SnapshotFile]:
    """The files of a snapshot of ``source``, sorted by path.

    Left out are what ``.dtrainignore`` names (else ``.amlignore``, else ``.gitignore``; git's patterns; the one in ``source``
    itself), version control's folders, Python's caches, virtual environments, the ``excluded`` workspace and any other, and
    ``outputs`` and ``logs`` at the top. Raises UsageError beyond 300 MB or 2,000 files, naming the ten biggest, and for a file or
    folder that cannot be read.
    """
    ignore_file = next((source / name for name in IGNORE_FILES if (source / name).is_file()), None)
    lines = ignore_file.read_text(errors="replace").splitlines() if ignore_file else []
    spec = _patterns(lines) if lines else None
    files: list[SnapshotFile] = []
    # The workspace may be the source folder itself: then its parts are left out.
    parts = () if excluded is None else (excluded, Workspace(excluded).runs, Workspace(excluded).registry)
    for found in _walk(source, source, spec, frozenset(part.resolve() for part in parts)):
        files.append(found)
        if len(files) >= _MAX_COUNTED:
            break
    total_bytes = sum(file.size_bytes for file in files)
    if len(files) > MAX_FILES or total_bytes > MAX_BYTES:
        raise UsageError(_too_big(source, files, total_bytes, ignore_file))
    return sorted(files, key=lambda file: file.path)


def _patterns(lines: list[str]) -> pathspec.GitIgnoreSpec:
    import pathspec  # 10 ms, which a folder without an ignore file need not wait for

    return pathspec.GitIgnoreSpec.from_lines(lines)


def _walk(folder: Path, source: Path, spec: pathspec.GitIgnoreSpec | None, excluded: frozenset[Path]) -> Iterator[SnapshotFile]:
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        raise _unreadable(error) from error
    for entry in entries:
        path = Path(entry.path)
        relative = path.relative_to(source).as_posix()
        is_folder = entry.is_dir(follow_symlinks=False)
        if entry.name in _NEVER or relative in _OF_THE_RUN:
            continue
        if spec is not None and spec.match_file(relative + "/" if is_folder else relative):
            continue
        if is_folder:
            if path.resolve() not in excluded and not (path / "pyvenv.cfg").exists() and not Workspace(path).list_runs():
                yield from _walk(path, source, spec, excluded)
        elif entry.is_symlink() or entry.is_file():
            is_link = entry.is_symlink()
            yield SnapshotFile(relative, 0 if is_link else entry.stat().st_size, is_link)


def _too_big(source: Path, files: list[SnapshotFile], total_bytes: int, ignore_file: Path | None) -> str:
    biggest = sorted(files, key=lambda file: file.size_bytes, reverse=True)[:10]
    listing = "".join(f"\n  {file.size_bytes / 1e6:10.1f} MB  {file.path}" for file in biggest)
    count = f"{len(files):,}" if len(files) < _MAX_COUNTED else f"more than {_MAX_COUNTED:,}"
    return (
        f"the folder {source} has {count} files, {total_bytes / 1e6:,.0f} MB; a run keeps a copy of it, of at most "
        f"{MAX_FILES:,} files and {MAX_BYTES // 1_000_000} MB. Name what the script does not need in "
        f"{ignore_file or source / IGNORE_FILES[0]} (git's patterns; data can be reached by an absolute path or a link), or "
        f"copy another folder with --source. The biggest:{listing}"
    )


def _unreadable(error: OSError) -> UsageError:
    return UsageError(
        f"{error.filename} cannot be read ({error.strerror}), and a run keeps a copy of its source; name it in "
        f"{IGNORE_FILES[0]} when the script does not need it"
    )


def take_snapshot(source: Path, destination: Path, *, excluded: Path | None = None) -> list[SnapshotFile]:
    """Copy the snapshot's files into ``destination``, which exists, and return them.

    A symbolic link stays one; where it leads out of ``source``, the copy leads to the same place by its absolute path.
    Raises UsageError as :func:`list_files`, and OSError when the copy cannot be written.
    """
    files = list_files(source, excluded=excluded)
    for file in files:
        target = destination / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.is_link:
            link = source / file.path
            leads_to = link.resolve()
            inside = leads_to.is_relative_to(source.resolve()) and not Path(os.readlink(link)).is_absolute()
            target.symlink_to(os.readlink(link) if inside else leads_to)
            continue
        try:
            original = open(source / file.path, "rb")  # noqa: SIM115  (opened apart, to tell trouble here from trouble there)
        except OSError as error:
            raise _unreadable(error) from error
        with original, open(target, "wb") as copy:
            shutil.copyfileobj(original, copy, 1 << 20)
        shutil.copystat(source / file.path, target)
    return files
