"""Run folders that no launcher makes: of ``start_logging``, child runs, offline runs, and models registered from local files."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import time
from typing import Literal

from dtrain.azureml.records import Submitted, write_submitted
from dtrain.azureml.state import end_by_hand
from dtrain.errors import WorkspaceError
from dtrain.files import write_json
from dtrain.layout import RunLayout, Workspace
from dtrain.processes import ProcessRecord
from dtrain.status import RunStatus, read_status, write_record


def new_run(
    workspace: Workspace,
    experiment: str,
    *,
    kind: Literal["interactive", "offline"] = "interactive",
    display_name: str = "",
    parent: str = "",
) -> RunLayout:
    """A run folder whose one rank is this process; one that is left open when the process ends has failed of that.

    Raises UsageError for a bad name, WorkspaceError when it cannot be made.
    """
    run = workspace.create_run(experiment)
    run.make_folders(1)
    script = getattr(sys.modules["__main__"], "__file__", None) or "interactive"
    spec = {
        "target": str(script),
        "is_module": False,
        "args": [],
        "source": os.getcwd(),
        "workers": 1,
        "launcher": "alone",
        "experiment": experiment,
        "resume_from": None,
    }
    definition = {"script": str(script), "arguments": [], "target": "local", "nodeCount": 1}
    record = Submitted(experiment=experiment, kind=kind, display_name=display_name, parent=parent, definition=definition)
    write_submitted(run, record)
    write_record(run.rank(0).process, ProcessRecord.of(os.getpid()))
    write_record(run.status, RunStatus(state="running", size=1, started=time.time()))
    write_json(run.spec, spec)  # last: with it the run is there
    if kind == "interactive":
        atexit.register(_end_if_open, run, os.getpid())
    return run


def _end_if_open(run: RunLayout, pid: int) -> None:
    with contextlib.suppress(WorkspaceError):  # somebody removed it
        if os.getpid() == pid and read_status(run).state == "running":
            end_by_hand(run, "its process ended without complete()", exit_code=1)
