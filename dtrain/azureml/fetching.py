"""A model's file or folder, copied out of the registry to a place that others may look at, or fetch it to as well."""

from __future__ import annotations

import contextlib
import filecmp
import os
import secrets
import tempfile
from pathlib import Path

from dtrain.registry import Registry


def fetch(registry: Registry, reference: str, target: Path, file: str | None, *, replace: bool) -> bool:
    """Copy a model, or one ``file`` of it, verified, and let it appear at ``target`` whole. Blocks. False where something is.

    With ``replace`` it takes that one's place, unless that is the same: others may be reading it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".dtrain-download-") as temporary:
        pulled = registry.pull(reference, Path(temporary) / "model")
        source = pulled if file is None else pulled / file
        while not _rename_to_absent(source, target):
            if not replace or _is_same(source, target):
                return replace
            with contextlib.suppress(FileNotFoundError):
                os.rename(target, Path(temporary) / secrets.token_hex(8))
    return True


def _rename_to_absent(source: Path, target: Path) -> bool:
    """Move a file or folder to ``target``; False where there is something."""
    if os.path.lexists(target):
        return False
    try:
        os.rename(source, target)
    except OSError:
        if os.path.lexists(target):  # somebody else's, by now
            return False
        raise
    return True


def _is_same(one: Path, other: Path) -> bool:
    """Whether two files, or all files of two folders, hold the same."""
    try:
        names = [{path.relative_to(root) for path in [root, *root.rglob("*")] if path.is_file()} for root in (one, other)]
        return names[0] == names[1] and all(filecmp.cmp(one / name, other / name, shallow=False) for name in names[0])
    except FileNotFoundError:  # somebody replaces it
        return False
