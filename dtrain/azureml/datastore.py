"""Datastores by the SDK's names, over stores.py, and references to what lies in them."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from dtrain import switches
from dtrain.azureml.console import say, warn
from dtrain.azureml.errors import Named, Settings, UserErrorException, take_options
from dtrain.azureml.records import Copy
from dtrain.azureml.stores import Store, add_store, default_name, open_store, read_urls, remove_store, set_default
from dtrain.azureml.values import check_path, list_of
from dtrain.azureml.workspace import Workspace
from dtrain.errors import DtrainError, UsageError, did_you_mean

ARTIFACTS = "workspaceartifactstore"
"""The datastore of the runs' own folders: ``ID/outputs`` in it."""
VARIABLE = "$AZUREML_DATAREFERENCE_"
"""What the text of a reference begins with; without the $, the variable in the job that holds the path."""
_NO_STORE = (
    "copy the files to a folder, an S3 bucket or a container of Azure's, which `dtrain datastore add NAME URL` names for "
    "Datastore.get(ws, NAME); or into ws.get_default_datastore() with upload()"
)
_SECRETS = {"account_key": "AZURE_STORAGE_ACCOUNT_KEY", "sas_token": "AZURE_STORAGE_SAS_TOKEN"}
_REGISTER_REFUSED = {
    "protocol": "the server is Azure's, by https, or that of the variable AZURE_STORAGE_ENDPOINT",
    "endpoint": "the server is Azure's, or that of the variable AZURE_STORAGE_ENDPOINT",
    "create_if_not_exists": "make the container first",
    "skip_validation": "a datastore is looked at once before it has a name",
    "grant_workspace_access": "there is no account of a workspace",
    "subscription_id": "the account is found by its name",
    "resource_group": "the account is found by its name",
    "blob_cache_timeout": "nothing is cached: a job has a copy",
}


class Datastore(Named):
    """A datastore of a workspace by its name; None: the default one. Called by control scripts.

    Raises UserErrorException when there is none of that name.
    """

    _fields: ClassVar = ("workspace", "name", "datastore_type", "container_name", "account_name")
    _refused: ClassVar = {
        "register_azure_file_share": "mount the share, and name its folder: `dtrain datastore add NAME FOLDER`",
        "register_azure_data_lake_gen2": "`dtrain datastore add NAME abfss://FILESYSTEM@ACCOUNT.dfs.core.windows.net`",
        **{
            f"register_{name}": _NO_STORE
            for name in ("azure_data_lake", "azure_sql_database", "azure_postgre_sql", "azure_my_sql", "dbfs", "hdfs")
        },
    }
    _differs: ClassVar = {
        "register_azure_blob_container": "its URL is kept, as by `dtrain datastore add`; account_key and sas_token are for this "
        "process and its jobs, as AZURE_STORAGE_ACCOUNT_KEY and AZURE_STORAGE_SAS_TOKEN, and kept nowhere",
        "as_mount": "a folder itself, as a path; of an object store a copy, and what the job writes there is uploaded in the end",
        "as_download": "a copy in the run's folder, as a path",
        "unregister": "takes the name away, as `dtrain datastore remove`; files are left alone",
    }

    def __init__(self, workspace: Workspace, name: str | None = None) -> None:
        known = {**read_urls(workspace._folder), ARTIFACTS: str(workspace._folder.runs.absolute())}
        if name is not None and name not in known:
            raise UserErrorException(
                f"no datastore {name!r} in workspace {workspace.name!r}{did_you_mean(name, known)}; it has {', '.join(known)}: "
                "`dtrain datastore add NAME URL` makes one"
            )
        self.workspace, self.name = workspace, name or default_name(workspace._folder)
        self.datastore_type = "AzureBlob"
        self.container_name = self.account_name = "local"
        self._url = known[self.name]

    @property
    def _store(self) -> Store:
        store = open_store(self._url)
        if store.folder is not None:
            store.folder.mkdir(parents=True, exist_ok=True)
        return store

    def set_as_default(self) -> None:
        """Make it the one that ``ws.get_default_datastore()`` returns."""
        set_default(self.workspace._folder, self.name)

    def unregister(self) -> None:
        """Take its name away; its files are left alone. Raises UserErrorException for the workspace's own folder."""
        try:
            remove_store(self.workspace._folder, self.name)
        except UsageError as error:
            raise UserErrorException(str(error)) from error

    @staticmethod
    def get(workspace: Workspace, datastore_name: str) -> Datastore:
        """The datastore of that name. Raises UserErrorException when there is none."""
        return Datastore(workspace, datastore_name)

    @staticmethod
    def get_default(workspace: Workspace) -> Datastore:
        """The default datastore."""
        return Datastore(workspace)

    @staticmethod
    def register_azure_blob_container(
        workspace: Workspace, datastore_name: str, container_name: str, account_name: str, **given: Any
    ) -> Datastore:
        """Name a container of Azure's, once it was seen to answer, and return it. Blocks for a moment.

        Raises UserErrorException for one that does not answer, and for a name that is taken, unless ``overwrite``.
        """
        options = take_options(
            "register_azure_blob_container", given, {"overwrite": False, **dict.fromkeys(_SECRETS)}, _REGISTER_REFUSED
        )
        url = f"abfss://{container_name}@{account_name}.dfs.core.windows.net"
        known = read_urls(workspace._folder).get(datastore_name, url)
        if known != url and not options["overwrite"]:
            raise UserErrorException(f"datastore {datastore_name!r} is {known} already; overwrite=True gives the name to {url}")
        secrets = {variable: str(options[name]) for name, variable in _SECRETS.items() if options[name]}
        new = _set_secrets(secrets)
        try:
            add_store(workspace._folder, datastore_name, url)
        except DtrainError as error:
            for variable in new:
                del os.environ[variable]
            os.environ.update(switches.azureml_secrets(set(switches.secret_names()) - new))
            raise UserErrorException(str(error)) from error
        for variable in secrets:
            warn(
                f"{variable} is set for this process and its jobs, and kept nowhere; where else {datastore_name} is used, set it"
            )
        return Datastore(workspace, datastore_name)

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
        for name in list_of("files", files):
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
        store, folder = self._store, PurePosixPath(_inside(target_path))
        named = [(source, (folder / relative).as_posix()) for source, relative in pairs]
        there = set() if overwrite else set(store.names(_name(folder)))
        store.put_all((source, name) for source, name in named if name not in there)
        for source, name in named if show else ():
            if name in there:
                say(f"{name} is there already; overwrite=True replaces it")
            else:
                say(f"Uploaded {source} to {name} of {store.url}")

    def download(self, target_path: str, prefix: str | None = None, overwrite: bool = False, show_progress: bool = True) -> int:
        """Copy the files below ``prefix`` (None: all) to folder ``target_path``, with their whole paths; returns how many."""
        store, start = self._store, _name(PurePosixPath(_inside(prefix)))
        pairs = [(name, Path(target_path) / name) for name in store.names() if name.startswith(start)]
        wanted = [(name, target) for name, target in pairs if overwrite or not target.exists()]
        store.get_all(wanted)
        for name, _ in wanted if show_progress else ():
            say(f"Downloaded {name}")
        return len(wanted)

    def path(self, path: str | None = None, data_reference_name: str | None = None) -> DataReference:
        """A reference to a file or folder of the datastore, for ``script_params`` and ``inputs``."""
        check_path("path", path)
        return DataReference(self, data_reference_name, path)

    def as_mount(self) -> DataReference:
        """A reference to the whole datastore, as a path in the job."""
        return self.path().as_mount()

    def as_download(self, path_on_compute: str | None = None) -> DataReference:
        """A reference to a copy of the whole datastore in the run's folder."""
        return self.path().as_download(path_on_compute)

    def __repr__(self) -> str:
        return f"Datastore(name={self.name!r}, url={self._url!r})"


class DataReference(Named):
    """A file or folder of a datastore, which becomes a path in a job's arguments."""

    _fields: ClassVar = ("datastore", "data_reference_name", "path_on_datastore", "mode")
    _refused: ClassVar = {"as_upload": "let the script write to ./outputs, and use run.download_files afterwards"}
    _differs: ClassVar = {
        "as_mount": "the folder itself: what the job writes there stays; of an object store a copy, whose changes are uploaded",
        "as_download": "a copy in the run's folder, always a new one; path_on_compute is not used, and that is said",
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
        """Without a name it has one that no other place or mode has. Raises UserErrorException for a bad name or mode."""
        _check_mode(mode)
        if path_on_compute is not None:
            warn(
                f"path_on_compute={path_on_compute!r} is not used: the job has the files at a path of its own, which the "
                "reference becomes in its arguments"
            )
        if data_reference_name and not re.fullmatch(r"\w+", data_reference_name):
            raise UserErrorException(
                f"data_reference_name={data_reference_name!r} is not allowed; use letters, digits and '_': it becomes part of a "
                "variable's name"
            )
        self.datastore, self.path_on_datastore, self.mode = datastore, path_on_datastore, mode
        self._relative, self._given_name = _inside(path_on_datastore), data_reference_name or None
        self._what = (datastore._url, str(self._relative), mode)
        self.data_reference_name = self._given_name or self._own_name()

    def _own_name(self) -> str:
        plain = re.sub(r"\W", "_", str(self._relative) if self.path_on_datastore else self.datastore.name)
        if plain == self.datastore.name and self.mode == "mount" and not self.path_on_datastore:
            return plain  # as the SDK's documents show a whole datastore
        return f"{plain}_{hashlib.sha256(repr(self._what).encode()).hexdigest()[:8]}"

    def as_mount(self) -> DataReference:
        """The same as a path to the datastore's own folder; of an object store to a copy, whose changes are uploaded."""
        return DataReference(self.datastore, self._given_name, self.path_on_datastore)

    def as_download(self, path_on_compute: str | None = None, overwrite: bool = False) -> DataReference:
        """The same as a path to a copy in the run's folder."""
        named = (self._given_name, self.path_on_datastore)
        return DataReference(self.datastore, *named, "download", path_on_compute, overwrite)

    def path(self, path: str | None = None, data_reference_name: str | None = None) -> DataReference:
        """A reference to what lies below this one."""
        below = str(PurePosixPath(self.path_on_datastore or "") / (path or ""))
        return DataReference(self.datastore, data_reference_name, below, self.mode)

    def to_config(self) -> DataReferenceConfiguration:
        """The same for ``run_config.data_references``."""
        return DataReferenceConfiguration(self.datastore.name, self.mode, self.path_on_datastore)

    def _place(self, data: Path) -> Path | Copy:
        """What a job is given: a mounted folder itself, made where it is absent, or the copy that it needs in folder ``data``.

        Waits for no object store.
        """
        store, name = self.datastore._store, _name(PurePosixPath(self._relative))
        if self.mode == "mount" and store.folder is not None:
            path = store.folder / name
            if not path.exists():
                warn(f"datastore {self.datastore.name!r} has no {name!r}: the job is given a new, empty folder of that name")
                path.mkdir(parents=True)
            return path
        target = data / self.data_reference_name / self._relative.name
        return Copy(path=str(target), url=self.datastore._url, name=name, mode="mount" if self.mode == "mount" else "download")

    def _check_same(self, name: str, known: DataReference) -> None:
        """Raises UserErrorException where ``known``, of the same name, is another place or mode."""
        if known._what != self._what:
            raise UserErrorException(
                f"two references to datastores are called {name!r}; give one of them a data_reference_name of its own"
            )

    def __str__(self) -> str:
        return f"{VARIABLE}{self.data_reference_name}"


class DataReferenceConfiguration(Settings):
    """A file or folder of a datastore by its name, for ``run_config.data_references``."""

    _fields: ClassVar = ("datastore_name", "mode", "path_on_datastore", "path_on_compute", "overwrite")
    _differs: ClassVar = {
        "path_on_compute": "not used, and that is said: the job is given the path of a copy in the run's folder",
        "overwrite": "no effect: a copy is the run's own, and always new",
    }

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
        store = Datastore(workspace, self.datastore_name)
        return DataReference(store, name, self.path_on_datastore, self.mode, self.path_on_compute, self.overwrite)


def _set_secrets(secrets: Mapping[str, str]) -> set[str]:
    """Set variables for this process and those that it starts; returns the ones that were not set before.

    Raises UserErrorException for one that has another value.
    """
    for variable, value in secrets.items():
        if os.environ.get(variable, value) != value:
            raise UserErrorException(
                f"{variable} has another value already, and holds one account's; use the accounts in scripts of their own"
            )
    new = secrets.keys() - os.environ.keys()
    os.environ.update(secrets)
    os.environ.update(switches.azureml_secrets([*switches.secret_names(), *secrets]))
    return new


def _check_mode(mode: str) -> None:
    if mode not in ("mount", "download"):
        raise UserErrorException(f"mode={mode!r} is not one of mount, download; a job's results belong in ./outputs")


def _inside(path: str | None) -> Path:
    """A path of a datastore, relative and within it."""
    relative = PurePosixPath((path or "").strip("/"))
    if ".." in relative.parts:
        raise UserErrorException(f"path {path!r} leads out of the datastore; leave '..' out")
    return Path(relative)


def _name(path: PurePosixPath) -> str:
    """A path as a store's names begin; empty for all of it."""
    return "" if path == PurePosixPath() else path.as_posix()


def datastores(workspace: Workspace) -> dict[str, Any]:
    """All datastores of a workspace, by name."""
    return {name: Datastore(workspace, name) for name in read_urls(workspace._folder)}
