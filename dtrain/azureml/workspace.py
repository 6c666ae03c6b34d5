"""``Workspace``: a dtrain workspace folder, found by a config.json as the SDK finds it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import orjson

from dtrain import env
from dtrain.azureml.authentication import NO_ACCOUNT, check_login
from dtrain.azureml.console import say, warn
from dtrain.azureml.errors import Named, UserErrorException, WorkspaceException, take_options
from dtrain.azureml.names import SECRETS
from dtrain.azureml.values import check_path
from dtrain.files import read_json, write_json
from dtrain.layout import Workspace as WorkspaceFolder

if TYPE_CHECKING:
    from dtrain.azureml.compute import ComputeTarget
    from dtrain.azureml.dataset import FileDataset
    from dtrain.azureml.datastore import Datastore
    from dtrain.azureml.environment import Environment
    from dtrain.azureml.experiment import Experiment
    from dtrain.azureml.model import Model
    from dtrain.azureml.run import Run

CONFIG_PLACES = ("config.json", ".azureml/config.json", "aml_config/config.json")

_CREATE = {
    "exist_ok": False,
    "show_output": True,
    "create_resource_group": True,
    "friendly_name": None,
    "tags": None,
    "sku": "basic",
}
_CREATE_REFUSED = {
    "storage_account": "the workspace's folder is its storage",
    "key_vault": SECRETS,
    "app_insights": "there is no such service",
    "container_registry": "jobs run in this Python environment, not in containers",
    "default_cpu_compute_target": "create compute targets with ComputeTarget.create",
    "default_gpu_compute_target": "create compute targets with ComputeTarget.create",
    "private_endpoint_config": "there is no network to keep out of",
}


class Workspace(Named):
    """A workspace, whose runs and models are those of dtrain's folder. Called by control scripts; nothing here blocks."""

    _refused: ClassVar = {
        "delete": "remove the workspace's folder yourself",
        "get_default_keyvault": SECRETS,
        "images": "models are registered and downloaded here, not deployed",
        "setup": "use Workspace.create, or `dtrain azureml init`",
        "sync_keys": NO_ACCOUNT,
        "webservices": "models are registered and downloaded here, not deployed",
        "get_mlflow_tracking_uri": "metrics are in the run's folder: run.get_metrics(), `dtrain metrics RUN`",
    }
    _differs: ClassVar = {
        "get_portal_url": "there is no portal: the workspace's folder, as a file:// URL",
        "from_config": "the config.json may be Azure's own; runs and models go to $DTRAIN_WORKSPACE, in a job to the job's "
        "workspace, else to its workspace_folder, else to the folder `workspace` beside it",
        "create": "makes a folder and .azureml/config.json here; location and the like are kept as words; friendly_name, tags "
        "and sku are not, and that is said",
        "list": "the one workspace that from_config finds",
    }

    def __init__(
        self,
        subscription_id: str,
        resource_group: str,
        workspace_name: str,
        auth: Any = None,
        *,
        folder: Path | None = None,
        location: str | None = None,
    ) -> None:
        """A workspace by its name. ``folder``: its folder; None: $DTRAIN_WORKSPACE, in a job the job's, else ./workspace.

        Raises WorkspaceException when the folder is that of a workspace of another name.
        """
        check_login(auth)
        self._folder = WorkspaceFolder(folder or _given_folder() or env.workspace().root)
        self._details = {
            "name": workspace_name,
            "subscription_id": subscription_id,
            "resource_group": resource_group,
            "location": location or "local",
        }
        try:
            known = read_json(self._record)
        except FileNotFoundError:
            return
        if known["name"] != workspace_name:
            raise WorkspaceException(
                f"workspace folder {self._folder.root} is that of {known['name']!r}, not of {workspace_name!r}; "
                "use that name, or another folder with DTRAIN_WORKSPACE"
            )
        self._details["location"] = known["location"]

    @property
    def _record(self) -> Path:
        return self._folder.azureml / "workspace.json"

    @staticmethod
    def from_config(path: str | None = None, auth: Any = None, _logger: Any = None, _file_name: str | None = None) -> Workspace:
        """The workspace that ``config.json`` describes: in ``path`` (a file, or a folder to begin in; None: this one), in
        ``.azureml`` or ``aml_config`` of it, or in a folder above. Raises UserErrorException when there is none."""
        check_path("path", path)
        config = _find_config(Path(path or ".").absolute(), _file_name)
        values = _read_config(config)
        missing = [key for key in ("subscription_id", "resource_group", "workspace_name") if key not in values]
        if missing:
            raise UserErrorException(f"{config} has no {', '.join(missing)}; `dtrain azureml init` writes a whole one")
        beside = config.parent.parent if config.parent.name in (".azureml", "aml_config") else config.parent
        folder = env.workspace(beside / values.get("workspace_folder", "workspace"), {}).root
        return Workspace(
            values["subscription_id"],
            values["resource_group"],
            values["workspace_name"],
            auth,
            folder=_given_folder() or folder,
            location=values.get("location"),
        )

    @staticmethod
    def create(
        name: str,
        auth: Any = None,
        subscription_id: str | None = None,
        resource_group: str | None = None,
        location: str | None = None,
        **given: Any,
    ) -> Workspace:
        """Make the workspace's folder (``./workspace``, or $DTRAIN_WORKSPACE) and ``.azureml/config.json`` here.

        Raises WorkspaceException when there is one already, unless ``exist_ok``, or one of another name.
        """
        if not re.fullmatch(r"[A-Za-z0-9][\w-]{1,259}", name):
            raise UserErrorException(f"workspace name {name!r} is not allowed; use 2 to 260 letters, digits, '_' or '-'")
        options = take_options("Workspace.create", given, _CREATE, _CREATE_REFUSED)
        for option in ("friendly_name", "tags", "sku"):
            if options[option] != _CREATE[option]:
                warn(f"Workspace.create({option}={options[option]!r}) is not kept: a workspace is a folder, with a name")
        workspace = Workspace(subscription_id or "local", resource_group or "local", name, auth, location=location)
        if workspace._record.exists() and not options["exist_ok"]:
            raise WorkspaceException(
                f"workspace {name!r} exists in {workspace._folder.root}; Workspace.from_config() opens it, and "
                "Workspace.create(name, exist_ok=True) writes its config.json again"
            )
        workspace._folder.azureml.mkdir(parents=True, exist_ok=True)
        write_json(workspace._record, workspace._details)
        workspace.write_config()
        if options["show_output"]:
            say(f"Workspace {name} is in {workspace._folder.root}")
        return workspace

    @staticmethod
    def get(
        name: str, auth: Any = None, subscription_id: str | None = None, resource_group: str | None = None, **given: Any
    ) -> Workspace:
        """The workspace of that name in this folder. Raises WorkspaceException when it is another."""
        take_options("Workspace.get", given, {"location": None, "cloud": None, "id": None}, {})
        return Workspace(subscription_id or "local", resource_group or "local", name, auth)

    @staticmethod
    def list(subscription_id: str | None = None, auth: Any = None, resource_group: str | None = None) -> dict[str, Any]:
        """Workspaces by name: the one that :meth:`from_config` finds."""
        workspace = Workspace.from_config(auth=auth)
        return {workspace.name: [workspace]}

    def write_config(self, path: str | None = None, file_name: str | None = None) -> None:
        """Write ``.azureml/config.json`` in ``path`` (None: this folder), for :meth:`from_config`."""
        target = Path(path or ".").absolute() / ".azureml" / (file_name or "config.json")
        target.parent.mkdir(parents=True, exist_ok=True)
        config = {
            "subscription_id": self.subscription_id,
            "resource_group": self.resource_group,
            "workspace_name": self.name,
            "location": self.location,
            "workspace_folder": str(self._folder.root),
        }
        write_json(target, config)

    @property
    def name(self) -> str:
        return self._details["name"]

    @property
    def subscription_id(self) -> str:
        return self._details["subscription_id"]

    @property
    def resource_group(self) -> str:
        return self._details["resource_group"]

    @property
    def location(self) -> str:
        return self._details["location"]

    def get_details(self) -> dict[str, Any]:
        """Name, location and the like, and the folder where everything lies."""
        return {**self._details, "workspace_folder": str(self._folder.root)}

    @property
    def experiments(self) -> Mapping[str, Experiment]:
        """Experiments that have a run, by name."""
        from dtrain.azureml.experiment import Experiment

        names = {read_json(run.spec)["experiment"]: None for run in self._folder.list_runs()}
        return {name: Experiment(self, name) for name in names}

    @property
    def compute_targets(self) -> Mapping[str, ComputeTarget]:
        """Compute targets by name."""
        from dtrain.azureml.compute import ComputeTarget

        return {target.name: target for target in ComputeTarget.list(self)}

    @property
    def datastores(self) -> Mapping[str, Datastore]:
        """Datastores by name."""
        from dtrain.azureml.datastore import datastores

        return datastores(self)

    @property
    def datasets(self) -> Mapping[str, FileDataset]:
        """The datasets that were registered, by name."""
        from dtrain.azureml.dataset import Dataset

        return Dataset.get_all(self)

    @property
    def environments(self) -> Mapping[str, Environment]:
        """The environments that were registered, by name."""
        from dtrain.azureml.environment import Environment

        return Environment.list(self)

    @property
    def models(self) -> Mapping[str, Model]:
        """The newest version of every model, by name."""
        from dtrain.azureml.model import Model

        return {model.name: model for model in Model.list(self, latest=True)}

    def get_default_datastore(self) -> Datastore:
        """The default datastore: ``workspaceblobstore``, a folder of the workspace, unless another was made the default."""
        from dtrain.azureml.datastore import Datastore

        return Datastore(self)

    def set_default_datastore(self, name: str) -> None:
        """Make a datastore the default one. Raises UserErrorException when there is none of that name."""
        from dtrain.azureml.stores import set_default

        set_default(self._folder, name)

    def get_portal_url(self) -> str:
        """The workspace's folder, as a URL."""
        return self._folder.root.absolute().as_uri()

    def get_run(self, run_id: str) -> Run:
        """A run by its id. Raises UserErrorException when there is none."""
        from dtrain.azureml.run import Run

        return Run.get(self, run_id)

    def __repr__(self) -> str:
        return f"Workspace(name={self.name!r}, folder={str(self._folder.root)!r})"


def _given_folder() -> Path | None:
    """The workspace's folder that $DTRAIN_WORKSPACE names, or that of the job that this process is a rank of."""
    run = env.run_of_job()
    return env.workspace_override() or (None if run is None else run.workspace.root)


def _find_config(start: Path, file_name: str | None) -> Path:
    if start.is_file():
        return start
    if not start.is_dir():
        raise UserErrorException(f"no workspace: there is no file or folder {start}; `dtrain azureml init` writes a config.json")
    places = CONFIG_PLACES if file_name is None else tuple(f"{Path(place).parent}/{file_name}" for place in CONFIG_PLACES)
    for folder in _upwards(start):
        for place in places:
            if (folder / place).is_file():
                return folder / place
    raise UserErrorException(
        f"no workspace: there is no {' or '.join(CONFIG_PLACES)} in {start} or a folder above; `dtrain azureml init` writes one"
    )


def _read_config(path: Path) -> dict[str, Any]:
    """What a config.json says, written by whomever. Raises UserErrorException for what is no JSON object."""
    try:
        values = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise UserErrorException(f"{path} is no JSON ({error}); mend it, or let `dtrain azureml init` write one") from error
    if not isinstance(values, dict):
        raise UserErrorException(f"{path} is no JSON object, with a workspace_name; `dtrain azureml init` writes one")
    return values


def _upwards(folder: Path) -> Iterator[Path]:
    yield folder
    yield from folder.parents
