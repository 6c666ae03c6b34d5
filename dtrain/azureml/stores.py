"""Where datastores keep their files: the workspace's own folders, and what `dtrain datastore add` named."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Protocol

from dtrain.azureml import records
from dtrain.azureml.errors import UserErrorException
from dtrain.azureml.records import Copy
from dtrain.errors import UsageError, did_you_mean
from dtrain.files import read_json, write_json
from dtrain.layout import Workspace as WorkspaceFolder
from dtrain.layout import check_name

DEFAULT = "workspaceblobstore"
OWN = (DEFAULT, "workspacefilestore")
"""The workspace's own datastores: what every one of Azure's has."""
_SCHEMES = ("s3://", "az://", "abfss://")
URLS = "s3://bucket/prefix, az://container/prefix, or the path of a folder"
"""What may be given as a datastore's place."""


class Store(Protocol):
    """Files by their names, which are paths with '/' between their parts. All of it blocks.

    Raises UserErrorException for what cannot be read or written.
    """

    @property
    def url(self) -> str:
        """What people call it."""

    @property
    def folder(self) -> Path | None:
        """The folder that it is; None where files have to be copied to be read."""

    def names(self, below: str = "") -> list[str]:
        """The file of that name, or all in the folder of that name (empty: all there are), sorted."""

    def put_all(self, pairs: Iterable[tuple[Path, str]]) -> None:
        """Copy files in, each by the name beside it; what has that name is replaced."""

    def get_all(self, pairs: Iterable[tuple[str, Path]]) -> None:
        """Copy files out, each to the path beside its name. Folders are made."""


class FolderStore:
    """A folder, which jobs see as it is."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = str(folder)

    def names(self, below: str = "") -> list[str]:
        start = self.folder / below
        paths = [start] if start.is_file() else _files_in(start)
        return sorted(path.relative_to(self.folder).as_posix() for path in paths)

    def put_all(self, pairs: Iterable[tuple[Path, str]]) -> None:
        for source, name in pairs:
            _copy(source, self.folder / name)

    def get_all(self, pairs: Iterable[tuple[str, Path]]) -> None:
        for name, target in pairs:
            _copy(self.folder / name, target)


def _files_in(folder: Path) -> list[Path]:
    """All files below a folder, also where links lead; links that lead nowhere, sockets and the like are left out."""
    paths = (Path(parent, name) for parent, _, names in os.walk(folder, followlinks=True) for name in names)
    return [path for path in paths if path.is_file()]


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def open_store(url: str) -> Store:
    """The store of an object store's URL, or of an absolute path.

    Raises UserErrorException for what is neither, MissingDependency without the package that reaches an object store.
    """
    if url.startswith(_SCHEMES):
        from dtrain.azureml.object_store import ObjectStore

        return ObjectStore(url)
    if not os.path.isabs(url):
        raise UserErrorException(f"{url!r} is no place for files; give {URLS}")
    return FolderStore(Path(url))


def _entries(folder: WorkspaceFolder) -> Path:
    return folder.azureml / "datastore-urls"


def _added(folder: WorkspaceFolder) -> dict[str, str]:
    return {name: entry["url"] for name, entry in records.read_entries(_entries(folder)).items()}


def _default(folder: WorkspaceFolder) -> Path:
    return folder.azureml / "default-datastore.json"


def read_urls(folder: WorkspaceFolder) -> dict[str, str]:
    """The datastores of a workspace by name: URLs of object stores, and paths of folders. Its own folders come first."""
    own = folder.azureml.absolute() / "datastores"
    return {**{name: str(own / name) for name in OWN}, **_added(folder)}


def default_name(folder: WorkspaceFolder) -> str:
    """The name of the default datastore."""
    try:
        name: str = read_json(_default(folder))["name"]
    except FileNotFoundError:
        return DEFAULT
    return name if name in read_urls(folder) else DEFAULT


def add_store(folder: WorkspaceFolder, name: str, url: str) -> None:
    """Give a place a name, once it was seen to answer: a URL, or an existing folder's path. Blocks for a moment.

    Raises UsageError for a name or a folder that cannot be, UserErrorException for an object store that does not answer.
    """
    if check_name("datastore", name) in OWN:
        raise UsageError(
            f"datastore {name} is the workspace's own folder; use another name, and --default if it is to be the default"
        )
    place = url if "://" in url else str(Path(url).absolute())
    store = open_store(place)
    if store.folder is not None and not store.folder.is_dir():
        raise UsageError(f"{url} is not a folder (from {Path.cwd()}); make it first, or give {URLS}")
    if store.folder is None:
        store.names()
    records.write_entry(_entries(folder), name, {"url": place})


def remove_store(folder: WorkspaceFolder, name: str) -> None:
    """Take a name away; its files are left alone. Raises UsageError when there is none of that name."""
    urls = _added(folder)
    if name not in urls:
        raise UsageError(f"no datastore {name!r} was added{did_you_mean(name, urls)}; `dtrain datastore list` shows all")
    if default_name(folder) == name:
        set_default(folder, DEFAULT)
    records.write_entry(_entries(folder), name, None)


def set_default(folder: WorkspaceFolder, name: str) -> None:
    """Make a datastore the default one. Raises UserErrorException when there is none of that name."""
    urls = read_urls(folder)
    if name not in urls:
        raise UserErrorException(f"no datastore {name!r}{did_you_mean(name, urls)}; there are {', '.join(urls)}")
    folder.azureml.mkdir(parents=True, exist_ok=True)
    write_json(_default(folder), {"name": name})


def make_copy(copy: Copy) -> int:
    """Make a copy of a store's file, or of all files in a folder; returns how many. Blocks.

    Raises UserErrorException where there is nothing to download, and for what cannot be read or written.
    """
    store, start, target = open_store(copy.url), PurePosixPath(copy.name), Path(copy.path)
    found = store.names(copy.name)
    is_folder = store.folder is not None and (store.folder / copy.name).is_dir()
    if copy.mode == "download" and not found and not is_folder:
        raise UserErrorException(f"{copy.url} has no {copy.name or 'file'!r} to download")
    try:
        store.get_all((each, target / PurePosixPath(each).relative_to(start)) for each in found)
        if not found:
            target.mkdir(parents=True)
    except OSError as error:
        raise UserErrorException(f"{copy.url} cannot be copied to {copy.path}: {error.strerror}") from error
    return len(found)


def list_files(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of all files below a folder, or of a file itself, by their paths in it (empty: the file)."""
    paths = [folder] if folder.is_file() else _files_in(folder)
    found = ((path, path.stat()) for path in paths)
    return {path.relative_to(folder).as_posix(): (status.st_size, status.st_mtime_ns) for path, status in found}


def copy_changed(folder: Path, before: Mapping[str, tuple[int, int]], store: Store, name: str) -> list[str]:
    """Copy what was written to a folder (or file) since ``before`` (:func:`list_files`) back to ``name``; returns the names."""
    changed = sorted(path for path, state in list_files(folder).items() if before.get(path) != state)
    pairs = [(folder / path, (PurePosixPath(name) / path).as_posix()) for path in changed]
    store.put_all(pairs)
    return [target for _, target in pairs]
