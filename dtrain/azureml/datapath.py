"""``DataPath``: a place in a datastore, or a run's outputs, from which another run goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from dtrain.azureml.datastore import ARTIFACTS, DataReference, Datastore
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
        self._target = datastore.path(path_on_datastore, name).as_mount()
        self.datastore_name, self.path_on_datastore = datastore.name, path_on_datastore

    @staticmethod
    def create_from_data_reference(data_reference: DataReference) -> DataPath:
        """The place that a reference names."""
        made = DataPath(data_reference.datastore, data_reference.path_on_datastore, data_reference._given_name)
        made._target = data_reference
        return made

    def create_data_reference(
        self, data_reference_name: str | None = None, datapath_compute_binding: DataPathComputeBinding | None = None
    ) -> DataReference:
        """A reference to the place, for arguments and ``data_references``; mounted, unless the binding says otherwise."""
        mode = (datapath_compute_binding or DataPathComputeBinding()).mode
        place = self._target
        return DataReference(place.datastore, data_reference_name or place.data_reference_name, place.path_on_datastore, mode)

    @staticmethod
    def _of_outputs(run: Run) -> DataPath:
        return DataPath(Datastore(run.experiment.workspace, ARTIFACTS), f"{run.id}/outputs", "outputs")


class DataPathComputeBinding(Named):
    """How a job is given a :class:`DataPath`: ``mount`` or ``download``."""

    _fields: ClassVar = ("mode", "path_on_compute", "overwrite")
    _differs: ClassVar = {"(path_on_compute=)": "not used: the job is given a path of its own"}

    def __init__(self, mode: str = "mount", path_on_compute: str | None = None, overwrite: bool = False) -> None:
        self.mode, self.path_on_compute, self.overwrite = mode, path_on_compute, overwrite
