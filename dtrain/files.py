"""Files that are whole or absent, and JSON in them."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import orjson

from dtrain.errors import WorkspaceError


def open_anew(folder: Path) -> None:
    """See what other hosts have made in a folder since. Raises OSError.

    A network file system believes for up to a minute that a file is absent for which it was asked before, unless its folder is
    opened anew (nfs(5), acdirmin). It is not listed: it may hold thousands.
    """
    os.close(os.open(folder, os.O_RDONLY | os.O_CLOEXEC))


def link_new(written: Path, target: Path) -> bool:
    """Give a finished file another name, by which it appears whole; False, and nothing is done, where that name is taken."""
    try:
        os.link(written, target)
    except FileExistsError:
        # NFS repeats a request whose answer was lost: the name that exists may be the one that was just made.
        with contextlib.suppress(FileNotFoundError):  # one was deleted meanwhile
            return os.path.samefile(written, target)
        return False
    return True


def fsync_folder(folder: Path) -> None:
    """Make the folder's own entries (a rename, a new file) durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_file(path: Path, staging: Path | None = None, *, durable: bool = True) -> Iterator[IO[bytes]]:
    """A file to write that replaces ``path`` when the block ends, whole and durable: a reader sees the old file or the new one.

    When the block raises, or the file cannot be written (OSError: disk full, no permission), the old file is untouched and no
    temporary file is left. ``staging`` is a folder of the same file system to write it in; None: beside ``path``. Without
    ``durable`` it may be lost with the machine's power, and with nothing less: for records that nobody needs after that.
    """
    name = (staging or path.parent) / f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp"
    descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):  # gone with its folder
            os.unlink(name)
        raise
    if durable:
        fsync_folder(path.parent)


def atomic_write(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data`` as :func:`atomic_file` does."""
    with atomic_file(path) as file:
        file.write(data)


def write_json(path: Path, value: Any, staging: Path | None = None, *, durable: bool = True) -> None:
    """Write ``value`` (of JSON's types, and NumPy scalars and paths) to ``path`` as :func:`atomic_file` does; raises OSError."""
    with atomic_file(path, staging, durable=durable) as file:
        file.write(to_json(value) + b"\n")


def to_json(value: Any) -> bytes:
    """Indented JSON of ``value``, of JSON's types, and NumPy scalars; of what else there is, its ``str``."""
    # Told to know NumPy's scalars, orjson imports NumPy at the first value that it does not know, a path say: 80 ms.
    numpy = orjson.OPT_SERIALIZE_NUMPY if "numpy" in sys.modules else 0
    return orjson.dumps(value, option=orjson.OPT_INDENT_2 | numpy, default=str)


def read_json(path: Path) -> Any:
    """Read a file that :func:`write_json` wrote.

    Raises FileNotFoundError when it is absent (the one thing that readers forgive) and WorkspaceError when it is damaged.
    """
    data = path.read_bytes()
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise WorkspaceError(
            f"{path} is damaged ({error}); dtrain writes it in one piece, so something else changed it"
        ) from error
