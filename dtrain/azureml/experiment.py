"""``Experiment``: the runs of one name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from dtrain.azureml import records
from dtrain.azureml.errors import Named, UserErrorException
from dtrain.azureml.family import runs_of
from dtrain.azureml.hyperdrive_run import run_of
from dtrain.azureml.interactive import new_run, watch_folders
from dtrain.azureml.run import Run
from dtrain.azureml.sweep import submit_config
from dtrain.azureml.values import dict_of
from dtrain.azureml.workspace import Workspace
from dtrain.errors import UsageError, did_you_mean
from dtrain.layout import check_name

_VIEWS = ("ActiveOnly", "ArchivedOnly", "All")


class Experiment(Named):
    """An experiment of a workspace, by its name; it need not have a run yet. Called by control scripts.

    Raises UserErrorException for a name that cannot be.
    """

    _fields: ClassVar = ("workspace", "name")
    _refused: ClassVar = {
        "archive": "an experiment is its runs: remove the folders of those that are not needed, `dtrain runs` lists them",
        "delete": "an experiment is its runs: remove the folders of those that are not needed, `dtrain runs` lists them",
        "get_docs_url": "see docs/azureml.md",
        "reactivate": "experiments are never archived here",
        "refresh": "an experiment is read anew whenever it is asked",
        "remove_tags": "tag runs: run.tag(key, value)",
        "set_tags": "tag runs: run.tag(key, value)",
        "tag": "tag runs: run.tag(key, value)",
    }
    _differs: ClassVar = {
        "get_portal_url": "there is no portal: the folder of all runs, as a file:// URL",
        "submit": "runs on this machine, by a `dtrain run` of its own that outlives the control script",
        "start_logging": "a run folder whose one rank is this process; ./outputs and ./logs are kept when it ends, and "
        "snapshot_directory is copied where it is given",
    }

    def __init__(self, workspace: Workspace, name: str) -> None:
        try:
            self.name = check_name("experiment", name)
        except UsageError as error:
            raise UserErrorException(str(error)) from error
        self.workspace = workspace

    def submit(self, config: Any, tags: Mapping[str, str] | None = None, **given: Any) -> Run:
        """Start a job as ``config`` (a ScriptRunConfig or an estimator) says, or the sweep of a HyperDriveConfig, and return its
        run; does not wait for it.

        Raises UserErrorException for what cannot be started, ComputeTargetException for nodes that are not there.
        """
        for name in given:
            near = did_you_mean(name, ("config", "tags"))
            raise TypeError(f"Experiment.submit() has no argument {name!r}{near}; set it in the ScriptRunConfig or the estimator")
        wanted = dict_of("tags", tags)
        run = run_of(self, submit_config(self.workspace, self.name, config).id)
        run.set_tags(wanted)
        return run

    def start_logging(self, *, outputs: Any = None, snapshot_directory: str | None = None, **given: Any) -> Run:
        """A run of this very process, which logs to it and ends it by ``run.complete()``.

        Makes ./outputs (another folder by ``outputs``; False: none) and ./logs, and keeps what is written there until then.
        """
        display_name = given.pop("display_name", "")
        for name in given:
            raise TypeError(f"Experiment.start_logging() has no argument {name!r}")
        layout = new_run(self.workspace._folder, self.name, display_name=display_name)
        run = Run(self, layout.id)
        if snapshot_directory is not None:
            run.take_snapshot(snapshot_directory)
        watch_folders(layout, ("logs",) if outputs is False else ("logs", str(outputs or "outputs")))
        return run

    def get_runs(
        self,
        type: str | None = None,
        tags: Any = None,
        properties: Any = None,
        include_children: bool = False,
        status: str | None = None,
    ) -> Iterator[Run]:
        """The runs of the experiment, newest first. ``tags`` and ``properties``: a name, or a dict of names and values."""
        for layout in reversed(runs_of(self.workspace._folder, self.name)):
            if not include_children and records.read_submitted(layout).parent:
                continue
            run = run_of(self, layout.id)
            fits = type in (None, run.type) and _has(run.get_tags(), tags) and _has(run.get_properties(), properties)
            if fits and status in (None, run.get_status()):
                yield run

    @staticmethod
    def list(
        workspace: Workspace, experiment_name: str | None = None, view_type: str = "ActiveOnly", tags: Any = None
    ) -> list[Experiment]:
        """The experiments that have a run; none is archived, nor has tags of its own."""
        if view_type not in _VIEWS:
            raise UserErrorException(f"view_type={view_type!r} is not one of {', '.join(_VIEWS)}")
        if view_type == "ArchivedOnly" or tags:
            return []
        return [each for name, each in workspace.experiments.items() if experiment_name in (None, name)]

    def get_portal_url(self) -> str:
        """The folder of all runs, as a URL."""
        return self.workspace._folder.runs.absolute().as_uri()

    @property
    def id(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"Experiment(name={self.name!r}, workspace={self.workspace.name!r})"


def _has(found: Mapping[str, str | None], wanted: Any) -> bool:
    if wanted is None:
        return True
    if isinstance(wanted, str):
        return wanted in found
    return all(found.get(key) == value for key, value in dict(wanted).items())
