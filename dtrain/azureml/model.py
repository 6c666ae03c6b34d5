"""``Model``: versions of dtrain's registry, by the SDK's names."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, ClassVar

from dtrain.azureml import files
from dtrain.azureml.errors import ModelNotFoundException, Named, UserErrorException, take_options
from dtrain.azureml.interactive import new_run
from dtrain.azureml.names import NO_DEPLOY
from dtrain.azureml.records import AzureLayout
from dtrain.azureml.state import end_by_hand
from dtrain.azureml.workspace import Workspace
from dtrain.errors import DtrainError, RegistryError
from dtrain.layout import RunLayout
from dtrain.registry import ModelVersion, Registry
from dtrain.status import read_status

if TYPE_CHECKING:
    from dtrain.azureml.run import Run

# Kept as tags of the registry's; not among the model's own tags.
_PREFIX = "azureml."
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
        "remove_tags": "set another value with add_tags",
        "remove_properties": "properties never change",
        "add_properties": "give properties when the model is registered",
        "serialize": "its attributes hold the same: name, version, tags, properties",
        "update": "set tags with add_tags; a description is given when a version is registered",
        "created_by": "there are no accounts here",
        "mime_type": "a model's files are kept as they are",
        "parent_id": "run_id is the run that it came from",
        "resource_configuration": NO_DEPLOY,
        "unpack": "a model's files are kept as they are",
    }
    _differs: ClassVar = {
        "delete": "also its files, where no other version has the same; its number is not used again",
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
        found = [model for model in _versions(workspace, plain) if not number or str(model.version) == number]
        found = [model for model in found if _fits(model, wanted)]
        if not found:
            asked = ", ".join(f"{key}={value!r}" for key, value in wanted.items() if value is not None)
            raise ModelNotFoundException(
                f"ModelNotFound: no model {plain!r}{f' of version {number}' if number else ''}"
                f"{f' with {asked}' if asked else ''} in workspace {workspace.name!r}; "
                f"it has {', '.join(_registry(workspace).names()) or 'none'}"
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
        return self._version.description

    @property
    def tags(self) -> dict[str, str]:
        return {key: value for key, value in self._version.tags.items() if not key.startswith(_PREFIX)}

    @property
    def properties(self) -> dict[str, str]:
        return dict(_kept(self._version).get("properties", {}))

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

    def download(self, target_dir: str = ".", exist_ok: bool = False, exists_ok: bool | None = None) -> str:
        """Copy the model to ``target_dir``, verified, and return the path of its file or folder there. Blocks.

        Raises UserErrorException when it is there already, unless ``exist_ok``.
        """
        folder = Path(target_dir)
        folder.mkdir(parents=True, exist_ok=True)
        name = self._entry
        target = folder / name
        if target.exists() and not (exist_ok or exists_ok):
            raise UserErrorException(f"{target} is there already; exist_ok=True replaces it")
        with tempfile.TemporaryDirectory(dir=folder, prefix=".dtrain-download-") as temporary:
            pulled = _registry(self.workspace).pull(self.id, Path(temporary) / "model")
            if target.is_dir():
                shutil.rmtree(target)
            shutil.move(pulled if self._is_folder else pulled / name, target)
        return str(target)

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
        return str(path) if path.exists() else model.download(str(folder))

    def delete(self) -> None:
        """Remove this version for good, with those of its files that no other has. Raises UserErrorException where it is gone."""
        try:
            _registry(self.workspace).delete(self.id)
        except RegistryError as error:
            raise UserErrorException(str(error)) from error

    def add_tags(self, tags: dict[str, str]) -> None:
        """Set tags of this version."""
        for key, value in tags.items():
            _registry(self.workspace).tag(self.id, key, value)
        self._version = _registry(self.workspace).get(self.id)

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


def _fits(version: ModelVersion, wanted: Mapping[str, Any]) -> bool:
    """Whether a version is as asked for. Tags and properties: lists of names, or of (name, value), as the SDK takes them."""
    kept = _kept(version)
    for key, having in (("tags", dict(version.tags)), ("properties", kept.get("properties", {}))):
        asked = wanted.get(key) or []
        for item in asked.items() if isinstance(asked, Mapping) else asked:
            name, value = (item, None) if isinstance(item, str) else (item[0], item[1])
            if name not in having or (value is not None and having[name] != value):
                return False
    run_id, framework = wanted.get("run_id"), wanted.get("model_framework")
    return run_id in (None, version.run) and framework in (None, kept.get("model_framework"))


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
