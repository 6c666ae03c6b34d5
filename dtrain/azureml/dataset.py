"""``Dataset.File``: a file or folder of a datastore under a name and a version, which jobs are given as a path."""

from __future__ import annotations

import itertools
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar
from urllib.parse import quote

from dtrain.azureml.datapath import DataPath
from dtrain.azureml.datastore import DataReference, Datastore
from dtrain.azureml.errors import Named, UserErrorException
from dtrain.azureml.versions import write_next
from dtrain.azureml.workspace import Workspace
from dtrain.errors import did_you_mean
from dtrain.files import read_json
from dtrain.registry.store import numbers_in

_WILD = re.compile(r"[*?]")
_ONE_PLACE = "a dataset is one file or folder of a datastore"
_NO_TABLE = "give the job the file by Dataset.File, and let it read that: pandas.read_csv(path)"
_NO_SUBSET = "make a folder of the files that are wanted, and a dataset of it"
_MOUNT = "a folder itself, which Azure's mount only lets jobs read; of an object store a copy. path_on_compute is not used"


class FileDataset(Named):
    """A file or folder of a datastore. Made by ``Dataset.File.from_files``; called by control scripts."""

    _fields: ClassVar = ("name", "description", "tags", "version")
    _refused: ClassVar = {
        "as_cache": "as_download() gives each job a copy",
        "as_hdfs": "there is no Spark here",
        "file_metadata": "to_path() lists the files",
        "filter": _NO_SUBSET,
        "hydrate": "download(target_path) copies the files",
        "mount": "download(target_path) copies the files",
        "random_split": _NO_SUBSET,
        "skip": _NO_SUBSET,
        "take": _NO_SUBSET,
        "take_sample": _NO_SUBSET,
        "to_pandas_dataframe": _NO_TABLE,
        "to_spark_dataframe": _NO_TABLE,
        "unregister_all_versions": "names are kept; register another place with create_new_version=True",
    }
    _differs: ClassVar = {"as_mount": _MOUNT, "as_download": "a copy in the run's folder; path_on_compute is not used"}

    def __init__(self, place: DataReference, record: Mapping[str, Any] | None = None) -> None:
        record = record or {}
        self.name: str | None = record.get("name")
        self.version: int | None = record.get("version")
        self.description: str | None = record.get("description")
        self.tags: dict[str, str] = dict(record.get("tags", {}))
        self._place = place

    @property
    def id(self) -> str:
        return (
            f"{self.name}:{self.version}" if self.name else f"{self._place.datastore.name}/{self._place.path_on_datastore or ''}"
        )

    def as_named_input(self, name: str) -> DatasetConsumptionConfig:
        """The same under the name by which ``run.input_datasets`` has it in the job; as_mount() or as_download() goes on."""
        return DatasetConsumptionConfig(name, self)

    def as_mount(self, path_on_compute: str | None = None) -> DataReference:
        """A reference for arguments and ``inputs``: a path to the files in the job."""
        return self._reference(None, "mount")

    def as_download(self, path_on_compute: str | None = None) -> DataReference:
        """A reference for arguments and ``inputs``: a path to a copy of the files in the run's folder."""
        return self._reference(None, "download")

    def _reference(self, name: str | None, mode: str) -> DataReference:
        return DataReference(self._place.datastore, name, self._place.path_on_datastore, mode)

    def to_path(self) -> list[str]:
        """The files, as paths within the dataset that begin with '/'. Blocks. Raises UserErrorException where there is none."""
        return [f"/{self._within(name)}" for name in self._names()]

    def download(self, target_path: str | None = None, overwrite: bool = False, **given: Any) -> list[str]:
        """Copy the files to folder ``target_path`` (None: a new one), and return their paths there. Blocks.

        Raises UserErrorException where one is there already, unless ``overwrite``.
        """
        for option in given:
            raise TypeError(f"FileDataset.download() has no argument {option!r} here")
        folder = Path(target_path or tempfile.mkdtemp(prefix="dataset-"))
        pairs = [(name, folder / self._within(name)) for name in self._names()]
        there = [str(target) for _, target in pairs if target.exists()]
        if there and not overwrite:
            raise UserErrorException(f"{there[0]} is there already; overwrite=True replaces it")
        self._place.datastore._store.get_all(pairs)
        return [str(target) for _, target in pairs]

    def _names(self) -> list[str]:
        store, start = self._place.datastore._store, self._start
        if found := store.names("" if start == "." else start):
            return found
        raise UserErrorException(f"datastore {self._place.datastore.name!r} has no file in {start!r}; upload() puts some there")

    @property
    def _start(self) -> str:
        return self._place._relative.as_posix()

    def _within(self, name: str) -> str:
        """A file's path within the dataset; of a file that is the dataset, its name."""
        relative = PurePosixPath(name).relative_to(self._start)
        return PurePosixPath(name).name if relative == PurePosixPath() else relative.as_posix()

    def register(
        self,
        workspace: Workspace,
        name: str,
        description: str | None = None,
        tags: Mapping[str, str] | None = None,
        create_new_version: bool = False,
    ) -> FileDataset:
        """Keep it under a name, for ``Dataset.get_by_name``. The same place again is the version that it was.

        Raises UserErrorException for another place under a name that is taken, unless ``create_new_version``.
        """
        versions = _read(workspace).get(name, [])
        record = {"name": name, "description": description, "tags": dict(tags or {})}
        record.update(datastore=self._place.datastore.name, path=self._place.path_on_datastore)
        for known in versions:
            if (known["datastore"], known["path"]) == (record["datastore"], record["path"]):
                return _dataset(workspace, known)
        if versions and not create_new_version:
            raise UserErrorException(
                f"dataset {name!r} is another place already; create_new_version=True registers this one, too"
            )
        return _dataset(workspace, {**record, "version": write_next(_folder(workspace) / quote(name, safe=""), record)})

    def __repr__(self) -> str:
        place = f"datastore={self._place.datastore.name!r}, path={self._start!r}"
        return f"FileDataset(name={self.name!r}, version={self.version}, {place})"


class DatasetConsumptionConfig(Named):
    """A dataset under the name of a job's input; its as_mount() and as_download() are what a job takes."""

    _fields: ClassVar = ("name", "dataset")
    _differs: ClassVar = {"as_mount": _MOUNT, "as_download": "a copy in the run's folder; path_on_compute is not used"}
    _refused: ClassVar = {"as_hdfs": "there is no Spark here", "as_cache": "as_download() gives each job a copy"}

    def __init__(self, name: str, dataset: FileDataset) -> None:
        self.name, self.dataset = name, dataset

    def __repr__(self) -> str:
        return f"DatasetConsumptionConfig(name={self.name!r}, dataset={self.dataset!r})"

    def as_mount(self, path_on_compute: str | None = None) -> DataReference:
        """A reference of this name: a path to the files in the job."""
        return self.dataset._reference(self.name, "mount")

    def as_download(self, path_on_compute: str | None = None) -> DataReference:
        """A reference of this name: a path to a copy of the files in the run's folder."""
        return self.dataset._reference(self.name, "download")


class FileDatasetFactory(Named):
    """``Dataset.File``."""

    _differs: ClassVar = {
        "from_files": "one file or folder of a datastore; a pattern (`folder/*.csv`) that all files of the folder fit is that "
        "folder, and others, several places and web addresses are refused",
    }

    @staticmethod
    def from_files(path: Any, validate: bool = True, partition_format: str | None = None, is_file: bool = False) -> FileDataset:
        """The dataset of ``(datastore, path)``, a DataPath or a reference. Raises UserErrorException for anything else."""
        if partition_format is not None:
            raise UserErrorException(f"partition_format={partition_format!r} is not there: {_ONE_PLACE}")
        dataset = FileDataset(_place_of(path))
        if validate:
            dataset._names()
        return dataset

    @staticmethod
    def upload_directory(
        src_dir: str, target: Any, pattern: str | None = None, overwrite: bool = False, show_progress: bool = True
    ) -> FileDataset:
        """Copy a local folder's files to ``(datastore, path)``, and return the dataset of that. Blocks."""
        if pattern is not None:
            raise UserErrorException(f"pattern={pattern!r} is not there: upload a folder of the files that are wanted")
        place = _place_of(target)
        place.datastore.upload(src_dir, place.path_on_datastore, overwrite, show_progress)
        return FileDataset(place)


class Dataset(Named):
    """``Dataset.File`` makes datasets of files; those that were registered are found by their names."""

    File = FileDatasetFactory
    _refused: ClassVar = {
        "Scenario": _NO_TABLE,
        "Tabular": _NO_TABLE,
        "auto_read_files": _NO_TABLE,
        "from_delimited_files": _NO_TABLE,
        "from_pandas_dataframe": _NO_TABLE,
        "from_parquet_files": _NO_TABLE,
        "from_json_files": _NO_TABLE,
        "get": "use Dataset.get_by_name",
    }

    @staticmethod
    def get_by_name(workspace: Workspace, name: str, version: int | str = "latest") -> FileDataset:
        """The dataset of that name, the newest version or the one asked for. Raises UserErrorException when there is none."""
        known = _read(workspace)
        versions = known.get(name, [])
        found = (
            versions[-1:] if version in ("latest", None) else [each for each in versions if str(each["version"]) == str(version)]
        )
        if not found:
            raise UserErrorException(
                f"no dataset {name!r}{f' of version {version}' if versions else did_you_mean(name, known)} in workspace "
                f"{workspace.name!r}; it has {', '.join(known) or 'none'}: register() keeps one"
            )
        return _dataset(workspace, found[0])

    @staticmethod
    def get_by_id(workspace: Workspace, id: str) -> FileDataset:
        """The registered dataset of that id. Raises UserErrorException when there is none."""
        name, _, version = id.rpartition(":")
        return Dataset.get_by_name(workspace, name, version)

    @staticmethod
    def get_all(workspace: Workspace) -> dict[str, FileDataset]:
        """The newest version of every registered dataset, by name."""
        return {name: _dataset(workspace, versions[-1]) for name, versions in _read(workspace).items()}


def check_datasets(arguments: Iterable[Any]) -> None:
    """Raises UserErrorException for a dataset that is no path yet: Azure gives a job such a one's id, or the object itself."""
    for value in arguments:
        if isinstance(value, FileDataset | DatasetConsumptionConfig):
            raise UserErrorException(f"argument {value!r:.120} is no path yet: say whether by as_mount() or by as_download()")


def _place_of(path: Any) -> DataReference:
    """The one place that a dataset is made of."""
    if isinstance(path, list) and len(path) == 1:
        path = path[0]
    if isinstance(path, tuple) and len(path) == 2 and isinstance(path[0], Datastore):
        path = path[0].path(str(path[1]))
    if isinstance(path, DataPath):
        path = path._target
    if isinstance(path, Datastore):
        path = path.path()
    if not isinstance(path, DataReference):
        raise UserErrorException(
            f"a dataset of {path!r:.120} cannot be: {_ONE_PLACE}, as (ws.get_default_datastore(), 'folder'); upload() and "
            "upload_files() put files of this machine there, and those of web addresses have to be downloaded first"
        )
    name = (path.path_on_datastore or "").strip("/")
    parts = PurePosixPath(name).parts
    folder = PurePosixPath(*itertools.takewhile(lambda part: not _WILD.search(part), parts))
    if len(folder.parts) < len(parts):
        start = "" if folder == PurePosixPath() else folder.as_posix()
        others = [each for each in path.datastore._store.names(start) if not _matches(each, name)]
        if others:
            raise UserErrorException(f"path {name!r} leaves {others[0]!r} of its folder out: {_ONE_PLACE}. {_NO_SUBSET}")
        return path.datastore.path(start or None)
    return path.datastore.path(name or None)


def _matches(name: str, pattern: str) -> bool:
    """Whether a file's name fits: '*' and '?' stand for what is in one folder, '**' for what is below, too."""
    text = re.escape(pattern).replace(r"\*\*/", "(.*/)?").replace(r"\*\*", ".*").replace(r"\*", "[^/]*").replace(r"\?", "[^/]")
    return re.fullmatch(text, name) is not None


def _folder(workspace: Workspace) -> Path:
    """Where a workspace's registered datasets are, each a folder of versions."""
    return workspace._folder.azureml / "datasets"


def _read(workspace: Workspace) -> dict[str, list[dict[str, Any]]]:
    """The records of all versions, oldest first, by name."""
    found = {}
    for folder in sorted(_folder(workspace).glob("*")):
        versions = [{**read_json(folder / f"{number}.json"), "version": number} for number in numbers_in(folder)]
        if versions:
            found[versions[0]["name"]] = versions
    return found


def _dataset(workspace: Workspace, record: Mapping[str, Any]) -> FileDataset:
    return FileDataset(Datastore(workspace, record["datastore"]).path(record["path"]), record)
