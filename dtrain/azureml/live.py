"""Where a notebook shows a run: widgets where ipywidgets is installed, else an output that is displayed anew."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from typing import Any, Protocol

from dtrain.azureml import glance

Reader = Callable[[str | None], dict[str, Any]]
"""Gives what is to be shown (``RunDetails.get_widget_data``), with the last lines of the log of that name; None: of the one that
says most."""


class View(Protocol):
    """A run in a cell's output."""

    def refresh(self) -> str:
        """Show the run as of now in place of what was shown, and return its state. Called by a thread beside the kernel's own.

        Raises what reading the run raises.
        """


class Page:
    """One output of HTML, which is displayed anew in its place."""

    def __init__(self, display: Any, read: Reader) -> None:
        """``display``: the module IPython.display."""
        self._display, self._read = display, read
        self._handle: Any = None

    def refresh(self) -> str:
        data = self._read(None)
        page = self._display.HTML(glance.state(data) + glance.metrics(data) + glance.log(data))
        if self._handle is None:
            self._handle = self._display.display(page, display_id=True)
        else:
            self._handle.update(page)
        return str(data["status"])


class Widgets:
    """The same as widgets, with a list of the ranks' logs to choose from."""

    def __init__(self, display: Any, ipywidgets: Any, read: Reader) -> None:
        self._read = read
        self._state, self._metrics, self._lines = ipywidgets.HTML(), ipywidgets.HTML(), ipywidgets.HTML()
        self._logs = ipywidgets.Dropdown(description="log", options=())
        self._logs.observe(lambda _: self.refresh(), names="value")  # in the kernel's thread, where the user has chosen
        display.display(ipywidgets.VBox([self._state, self._metrics, self._logs, self._lines]))

    def refresh(self) -> str:
        data = self._read(self._logs.value)
        if tuple(data["logs"]) != self._logs.options:
            self._logs.options = tuple(data["logs"])  # which chooses the first, and so refreshes
            self._logs.value = data["log"]
        self._state.value = glance.state(data)
        self._metrics.value = glance.metrics(data)
        self._lines.value = glance.log(data)
        return str(data["status"])


def find_view(read: Reader) -> View | None:
    """A view of what ``read`` gives, in the cell that is executed now; None where this process is no notebook's kernel."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if shell is None or getattr(shell, "kernel", None) is None:
        return None
    display = importlib.import_module("IPython.display")
    if importlib.util.find_spec("ipywidgets") is None:
        return Page(display, read)
    return Widgets(display, importlib.import_module("ipywidgets"), read)
