"""The runs below a run: made by it, submitted by it, listed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dtrain.azureml import records
from dtrain.azureml.errors import UserErrorException
from dtrain.azureml.interactive import new_run
from dtrain.azureml.logged import Logged
from dtrain.azureml.values import dict_of
from dtrain.files import read_json
from dtrain.layout import RunLayout
from dtrain.layout import Workspace as WorkspaceFolder

if TYPE_CHECKING:
    from dtrain.azureml.experiment import Experiment
    from dtrain.azureml.run import Run


class Family(Logged):
    """What :class:`Run` can do with the runs below it, and the one above."""

    experiment: Experiment

    def _run(self, run_id: str) -> Run:
        from dtrain.azureml.hyperdrive_run import run_of

        return run_of(self.experiment, run_id)

    def child_run(self, name: str | None = None, run_id: str | None = None, outputs: str | None = None) -> Run:
        """A run of this process below this one, in a folder of its own; ``complete()`` ends it."""
        if run_id is not None or outputs is not None:
            raise UserErrorException("child_run() takes a name alone: run ids are made by dtrain, ./outputs is the script's")
        folder = self.experiment.workspace._folder
        return self._run(new_run(folder, self.experiment.name, display_name=name or "", parent=self.id).id)

    def child_runs(self, count: int = 1) -> list[Run]:
        """Several runs as :meth:`child_run` makes one."""
        return [self.child_run() for _ in range(count)]

    def create_children(
        self, count: int | None = None, tag_key: Any = None, tag_values: Sequence[Any] | None = None
    ) -> list[Run]:
        """Several runs as :meth:`child_run` makes one; with ``tag_key``, one for each of ``tag_values``, tagged with it."""
        if (count is None) == (tag_values is None) or (tag_key is None) != (tag_values is None):
            raise UserErrorException("create_children() takes count=, or tag_key= and tag_values=")
        children = self.child_runs(len(tag_values) if tag_values is not None else count or 0)
        for child, value in zip(children, tag_values or (), strict=False):
            child.tag(tag_key, value)
        return children

    def submit_child(self, config: Any, tags: Mapping[str, str] | None = None) -> Run:
        """Start a job or a sweep as ``Experiment.submit`` does, below this run."""
        from dtrain.azureml.sweep import submit_config

        wanted = dict_of("tags", tags)
        child = self._run(submit_config(self.experiment.workspace, self.experiment.name, config, parent=self.id).id)
        child.set_tags(wanted)
        return child

    @property
    def parent(self) -> Run | None:
        parent = records.read_submitted(self._layout).parent
        return self._run(parent) if parent else None

    def get_children(
        self, recursive: bool = False, tags: Any = None, properties: Any = None, type: Any = None, status: str | None = None
    ) -> Iterator[Run]:
        """The runs below this one, newest first."""
        if tags is not None or properties is not None or type is not None:
            raise UserErrorException("get_children() takes recursive= and status=; look at each child's get_tags()")
        for layout in reversed(runs_of(self.experiment.workspace._folder, self.experiment.name)):
            if records.read_submitted(layout).parent == self.id:
                child = self._run(layout.id)
                if status in (None, child.get_status()):
                    yield child
                if recursive:
                    yield from child.get_children(recursive=True, status=status)

    def _below(self) -> Sequence[Run]:
        return [*self.get_children(recursive=True)]


def runs_of(folder: WorkspaceFolder, experiment: str) -> list[RunLayout]:
    """The run folders of an experiment, oldest first."""
    return [run for run in folder.list_runs() if read_json(run.spec)["experiment"] == experiment]
