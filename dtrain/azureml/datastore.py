"""Datastores: folders of the workspace, and references to what lies in them."""

from __future__ import annotations

import fnmatch
import re
import shutil
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from dtrain.azureml.console import say
from dtrain.azureml.errors import Named, Settings, UserErrorException
from dtrain.azureml.workspace import Workspace
from dtrain.errors import did_you_mean

DEFAULT = "workspaceblobstore"
VARIABLE = "$AZUREML_DATAREFERENCE_"
"""What the text of a reference begins with; without the $, the variable in the job that holds the path."""
_NO_STORE = "copy the files into ws.get_default_datastore() with upload()"


class Datastore(Named):
    """A datastore of a workspace by its name; None: the default one. Called by control scripts.

    Raises UserErrorException when there is none of that name.
    """

    _refused: ClassVar = {
        name: _NO_STORE
        for name in (
            "register_azure_blob_container",
            "register_azure_file_share",
            "register_azure_data_lake",
            "register_azure_data_lake_gen2",
            "register_azure_sql_database",
            "register_azure_postgre_sql",
            "register_azure_my_sql",
            "register_dbfs",
            "register_hdfs",
        )
    }
    _differs: ClassVar = {"as_mount": "the folder itself, as a path", "as_download": "a copy in the run's folder, as a path"}

    def __init__(self, workspace: Workspace, name: str | None = None) -> None:
        known = _names(workspace)
        if name is not None and name not in known:
            raise UserErrorException(
                f"no datastore {name!r} in workspace {workspace.name!r}{did_you_mean(name, known)}; it has {', '.join(known)}"
            )
        self.workspace, self.name = workspace, name or DEFAULT
        self.datastore_type = "AzureBlob"
        self.container_name = self.account_name = "local"
        self._root.mkdir(parents=True, exist_ok=True)

    @property
    def _root(self) -> Path:
        return self.workspace._folder.azureml / "datastores" / self.name

    @staticmethod
    def get(workspace: Workspace, datastore_name: str) -> Datastore:
        """The datastore of that name. Raises UserErrorException when there is none."""
        return Datastore(workspace, datastore_name)

    @staticmethod
    def get_default(workspace: Workspace) -> Datastore:
        """The default datastore."""
        return Datastore(workspace)

    def upload(
        self, src_dir: str, target_path: str | None = None, overwrite: bool = False, show_progress: bool = True
    ) -> DataReference:
        """Copy a folder's files to ``target_path``, and return a reference to that. Blocks.

        Files that are there already stay, unless ``overwrite``. Raises UserErrorException when there is no such folder.
        """
        source = Path(src_dir)
        if not source.is_dir():
            raise UserErrorException(f"src_dir {src_dir!r} is not a folder (from {Path.cwd()})")
        files = [path for path in sorted(source.rglob("*")) if path.is_file()]
        self._copy([(path, path.relative_to(source)) for path in files], target_path, overwrite, show_progress)
        return self.path(target_path)

    def upload_files(
        self,
        files: Sequence[str],
        relative_root: str | None = None,
        target_path: str | None = None,
        overwrite: bool = False,
        show_progress: bool = True,
    ) -> DataReference:
        """Copy files to ``target_path``, with their paths relative to ``relative_root`` (None: their names alone). Blocks.

        Raises UserErrorException for a file that is not there, or not below ``relative_root``.
        """
        pairs = []
        for name in files:
            path = Path(name)
            if not path.is_file():
                raise UserErrorException(f"there is no file {name!r} to upload (from {Path.cwd()})")
            if relative_root is None:
                pairs.append((path, Path(path.name)))
                continue
            if not path.absolute().is_relative_to(Path(relative_root).absolute()):
                raise UserErrorException(f"file {name!r} is not below relative_root {relative_root!r}")
            pairs.append((path, path.absolute().relative_to(Path(relative_root).absolute())))
        self._copy(pairs, target_path, overwrite, show_progress)
        return self.path(target_path)

    def _copy(self, pairs: Sequence[tuple[Path, Path]], target_path: str | None, overwrite: bool, show: bool) -> None:
        folder = self._root / _inside(target_path)
        for source, relative in pairs:
            target = folder / relative
            if target.exists() and not overwrite:
                if show:
                    say(f"{relative} is there already; overwrite=True replaces it")
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
            if show:
                say(f"Uploaded {source} to {target}")

    def download(self, target_path: str, prefix: str | None = None, overwrite: bool = False, show_progress: bool = True) -> int:
        """Copy the files below ``prefix`` (None: all) to folder ``target_path``, with their whole paths; returns how many."""
        count = 0
        start = _inside(prefix)
        for path in sorted(self._root.rglob("*")):
            relative = path.relative_to(self._root)
            below = relative.is_relative_to(start) or fnmatch.fnmatchcase(str(relative), f"{start}*")
            target = Path(target_path) / relative
            if not path.is_file() or not below or (target.exists() and not overwrite):
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
            count += 1
            if show_progress:
                say(f"Downloaded {relative}")
        return count

    def path(self, path: str | None = None, data_reference_name: str | None = None) -> DataReference:
        """A reference to a file or folder of the datastore, for ``script_params`` and ``inputs``."""
        return DataReference(self, data_reference_name, path)

    def as_mount(self) -> DataReference:
        """A reference to the whole datastore, as a path in the job."""
        return self.path().as_mount()

    def as_download(self, path_on_compute: str | None = None) -> DataReference:
        """A reference to a copy of the whole datastore in the run's folder."""
        return self.path().as_download(path_on_compute)

    def __repr__(self) -> str:
        return f"Datastore(name={self.name!r}, folder={str(self._root)!r})"


class DataReference(Named):
    """A file or folder of a datastore, which becomes a path in a job's arguments."""

    _refused: ClassVar = {"as_upload": "let the script write to ./outputs, and use run.download_files afterwards"}
    _differs: ClassVar = {
        "as_mount": "the folder itself: what the job writes there stays",
        "as_download": "a copy in the run's folder; path_on_compute is not used",
    }

    def __init__(
        self,
        datastore: Datastore,
        data_reference_name: str | None = None,
        path_on_datastore: str | None = None,
        mode: str = "mount",
        path_on_compute: str | None = None,
        overwrite: bool = False,
    ) -> None:  # long because the SDK's signature is this
        _check_mode(mode)
        self.datastore, self.path_on_datastore = datastore, path_on_datastore
        self._relative = _inside(path_on_datastore)
        plain = re.sub(r"\W", "_", str(self._relative) if path_on_datastore else datastore.name)
        self.data_reference_name = data_reference_name or plain
        self.mode = mode

    def as_mount(self) -> DataReference:
        """The same as a path to the datastore's own folder."""
        return DataReference(self.datastore, self.data_reference_name, self.path_on_datastore)

    def as_download(self, path_on_compute: str | None = None, overwrite: bool = False) -> DataReference:
        """The same as a path to a copy in the run's folder."""
        return DataReference(self.datastore, self.data_reference_name, self.path_on_datastore, "download")

    def path(self, path: str | None = None, data_reference_name: str | None = None) -> DataReference:
        """A reference to what lies below this one."""
        below = str(PurePosixPath(self.path_on_datastore or "") / (path or ""))
        return DataReference(self.datastore, data_reference_name, below, self.mode)

    def to_config(self) -> DataReferenceConfiguration:
        """The same for ``run_config.data_references``."""
        return DataReferenceConfiguration(self.datastore.name, self.mode, self.path_on_datastore)

    @property
    def _path(self) -> Path:
        return self.datastore._root / self._relative

    def _resolve(self, downloads: Path) -> str:
        """The path that a job is given: for ``download`` that of a copy, which is made in ``downloads`` now.

        Raises UserErrorException when there is nothing to download.
        """
        if self.mode == "mount":
            if not self._path.exists():
                self._path.mkdir(parents=True)
            return str(self._path)
        if not self._path.exists():
            raise UserErrorException(f"datastore {self.datastore.name!r} has no {str(self._relative)!r} to download")
        target = downloads / self.data_reference_name / self._relative.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if self._path.is_dir():
            shutil.copytree(self._path, target, dirs_exist_ok=True)
        else:
            shutil.copyfile(self._path, target)
        return str(target)

    def __str__(self) -> str:
        return f"{VARIABLE}{self.data_reference_name}"


class DataReferenceConfiguration(Settings):
    """A file or folder of a datastore by its name, for ``run_config.data_references``."""

    _fields: ClassVar = ("datastore_name", "mode", "path_on_datastore", "path_on_compute", "overwrite")
    _differs: ClassVar = {"path_on_compute": "not used: the job is given the path of a copy in the run's folder"}

    def __init__(
        self,
        datastore_name: str | None = None,
        mode: str = "mount",
        path_on_datastore: str | None = None,
        path_on_compute: str | None = None,
        overwrite: bool = False,
    ) -> None:
        self.datastore_name, self.mode, self.path_on_datastore = datastore_name, mode, path_on_datastore
        self.path_on_compute, self.overwrite = path_on_compute, overwrite

    def _reference(self, workspace: Workspace, name: str) -> DataReference:
        """What it means in a workspace. Raises UserErrorException for a datastore or mode that is not there."""
        return DataReference(Datastore(workspace, self.datastore_name), name, self.path_on_datastore, self.mode)


def _check_mode(mode: str) -> None:
    if mode not in ("mount", "download"):
        raise UserErrorException(f"mode={mode!r} is not one of mount, download; a job's results belong in ./outputs")


def _inside(path: str | None) -> Path:
    """A path of a datastore, relative and within it."""
    relative = PurePosixPath((path or "").strip("/"))
    if ".." in relative.parts:
        raise UserErrorException(f"path {path!r} leads out of the datastore; leave '..' out")
    return Path(relative)


def _names(workspace: Workspace) -> list[str]:
    folder = workspace._folder.azureml / "datastores"
    found = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    return [DEFAULT, *(name for name in found if name != DEFAULT)]


def datastores(workspace: Workspace) -> dict[str, Any]:
    """All datastores of a workspace, by name."""
    return {name: Datastore(workspace, name) for name in _names(workspace)}
