"""``HyperDriveRun``: the run of a sweep, and what its children have come to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from dtrain.azureml.console import warn
from dtrain.azureml.errors import UserErrorException
from dtrain.azureml.hyperdrive import PrimaryMetricGoal
from dtrain.azureml.run import Run
from dtrain.azureml.state import ENDED
from dtrain.azureml.sweep import TAG, logged_values, sweep_record

if TYPE_CHECKING:
    from dtrain.azureml.experiment import Experiment

RUN_TYPE = "hyperdrive"


class HyperDriveRun(Run):
    """The run of a HyperDriveConfig, by its experiment and id. Raises UserErrorException when there is none.

    ``cancel()`` ends its children, too; ``wait_for_completion()`` waits for all.
    """

    RUN_TYPE = RUN_TYPE
    _refused: ClassVar = {
        **Run._refused,
        **dict.fromkeys(("get_diagnostics", "get_termination_reason"), "get_all_logs() has what was decided, with the values"),
        "hyperdrive_config": "get_details()['runDefinition']['hyperDrive'] tells of it",
    }
    _differs: ClassVar = {
        **Run._differs,
        "cancel": "ends its children, and then itself; of one that was killed the children that go on",
        "get_metrics": "a dict of the children's, by run id; of each rank 0's",
    }

    def __init__(self, experiment: Experiment, run_id: str, hyperdrive_config: Any = None, **given: Any) -> None:
        super().__init__(experiment, run_id, **given)
        record = sweep_record(self._layout)
        if record is None:
            raise UserErrorException(f"run {run_id!r} is none of a HyperDriveConfig; Run(experiment, id) is a run of any kind")
        self._metric: str = record["primaryMetricName"]
        self._goal = PrimaryMetricGoal[record["primaryMetricGoal"]]

    @property
    def type(self) -> str:
        return RUN_TYPE

    def cancel(self) -> bool:  # type: ignore[override]  # as the SDK's
        """Ask it to end its children, and then itself; returns at once, with True.

        Of one that has ended (was killed, say), ask its children that go on. Those that cannot be asked are only warned of.
        """
        is_over = (now := self.get_status()) in ENDED
        left = [child for child in self.get_children() if child.get_status() not in ENDED] if is_over else []
        if not left:
            super().cancel()
            return True
        warn(f"run {self.id} is {now} already; its children that go on are canceled: {', '.join(child.id for child in left)}")
        for child in left:
            try:
                child.cancel()
            except UserErrorException as error:
                warn(str(error))
        return True

    def get_metrics(
        self, name: str | None = None, recursive: bool = False, run_type: Any = None, populate: bool = False, ranks: str = "0"
    ) -> dict[Any, Any]:
        """The children's metrics by their ids, each as its own :meth:`Run.get_metrics` gives them."""
        runs = self._below() if recursive else list(self.get_children())
        return {run.id: run.get_metrics(name, run_type=run_type, populate=populate, ranks=ranks) for run in runs}

    def get_hyperparameters(self) -> dict[str, str | None]:
        """The children's settings by their ids, each as JSON text."""
        return {run.id: run.get_tags().get(TAG) for run in self.get_children()}

    def get_children_sorted_by_primary_metric(
        self, top: int = 0, reverse: bool = False, discard_no_metric: bool = False
    ) -> list[dict[str, Any]]:
        """A dict for each child, the best first (``reverse``: the worst), and those without the metric last; 0: all of them.

        Its keys are run_id, hyperparameters (JSON text), best_primary_metric (a number or None) and status.
        """
        rows = [self._row(run) for run in self.get_children()]
        found = [row for row in rows if row["best_primary_metric"] is not None]
        found.sort(key=lambda row: row["best_primary_metric"] * self._goal.sign, reverse=not reverse)
        without = [] if discard_no_metric else [row for row in rows if row["best_primary_metric"] is None]
        return (found + without)[: top or None]

    def _row(self, run: Run) -> dict[str, Any]:
        values = logged_values(run._layout, self._metric)
        best = max(values, key=lambda value: value * self._goal.sign, default=None)
        return {
            "run_id": run.id,
            "hyperparameters": run.get_tags().get(TAG),
            "best_primary_metric": best,
            "status": run.get_status(),
        }

    def get_best_run_by_primary_metric(
        self, include_failed: bool = True, include_canceled: bool = True, include_resume_from_runs: bool = True
    ) -> Run | None:
        """The child that has logged the best value of the primary metric; None where none has logged it."""
        left_out = {name for name, taken in (("Failed", include_failed), ("Canceled", include_canceled)) if not taken}
        rows = self.get_children_sorted_by_primary_metric(discard_no_metric=True)
        best = next((row["run_id"] for row in rows if row["status"] not in left_out), None)
        return None if best is None else self._run(best)


def run_of(experiment: Experiment, run_id: str) -> Run:
    """The run of that id, of the class that it is of. Raises UserErrorException when there is none."""
    run = Run(experiment, run_id)
    return run if sweep_record(run._layout) is None else HyperDriveRun(experiment, run_id)
