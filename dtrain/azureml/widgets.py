"""``RunDetails``: a run at a glance; in a notebook live, elsewhere as text."""

from __future__ import annotations

import contextlib
import html
import sys
import threading
from typing import Any, ClassVar

from dtrain.azureml.console import say
from dtrain.azureml.errors import Named, UserErrorException
from dtrain.azureml.files import log_files
from dtrain.azureml.run import Run
from dtrain.azureml.state import ENDED
from dtrain.errors import DtrainError

_LINES = 10
_TAIL_BYTES = 20_000
_REFRESH_S = 1.0


class RunDetails(Named):
    """A run to be shown. Called by control scripts and notebooks."""

    _differs: ClassVar = {
        "show": "in a notebook state, metrics and the end of rank 0's log, anew every second until the run has ended; elsewhere "
        "the same as text, once",
    }

    def __init__(self, run_instance: Run) -> None:
        if not isinstance(run_instance, Run):
            raise UserErrorException(f"RunDetails takes a run, not {type(run_instance).__name__}")
        self.run = run_instance

    def show(self, render_lib: Any = None, widget_settings: Any = None) -> None:
        """Show the run's state, its metrics and the last lines of rank 0's log; does not wait.

        In a notebook a thread of this process shows them anew, until the run has ended.
        """
        display = _notebook()
        if display is None:
            say(_text(self.get_widget_data()))
            return
        handle = display.display(display.HTML(_page(self.get_widget_data())), display_id=True)
        threading.Thread(target=self._follow, args=(display, handle), daemon=True, name=f"show {self.run.id}").start()

    def _follow(self, display: Any, handle: Any) -> None:
        waits = threading.Event()
        while True:
            ended = self.run.get_status() in ENDED
            with contextlib.suppress(DtrainError, OSError):  # a file that is just being made: shown the next time
                handle.update(display.HTML(_page(self.get_widget_data())))
            if ended:
                return
            waits.wait(_REFRESH_S)

    def get_widget_data(self, widget_settings: Any = None) -> dict[str, Any]:
        """What :meth:`show` shows, as a dict."""
        return {
            "run_id": self.run.id,
            "experiment": self.run.experiment.name,
            "status": self.run.get_status(),
            "run_metrics": self.run.get_metrics(),
            "run_logs": self._last_lines(),
        }

    def _last_lines(self) -> list[str]:
        first = next(iter(log_files(self.run._layout).values()), None)
        if first is None:
            return []
        with open(first, "rb") as file:
            file.seek(max(0, first.stat().st_size - _TAIL_BYTES))
            return file.read().decode(errors="replace").splitlines()[-_LINES:]


def _notebook() -> Any:
    """IPython's display module where a notebook shows what is displayed; else None."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return sys.modules.get("IPython.display") if shell is not None and getattr(shell, "kernel", None) is not None else None


def _shown(value: Any) -> str:
    return f"{value[-1]} (last of {len(value)})" if isinstance(value, list) else str(value)


def _text(data: dict[str, Any]) -> str:
    lines = [f"run {data['run_id']} of experiment {data['experiment']}: {data['status']}"]
    lines += [f"  {name}: {_shown(value)}" for name, value in data["run_metrics"].items()]
    lines += [f"  | {line}" for line in data["run_logs"]]
    if data["status"] not in ENDED:
        lines.append(
            f"  run.wait_for_completion(show_output=True) or `dtrain logs {data['run_id']} --follow` shows how it goes on"
        )
    return "\n".join(lines)


def _page(data: dict[str, Any]) -> str:
    rows = [("run", data["run_id"]), ("experiment", data["experiment"]), ("state", data["status"])]
    rows += [(name, _shown(value)) for name, value in data["run_metrics"].items()]
    cells = "".join(f"<tr><th>{html.escape(str(name))}</th><td>{html.escape(str(value))}</td></tr>" for name, value in rows)
    return f"<table>{cells}</table><pre>{html.escape(chr(10).join(data['run_logs']))}</pre>"
