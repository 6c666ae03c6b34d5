"""What a host wrote into its copy of a run folder is moved into the run folder; of two files for one name, none is lost."""

from __future__ import annotations

import filecmp
import os
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path

from dtrain.launch import archive
from dtrain.launch.archive import Stat
from dtrain.launch.mirror import mirrors
from dtrain.launch.plan import PlannedHost
from dtrain.layout import RunLayout


def merge(run: RunLayout, host: PlannedHost, sent: Mapping[str, Stat]) -> dict[str, str]:
    """Move what has arrived from ``host`` to its place. Raises OSError.

    ``sent`` is what its copy came with: a file that is here as it was sent is replaced. One that has changed here too, or was
    written by another host before, stays, and the host's is put beside it; where the host has rank 0, the other way round.
    Returns those that were put beside: by the name that both were for.
    """
    arrived = RunLayout(run.arriving(host.name))
    beside: dict[str, str] = {}
    for name in [*_rank_files(arrived), *archive.names(arrived)]:
        path, there = arrived.root / name, run.root / name
        if path.is_dir() and not path.is_symlink():
            there.mkdir(parents=True, exist_ok=True)
        elif mirrors(name, host.ranks) or (now := archive.stat(there)) is None or now == sent.get(name):
            os.replace(path, there)
        elif not _is_same(path, there):
            if 0 in host.ranks:
                beside[name] = _put_beside(there, there, socket.gethostname())
                os.replace(path, there)
            else:
                beside[name] = _put_beside(path, there, host.name)
    shutil.rmtree(arrived.root)
    return beside


def _rank_files(arrived: RunLayout) -> list[str]:
    return [str(path.relative_to(arrived.root)) for path in sorted(arrived.root.glob("attempts/*/*/*"))]


def _is_same(one: Path, other: Path) -> bool:
    if one.is_symlink() or other.is_symlink():
        return one.is_symlink() and other.is_symlink() and os.readlink(one) == os.readlink(other)
    return other.is_file() and filecmp.cmp(one, other, shallow=False)


def _put_beside(path: Path, there: Path, host: str) -> str:
    """Move a file beside the one that has its name; the name that it has then."""
    names = (f"{there.name}.from-{host}{f'-{number}' if number else ''}" for number in range(1 << 30))
    name = next(name for name in names if not os.path.lexists(there.with_name(name)))
    os.replace(path, there.with_name(name))
    return name
