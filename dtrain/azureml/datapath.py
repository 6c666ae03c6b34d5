"""``DataPath``: a place in a datastore, or a run's outputs, from which another run goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from dtrain.azureml.datastore import DataReference, Datastore
from dtrain.azureml.errors import Named, UserErrorException

if TYPE_CHECKING:
    from dtrain.azureml.run import Run


class DataPath(Named):
    """A file or folder of a datastore, for ``resume_from``. Called by control scripts."""

    _fields: ClassVar = ("datastore_name", "path_on_datastore")
    _differs: ClassVar = {
        "create_from_data_reference": "the same place; whether it is mounted or downloaded is the reference's",
    }

    def __init__(self, datastore: Datastore | None = None, path_on_datastore: str | None = None, name: str | None = None) -> None:
        """Raises UserErrorException without a datastore."""
        if not isinstance(datastore, Datastore):
            raise UserErrorException(f"DataPath(datastore={datastore!r}): give a Datastore, as ws.get_default_datastore()")
        self._target: DataReference | Run = datastore.path(path_on_datastore, name).as_mount()
        self.datastore_name, self.path_on_datastore = datastore.name, path_on_datastore

    @staticmethod
    def create_from_data_reference(data_reference: DataReference) -> DataPath:
        """The place that a reference names."""
        made = DataPath(data_reference.datastore, data_reference.path_on_datastore, data_reference.data_reference_name)
        made._target = data_reference
        return made

    @staticmethod
    def _of_outputs(run: Run) -> DataPath:
        made = object.__new__(DataPath)
        made._target = run
        made.datastore_name, made.path_on_datastore = "workspaceartifactstore", f"ExperimentRun/dcid.{run.id}/outputs"
        return made
