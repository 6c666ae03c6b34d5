"""``Run.get_context()``: the run that this process is a rank of, or an offline one."""

from __future__ import annotations

import atexit
import os
import sys
from typing import Any, ClassVar

from dtrain import env
from dtrain._ending import Ending
from dtrain.azureml import records, state
from dtrain.azureml.console import warn
from dtrain.azureml.errors import RunEnvironmentException
from dtrain.azureml.interactive import new_run
from dtrain.azureml.logged import Logged
from dtrain.azureml.run import Run
from dtrain.comm.local import LocalCommunicator
from dtrain.env import RankEnv
from dtrain.files import read_json
from dtrain.layout import RunLayout
from dtrain.status import RankFailure, write_record

_offline: _OfflineRun | None = None
_failing: list[str] = []


class _OfflineRun(Logged):
    """The run of a script that no job runs. Its folder is made with it, in ./workspace or $DTRAIN_WORKSPACE."""

    _refused: ClassVar = {
        "experiment": "an offline run belongs to none; ask run.id.startswith('OfflineRun'), and use Workspace.from_config()",
        "register_model": "an offline run belongs to no workspace of the SDK's; use Model.register(workspace, ...)",
        "child_run": "an offline run has no children; log to the run itself",
        "parent": "an offline run has none",
        "get_details": "an offline run was not submitted",
        "take_snapshot": "an offline run's source is this folder",
        "wait_for_completion": "an offline run is this process",
    }

    def __init__(self) -> None:
        layout = new_run(env.workspace(), "OfflineRun", kind="offline")
        self._layout = layout
        Ending(LocalCommunicator(), layout.rank(0)).watch()
        warn(f"this script runs in no job; what it logs is kept in {layout.root}")

    @property
    def status(self) -> str:
        return self.get_status()

    def get_status(self) -> str:
        """Running, until the script has ended."""
        return state.azure_status(self._layout)

    def complete(self, _set_status: bool = True) -> None:
        """Nothing: the run ends when the script does."""

    def fail(self, error_details: Any = None, error_code: Any = None, _set_status: bool = True) -> None:
        """Let the script fail when it has ended."""
        if error_code is not None:
            records.note(self._layout, "error_code", text=str(error_code))
        records.note(self._layout, "fail", text=str(error_details or error_code or ""))
        state.end_by_hand(self._layout, str(error_details or error_code or "fail() was called"), exit_code=1)

    def cancel(self) -> None:
        """Record the run as canceled; the script goes on."""
        state.cancel(self._layout)

    def __enter__(self) -> _OfflineRun:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        """The script's end, or its exception, is recorded when it comes."""

    def __repr__(self) -> str:
        return f"_OfflineRun(id={self.id!r})"


def current_run(allow_offline: bool) -> Run | _OfflineRun:
    """The run of this process. Raises RunEnvironmentException where there is none and ``allow_offline`` is false."""
    global _offline
    rank_env = RankEnv.read()
    if rank_env.run_dir is not None:
        return _run_of(RunLayout(rank_env.run_dir))
    if not allow_offline:
        raise RunEnvironmentException(
            "this process is no rank of a job; submit the script, or run it with `dtrain run --azureml`, or leave out "
            "allow_offline=False"
        )
    if _offline is None:
        _offline = _OfflineRun()
    return _offline


def _run_of(layout: RunLayout) -> Run:
    from dtrain.azureml.experiment import Experiment
    from dtrain.azureml.workspace import Workspace

    submitted, folder = records.read_submitted(layout), layout.workspace
    try:
        details = submitted.workspace or read_json(folder.azureml / "workspace.json")
    except FileNotFoundError:
        details = {}
    name, group = details.get("name", folder.root.name), details.get("resource_group", "local")
    subscription, location = details.get("subscription_id", "local"), details.get("location")
    workspace = Workspace(subscription, group, name, folder=folder.root, location=location)
    return Run(Experiment(workspace, submitted.experiment), layout.id)


def is_rank_of(layout: RunLayout) -> bool:
    """Whether this process is a rank of that run."""
    run_dir = RankEnv.read().run_dir
    return run_dir is not None and run_dir == layout.root


def fail_at_exit(message: str) -> None:
    """Let this rank end with exit code 1 and this message when its script has ended."""
    if not _failing:
        atexit.register(_fail_now)
    _failing.append(message)


def _fail_now() -> None:
    rank_env = RankEnv.read()
    assert rank_env.layout is not None
    failure = RankFailure.now(rank_env.rank, "exit", 1, _failing[0], task=str(rank_env.task or ""))
    write_record(rank_env.layout.rank(rank_env.rank).error, failure)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)  # at this point Python's own exit code is decided
