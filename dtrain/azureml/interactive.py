"""Run folders that no launcher makes: of ``start_logging``, child runs, offline runs, and models registered from local files."""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dtrain.azureml import files
from dtrain.azureml.errors import UserErrorException
from dtrain.azureml.records import Submitted, write_submitted
from dtrain.azureml.state import end_by_hand
from dtrain.errors import UsageError, WorkspaceError
from dtrain.files import write_json
from dtrain.layout import RunLayout, Workspace
from dtrain.processes import ProcessRecord
from dtrain.snapshot import take_snapshot
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


@dataclass(frozen=True)
class Watched:
    """A folder that a run of ``start_logging`` keeps the new files of: under ``name``, what was there ``before`` (size in bytes
    and time of change, by path) left out. ``began``: the file system's clock then, in nanoseconds."""

    folder: Path
    name: str
    before: dict[str, tuple[int, int]]
    began: int

    def changed(self) -> dict[str, Path]:
        """The files made or changed since, by their names in the run."""
        now = files.list_folder(self.folder)
        new = [path for path, state in now.items() if self.before.get(path) != state or state[1] >= self.began]
        return {f"{self.name}/{path}": self.folder / path for path in new}


_watched: dict[Path, list[Watched]] = {}
"""Of this process's runs, by their folders."""


def watch_folders(run: RunLayout, names: tuple[str, ...]) -> None:
    """Make the folders ``names`` here, and keep what is written to them until :func:`keep_files`. Blocks to list them."""
    for name in names:
        folder = Path(name).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            began = os.fstat(probe.fileno()).st_mtime_ns
        watched = Watched(folder, Path(name).name, files.list_folder(folder), began)
        _watched.setdefault(run.root, []).append(watched)


def keep_files(run: RunLayout) -> None:
    """Copy what was written to the watched folders into the run; a file that was uploaded under its name stays. Blocks.

    Called when the run ends; of a run that another process began, nothing is watched here.
    """
    for watched in _watched.pop(run.root, []):
        for name, path in watched.changed().items():
            if not (target := files.target_of(run, name)).exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)


def keep_source(run: RunLayout, source: Path) -> None:
    """Copy a source file or folder into the run, in place of one that was copied before. Blocks.

    Raises UserErrorException for what is not there, too big, or cannot be read.
    """
    if not source.exists():
        raise UserErrorException(f"there is no file or folder {str(source)!r} to keep (from {Path.cwd()})")
    for child in run.code.iterdir():
        if child.name in ("outputs", "logs"):
            continue
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        else:
            child.unlink()
    if not source.is_dir():
        shutil.copy(source, run.code)
        return
    try:
        take_snapshot(source.absolute(), run.code, excluded=run.workspace.root)
    except UsageError as error:
        raise UserErrorException(str(error)) from error
