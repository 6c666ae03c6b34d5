"""``Model``: versions of dtrain's registry, by the SDK's names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, ClassVar

from dtrain.azureml import files
from dtrain.azureml.errors import ModelNotFoundException, Named, UserErrorException, take_options
from dtrain.azureml.fetching import fetch
from dtrain.azureml.interactive import new_run
from dtrain.azureml.names import NO_DEPLOY
from dtrain.azureml.records import AzureLayout
from dtrain.azureml.state import end_by_hand
from dtrain.azureml.workspace import Workspace
from dtrain.errors import DtrainError, RegistryError, did_you_mean
from dtrain.layout import RunLayout
from dtrain.registry import ModelVersion, Registry
from dtrain.status import read_status

if TYPE_CHECKING:
    from dtrain.azureml.run import Run

# Kept as tags of the registry's; not among the model's own tags.
_PREFIX = "azureml."
_PROPERTY = f"{_PREFIX}property."
REGISTER: Mapping[str, Any] = dict.fromkeys(("tags", "properties", "description", "model_framework", "model_framework_version"))
"""What a model may be registered with, and its default."""
REGISTER_REFUSED: Mapping[str, str] = {
    **dict.fromkeys(("child_paths", "sample_input_dataset", "sample_output_dataset", "resource_configuration"), NO_DEPLOY),
    "datasets": "name them in tags= or properties=",
}


class Framework(Named):
    """``Model.Framework``: names of frameworks, as text."""

    CHAINER = "Chainer"
    CUSTOM = "Custom"
    KERAS = "Keras"
    MULTI = "Multi"
    ONNX = "Onnx"
    PYTORCH = "PyTorch"
    SCIKITLEARN = "ScikitLearn"
    SPARKML = "SparkML"
    TENSORFLOW = "TensorFlow"


class Model(Named):
    """A registered model: the newest version of ``name`` (also ``name:version``), or the one that is asked for.

    Called by control scripts. Raises ModelNotFoundException when there is none.
    """

    Framework = Framework

    _fields: ClassVar = ("workspace",)
    _refused: ClassVar = {
        "deploy": NO_DEPLOY,
        "package": NO_DEPLOY,
        "profile": NO_DEPLOY,
        "print_configuration": NO_DEPLOY,
        "add_dataset_references": NO_DEPLOY,
        "get_sas_urls": "download() copies the files",
        "remove_properties": "properties never change",
        "created_by": "there are no accounts here",
        "mime_type": "a model's files are kept as they are",
        "parent_id": "run_id is the run that it came from",
        "resource_configuration": NO_DEPLOY,
        "unpack": "a model's files are kept as they are",
    }
    _differs: ClassVar = {
        "delete": "also its files, where no other version has the same; its number is not used again",
        "update": "`dtrain models` goes on showing the description of the registration",
        "register": "a local file is copied into a run folder of its own first, from which it is registered",
        "url": "there is no service: the version's record in the registry, as a file:// URL",
        "get_model_path": "downloads to ./azureml-models/NAME/VERSION",
    }

    def __init__(
        self, workspace: Workspace, name: str | None = None, id: str | None = None, tags: Any = None, **given: Any
    ) -> None:
        known = dict.fromkeys(("tags", "properties", "version", "run_id", "model_framework"))
        wanted = take_options("Model", {"tags": tags, **given}, known, {})
        self.workspace = workspace
        reference = id or name
        if reference is None:
            raise UserErrorException("Model() needs a name, or id='name:version'")
        plain, _, number = reference.partition(":")
        version = wanted.pop("version")
        number = str(version) if version is not None else number
        versions = _versions(workspace, plain)
        found = [model for model in versions if not number or str(model.version) == number]
        found = [model for model in found if _fits(model, wanted)]
        if not found:
            asked = ", ".join(f"{key}={value!r}" for key, value in wanted.items() if value is not None)
            names = _registry(workspace).names()
            has = ", ".join(model.id for model in versions) or f"{', '.join(names) or 'none'}{did_you_mean(plain, names)}"
            raise ModelNotFoundException(
                f"ModelNotFound: no model {plain!r}{f' of version {number}' if number else ''}"
                f"{f' with {asked}' if asked else ''} in workspace {workspace.name!r}; it has {has}"
            )
        self._version = found[-1]

    @staticmethod
    def _of(workspace: Workspace, version: ModelVersion) -> Model:
        model = object.__new__(Model)
        model.workspace, model._version = workspace, version
        return model

    @property
    def name(self) -> str:
        return self._version.name

    @property
    def version(self) -> int:
        return self._version.version

    @property
    def id(self) -> str:
        return self._version.id

    @property
    def description(self) -> str:
        return self._version.tags.get(f"{_PREFIX}description", self._version.description)

    @property
    def tags(self) -> dict[str, str]:
        return {key: value for key, value in self._version.tags.items() if not key.startswith(_PREFIX)}

    @property
    def properties(self) -> dict[str, str]:
        return _properties(self._version)

    @property
    def model_framework(self) -> str | None:
        return _kept(self._version).get("model_framework")

    @property
    def model_framework_version(self) -> str | None:
        return _kept(self._version).get("model_framework_version")

    @property
    def run_id(self) -> str:
        return self._version.run

    @property
    def created_time(self) -> str:
        return self._version.created

    @property
    def url(self) -> str:
        return _registry(self.workspace).layout.record(self.name, self.version).absolute().as_uri()

    @property
    def run(self) -> Run:
        from dtrain.azureml.run import Run

        return Run.get(self.workspace, self._version.run)

    @staticmethod
    def list(
        workspace: Workspace,
        name: str | None = None,
        tags: Any = None,
        properties: Any = None,
        run_id: str | None = None,
        latest: bool = False,
        **given: Any,
    ) -> list[Model]:  # long because the SDK's signature is this
        """The models of a workspace, newest version first; ``latest``: one of each name."""
        known = {"expand": True, "page_count": 255, "model_framework": None}
        wanted = {
            **take_options("Model.list", given, known, {"dataset_id": NO_DEPLOY}),
            "tags": tags,
            "properties": properties,
            "run_id": run_id,
        }
        found = []
        for each in _registry(workspace).names() if name is None else [name]:
            versions = [model for model in _versions(workspace, each) if _fits(model, wanted)]
            found += [Model._of(workspace, model) for model in reversed(versions[-1:] if latest else versions)]
        return found

    @staticmethod
    def register(
        workspace: Workspace, model_path: str, model_name: str, tags: Any = None, properties: Any = None, **given: Any
    ) -> Model:
        """Register a local file or folder as the next version of ``model_name``. Blocks until it is kept.

        Raises UserErrorException when there is no such file.
        """
        placed = {"tags": tags, "properties": properties}
        options = take_options("Model.register", {**placed, **given}, REGISTER, REGISTER_REFUSED)
        source = Path(model_path)
        if not source.exists():
            raise UserErrorException(f"there is no file or folder {model_path!r} to register (from {Path.cwd()})")
        try:
            run = new_run(workspace._folder, "register-model", display_name=f"{model_name} from {source.absolute()}")
            target = run.outputs / source.absolute().name
            if source.is_dir():
                shutil.copytree(source, target)
            else:
                shutil.copyfile(source, target)
            end_by_hand(run, "", exit_code=0)
            return register_from_run(workspace, run, model_name, f"outputs/{target.name}", options)
        except DtrainError as error:
            raise UserErrorException(str(error)) from error

    def download(self, target_dir: str | None = ".", exist_ok: bool = False, exists_ok: bool | None = None) -> str:
        """Copy the model to ``target_dir`` (None: here), verified, and return the path of its file or folder there. Blocks.

        Raises UserErrorException when it is there already, unless ``exist_ok``, or cannot be. All ranks may do so at once.
        """
        target, replace = Path(target_dir or ".") / self._entry, exist_ok or bool(exists_ok)
        try:
            fetched = (replace or not target.exists()) and self._fetch(target, replace=replace)
        except OSError as error:
            raise UserErrorException(f"model {self.id} cannot be written to {target_dir!r}: {error.strerror or error}") from error
        if not fetched:
            raise UserErrorException(f"{target} is there already; exist_ok=True replaces it")
        return str(target)

    def _fetch(self, target: Path, *, replace: bool) -> bool:
        return fetch(_registry(self.workspace), self.id, target, None if self._is_folder else self._entry, replace=replace)

    @property
    def _is_folder(self) -> bool:
        return _kept(self._version).get("folder", len(self._version.files) > 1) is True

    @property
    def _entry(self) -> str:
        """The name of the model's file or folder, as it was registered."""
        if not self._is_folder:
            return self._version.files[0].path
        return PurePosixPath(self._version.source or "outputs").name

    @staticmethod
    def get_model_path(model_name: str, version: int | None = None, _workspace: Workspace | None = None) -> str:
        """The path of a model's file or folder; downloaded where it is not there yet. Raises ModelNotFoundException."""
        from dtrain.azureml.context import current_run
        from dtrain.azureml.run import Run
        from dtrain.env import RankEnv

        workspace = _workspace
        if workspace is None and RankEnv.read().run_dir is not None:
            run = current_run(allow_offline=False)
            assert isinstance(run, Run)
            workspace = run.experiment.workspace
        model = Model(workspace or Workspace.from_config(), model_name, version=version)
        folder = Path("azureml-models") / model.name / str(model.version)
        path = folder / model._entry
        if not path.exists():
            model._fetch(path, replace=False)
        return str(path)

    def delete(self) -> None:
        """Remove this version for good, with those of its files that no other has. Raises UserErrorException where it is gone."""
        try:
            _registry(self.workspace).delete(self.id)
        except RegistryError as error:
            raise UserErrorException(str(error)) from error

    def add_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of this version."""
        self._set({str(key): str(value) for key, value in tags.items()})

    def remove_tags(self, tags: str | Iterable[str]) -> None:
        """Take tags away, by their keys."""
        self._set(dict.fromkeys([tags] if isinstance(tags, str) else tags))

    def add_properties(self, properties: Mapping[str, str]) -> None:
        """Add properties, which never change. Raises UserErrorException for one that has another value; none is added then."""
        known, texts = self.properties, {str(key): str(value) for key, value in properties.items()}
        for key, value in texts.items():
            if known.get(key, value) != value:
                raise UserErrorException(
                    f"property {key!r} of model {self.id} is {known[key]!r} and cannot be changed; add_tags() sets what can"
                )
        self._set({f"{_PROPERTY}{key}": value for key, value in texts.items()})

    def update(self, tags: Mapping[str, str] | None = None, description: str | None = None, **given: Any) -> None:
        """Replace all tags, or the description, or both."""
        take_options("Model.update", given, {}, REGISTER_REFUSED)
        changes: dict[str, str | None] = {}
        if tags is not None:
            changes = {**dict.fromkeys(self.tags), **{str(key): str(value) for key, value in tags.items()}}
        if description is not None:
            changes[f"{_PREFIX}description"] = description
        self._set(changes)

    def _set(self, tags: Mapping[str, str | None]) -> None:
        """Set tags of the registry's; None takes one away."""
        registry = _registry(self.workspace)
        try:
            for key, value in tags.items():
                registry.tag(self.id, key, value)
            self._version = registry.get(self.id)
        except RegistryError as error:
            raise UserErrorException(str(error)) from error

    def serialize(self) -> dict[str, Any]:
        """The model as a dict of JSON's types, with the keys of Azure's models."""
        return {
            "id": self.id,
            "name": self.name,
            "version": self.version,
            "description": self.description,
            "framework": self.model_framework,
            "frameworkVersion": self.model_framework_version,
            "tags": self.tags,
            "properties": self.properties,
            "createdTime": self.created_time,
            "runId": self.run_id,
        }

    @staticmethod
    def deserialize(workspace: Workspace, model_payload: Mapping[str, Any]) -> Model:
        """The model of the workspace that such a dict is of, as it is now. Raises ModelNotFoundException when it is not there."""
        return Model(workspace, id=model_payload["id"])

    def __repr__(self) -> str:
        return f"Model(name={self.name!r}, version={self.version}, workspace={self.workspace.name!r})"


def _registry(workspace: Workspace) -> Registry:
    return Registry(workspace._folder.registry)


def _versions(workspace: Workspace, name: str) -> list[ModelVersion]:
    registry = _registry(workspace)
    return registry.versions(name) if name in registry.names() else []


def _kept(version: ModelVersion) -> dict[str, Any]:
    """What the SDK knows of a model beyond the registry's record."""
    text = version.tags.get(f"{_PREFIX}model")
    return dict(json.loads(text)) if text else {}


def _properties(version: ModelVersion) -> dict[str, str]:
    """Those of the registration, and those that were added."""
    added = {key.removeprefix(_PROPERTY): value for key, value in version.tags.items() if key.startswith(_PROPERTY)}
    return {**added, **_kept(version).get("properties", {})}


def _fits(version: ModelVersion, wanted: Mapping[str, Any]) -> bool:
    """Whether a version is as asked for. Tags and properties: lists of names, or of (name, value), as the SDK takes them."""
    for key, having in (("tags", dict(version.tags)), ("properties", _properties(version))):
        asked = wanted.get(key) or []
        for item in asked.items() if isinstance(asked, Mapping) else asked:
            name, value = (item, None) if isinstance(item, str) else (item[0], item[1])
            if name not in having or (value is not None and having[name] != value):
                return False
    run_id, framework = wanted.get("run_id"), wanted.get("model_framework")
    return run_id in (None, version.run) and framework in (None, _kept(version).get("model_framework"))


def register_from_run(workspace: Workspace, run: RunLayout, name: str, path: str | None, options: Mapping[str, Any]) -> Model:
    """Register a file or folder of a run by its name there (None or ``outputs``: all outputs). Raises DtrainError."""
    wanted = (path or "").strip("/").removeprefix("./")
    source: str | None = None
    if wanted not in ("", ".", "outputs"):
        inside = _inside(run, wanted)
        source = inside.relative_to(run.root).as_posix()
        is_folder = inside.is_dir()
    else:
        is_folder = True
    kept = {"folder": is_folder, "properties": {str(k): str(v) for k, v in (options["properties"] or {}).items()}}
    kept.update({key: options[key] for key in ("model_framework", "model_framework_version") if options[key] is not None})
    tags = {str(key): str(value) for key, value in (options["tags"] or {}).items()}
    status = read_status(run)
    version = _registry(workspace).register(
        run,
        name,
        path=source,
        tags={**tags, f"{_PREFIX}model": json.dumps(kept)},
        description=options["description"] or "",
        any_state="also running" if status.state == "running" else True,
    )
    return Model._of(workspace, version)


def _inside(run: RunLayout, name: str) -> Path:
    """The file or folder of the run that ``name`` means."""
    target = files.target_of(run, name)
    if target.exists():
        if not target.is_relative_to(run.outputs):
            raise RegistryError(f"{name!r} is not in the run's outputs; let the script write models to ./outputs")
        return target
    uploads = AzureLayout(run).uploads
    known = sorted(path for path in files.run_files(run) if path.startswith("outputs/") or (uploads / path).exists())
    raise RegistryError(f"run {run.id} has no {name!r} to register; it has {', '.join(known[:12]) or 'no outputs'}")
