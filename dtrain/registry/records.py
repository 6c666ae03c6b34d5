"""What the registry says about a model: its values, their form on disk, and the checks on reading them back.

A record is trusted only after these checks, because it decides where :meth:`Registry.pull` writes: names, numbers, paths and
hashes that do not have their exact form are refused, and so is a record whose own BLAKE3 does not fit. (A flipped bit in the
JSON of a record would otherwise be just another file name.)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import orjson
from blake3 import blake3

from dtrain.errors import RegistryError
from dtrain.layout import NAME_PATTERN

FORMAT = 1
VERSION_PATTERN = re.compile(r"[1-9][0-9]{0,8}")
HASH_PATTERN = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class ModelFile:
    """One file of a version. ``path`` is relative, with '/' between its parts, to what was registered. Raises ValueError."""

    path: str
    size_bytes: int
    blake3: str

    def __post_init__(self) -> None:
        parts = self.path.split("/")
        if "\0" in self.path or any(part in ("", ".", "..") for part in parts):
            raise ValueError(f"path {self.path!r} does not stay inside the model's folder")
        # bool is an int in Python, and true is not a size.
        if type(self.size_bytes) is not int or self.size_bytes < 0:
            raise ValueError(f"size {self.size_bytes!r} of {self.path} is not a number of bytes")
        if not HASH_PATTERN.fullmatch(self.blake3):
            raise ValueError(f"hash {self.blake3!r} of {self.path} is not 64 hexadecimal digits")

    def to_json(self) -> dict[str, Any]:
        return {"path": self.path, "size_bytes": self.size_bytes, "blake3": self.blake3}


@dataclass(frozen=True, kw_only=True)
class ModelVersion:
    """One registered version. All of it is immutable but ``tags``, which are those at the time of reading."""

    name: str
    version: int
    created: str  # UTC, ISO 8601
    run: str  # the source run's id
    run_state: str  # "completed"; "failed", "canceled" or "running" when that was asked for
    run_size: int  # its number of ranks
    source: str | None  # what was registered, relative to the run folder; None: all outputs but metrics and checkpoints
    description: str = ""
    files: tuple[ModelFile, ...] = ()
    tags: Mapping[str, str] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """``name:version``."""
        return f"{self.name}:{self.version}"

    @property
    def size_bytes(self) -> int:
        """Of all files together, as if none were shared with other versions."""
        return sum(file.size_bytes for file in self.files)

    def to_json(self) -> dict[str, Any]:
        return {"id": self.id, "size_bytes": self.size_bytes, **self.record()}

    def record(self) -> dict[str, Any]:
        """The JSON value that is kept on disk; :func:`version_from` reads it."""
        return {
            "name": self.name,
            "version": self.version,
            "created": self.created,
            "run": self.run,
            "run_state": self.run_state,
            "run_size": self.run_size,
            "source": self.source,
            "description": self.description,
            "tags": dict(self.tags),
            "files": [file.to_json() for file in self.files],
        }


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that :meth:`Registry.verify` found: a damaged or absent file (``path``, ``blob``), or record (both None)."""

    model: str
    version: int
    path: str | None
    blob: Path | None
    what: str

    def to_json(self) -> dict[str, Any]:
        blob = None if self.blob is None else str(self.blob)
        return {"model": self.model, "version": self.version, "path": self.path, "blob": blob, "what": self.what}


def seal(body: Mapping[str, Any]) -> bytes:
    """The bytes of a record file: ``body`` as readable JSON, with its format number and its own BLAKE3."""
    record = {"format": FORMAT, **body}
    return orjson.dumps({**record, "seal": _digest(record)}, option=orjson.OPT_INDENT_2) + b"\n"


def unseal(path: Path) -> dict[str, Any]:
    """Read a file that :func:`seal` made. Raises FileNotFoundError when absent, RegistryError when unreadable or damaged."""
    try:
        record = orjson.loads(path.read_bytes())
        found = record.pop("seal")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise RegistryError(f"record {path} cannot be read: {error.strerror}") from error
    except (orjson.JSONDecodeError, AttributeError, TypeError, KeyError) as error:
        raise RegistryError(f"record {path} is damaged: not a sealed JSON object; restore it from a backup") from error
    if found != _digest(record):
        raise RegistryError(
            f"record {path} is damaged: its own BLAKE3 is {_digest(record)}, it says {found}; restore it from a backup"
        )
    if record.get("format") != FORMAT:
        raise RegistryError(
            f"record {path} has format {record.get('format')!r}; this dtrain reads format {FORMAT}: use a newer dtrain"
        )
    return dict(record)


def _digest(record: Mapping[str, Any]) -> str:
    return blake3(orjson.dumps(record, option=orjson.OPT_SORT_KEYS)).hexdigest()


def version_from(path: Path, name: str, version: int) -> ModelVersion:
    """The version that record file ``path`` describes, with the tags it was registered with.

    Raises FileNotFoundError when absent, RegistryError when it is damaged, tampered with, or of another model or version.
    """
    record = unseal(path)
    try:
        if (record["name"], record["version"]) != (name, version):
            raise ValueError(f"it is the record of {record['name']}:{record['version']}")
        files = tuple(ModelFile(path=f["path"], size_bytes=f["size_bytes"], blake3=f["blake3"]) for f in record["files"])
        _check_tree([file.path for file in files])
        return ModelVersion(
            name=name,
            version=version,
            created=record["created"],
            run=record["run"],
            run_state=record["run_state"],
            run_size=record["run_size"],
            source=record["source"],
            description=record["description"],
            tags=dict(record["tags"]),
            files=files,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RegistryError(f"record {path} of {name}:{version} cannot be trusted: {error}") from error


def _check_tree(paths: list[str]) -> None:
    known = set(paths)
    if not paths or len(known) != len(paths):
        raise ValueError("it names no file, or one file twice")
    for path in paths:
        inner = [str(parent) for parent in PurePosixPath(path).parents if str(parent) in known]
        if inner:
            raise ValueError(f"{inner[0]!r} is both a file and the folder of {path!r}")


def split_reference(reference: str) -> tuple[str, str | None]:
    """Split ``name`` or ``name:version`` (a number, or ``latest``); the version is None when not given. Raises RegistryError."""
    name, colon, version = reference.partition(":")
    if NAME_PATTERN.fullmatch(name) and (not colon or version == "latest" or VERSION_PATTERN.fullmatch(version)):
        return name, version if colon else None
    raise RegistryError(
        f"{reference!r} is not a model; write NAME, NAME:latest or NAME:VERSION (a version is 1 or more, as in digits:3; "
        "a name has 1 to 64 letters, digits, '.', '_' or '-')"
    )


def check_text(what: str, text: object) -> str:
    """Return ``text`` when a record can hold it, else raise RegistryError. (What is no UTF-8 arrives as surrogates.)"""
    if not isinstance(text, str):
        raise RegistryError(f"{what} must be text, not {type(text).__name__} ({text!r})")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RegistryError(f"{what} {text!r} is not valid UTF-8; use another") from error
    return text


def check_tag(key: object, value: object) -> tuple[str, str]:
    """Return key and value when they may be a tag, else raise RegistryError."""
    if not check_text("a tag's key", key):
        raise RegistryError(f"a tag needs a key, as in stage=production; got an empty one with the value {value!r}")
    return str(key), check_text(f"the value of tag {key!r}", value)
