"""``RunDetails``: a run at a glance, as text."""

from __future__ import annotations

from typing import Any, ClassVar

from dtrain.azureml.console import say
from dtrain.azureml.errors import Named, UserErrorException
from dtrain.azureml.files import log_files
from dtrain.azureml.run import Run

_LINES = 10


class RunDetails(Named):
    """A run to be shown. Called by control scripts and notebooks."""

    _differs: ClassVar = {"show": "text, once: state, metrics, the end of rank 0's log; no live widget yet"}

    def __init__(self, run_instance: Run) -> None:
        if not isinstance(run_instance, Run):
            raise UserErrorException(f"RunDetails takes a run, not {type(run_instance).__name__}")
        self.run = run_instance

    def show(self, render_lib: Any = None, widget_settings: Any = None) -> None:
        """Print the run's state, its metrics and the last lines of rank 0's log, as of now; does not wait."""
        data = self.get_widget_data()
        say(f"run {data['run_id']} of experiment {self.run.experiment.name}: {data['status']}")
        for name, value in data["run_metrics"].items():
            shown = f"{value[-1]} (last of {len(value)})" if isinstance(value, list) else value
            say(f"  {name}: {shown}")
        for line in data["run_logs"]:
            say(f"  | {line}")
        if data["status"] not in ("Completed", "Failed", "Canceled"):
            say(f"  run.wait_for_completion(show_output=True) or `dtrain logs {data['run_id']} --follow` shows how it goes on")

    def get_widget_data(self, widget_settings: Any = None) -> dict[str, Any]:
        """What :meth:`show` shows, as a dict."""
        first = next(iter(log_files(self.run._layout).values()), None)
        lines = first.read_text(errors="replace").splitlines()[-_LINES:] if first is not None else []
        return {
            "run_id": self.run.id,
            "status": self.run.get_status(),
            "run_metrics": self.run.get_metrics(),
            "run_logs": lines,
        }
