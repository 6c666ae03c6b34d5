"""Numbered versions of what a workspace keeps under a name: a folder for each name, a file for each version."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dtrain.files import link_new, write_json
from dtrain.registry.store import numbers_in


def write_next(folder: Path, values: Mapping[str, Any]) -> int:
    """Write the next version to a name's folder, and return its number, which no other writer is given as well."""
    folder.mkdir(parents=True, exist_ok=True)
    written = folder / f".{secrets.token_hex(8)}.tmp"
    write_json(written, values)
    number = 0
    try:
        while True:
            number = max([number, *numbers_in(folder)]) + 1
            if link_new(written, folder / f"{number}.json"):
                return number
    finally:
        written.unlink()
