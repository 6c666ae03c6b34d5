"""``RunDetails``: a run at a glance; in a notebook live, elsewhere as text."""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path
from typing import Any, ClassVar

from dtrain.azureml import glance, records, state
from dtrain.azureml.console import say
from dtrain.azureml.errors import Named, UserErrorException
from dtrain.azureml.files import log_name, rank_logs
from dtrain.azureml.live import View, find_view
from dtrain.azureml.run import Run
from dtrain.errors import DtrainError
from dtrain.launch.console import plain_lines

_LINES = 10
_TAIL_BYTES = 20_000
_REFRESH_S = 1.0
# Reading long metrics takes time that the notebook's own cells need.
_SHARE = 10


class RunDetails(Named):
    """A run to be shown. Called by control scripts and notebooks."""

    _fields: ClassVar = ("run",)
    _differs: ClassVar = {
        "show": "in a notebook state, metrics and the last lines of a log, anew every second until the run has ended: widgets "
        "where ipywidgets is installed, with every rank's log; elsewhere the same as text, once",
    }

    def __init__(self, run_instance: Run) -> None:
        if not isinstance(run_instance, Run):
            raise UserErrorException(f"RunDetails takes a run, not {type(run_instance).__name__}")
        self.run = run_instance

    def show(self, render_lib: Any = None, widget_settings: Any = None) -> None:
        """Show the run's state, its metrics and the last lines of a rank's log; does not wait.

        In a notebook a thread of this process shows them anew, until the run has ended.
        """
        for name, value in (("render_lib", render_lib), ("widget_settings", widget_settings)):
            if value is not None:
                raise UserErrorException(f"{name}= has no effect here; leave it out")
        view = find_view(self._data)
        if view is None:
            say(glance.as_text(self._data()))
            return
        view.refresh()  # in the cell that is executed now
        threading.Thread(target=self._follow, args=(view,), daemon=True, name=f"show {self.run.id}").start()

    def _follow(self, view: View) -> None:
        waits = threading.Event()
        while self.run._layout.root.is_dir():  # until somebody removes it
            began = time.monotonic()
            if self._refresh(view) in state.ENDED:
                return
            waits.wait(max(_REFRESH_S, _SHARE * (time.monotonic() - began)))

    def _refresh(self, view: View) -> str:
        """Show the run as of now, and return its state; empty where that cannot be told now."""
        with contextlib.suppress(DtrainError, OSError):  # a file that is just being made: shown the next time
            return view.refresh()
        return ""

    def get_widget_data(self, widget_settings: Any = None) -> dict[str, Any]:
        """What :meth:`show` shows, as a dict."""
        return self._data()

    def _data(self, log: str | None = None) -> dict[str, Any]:
        """The run as of now, with the last lines of ``log``; None: of the rank that failed first, else of rank 0."""
        shown = self.run.get_status()  # before the rest, which is whole when it is one of those at the end
        status = state.status_of(self.run._layout)
        logs = rank_logs(self.run._layout)
        notes = [status.cause] if shown in state.ENDED and status.cause else []
        notes += [event["text"] for event in records.events(self.run._layout, "warning")]
        metrics: dict[Any, Any] = {}
        try:
            metrics = self.run.get_metrics()
        except UserErrorException as error:  # of a name that was logged as numbers and as rows
            notes.append(str(error))
        log = log or log_name(status.failure.rank if status.failure is not None else 0)
        return {
            "run_id": self.run.id,
            "experiment": self.run.experiment.name,
            "status": shown,
            "seconds": status.duration_s if status.duration_s is not None else time.time() - status.started,
            "notes": notes,
            "run_metrics": metrics,
            "logs": list(logs),
            "log": log if log in logs else None,
            "run_logs": _last_lines(logs[log]) if log in logs else [],
        }


def _last_lines(path: Path) -> list[str]:
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        return plain_lines(file.read())[-_LINES:]
