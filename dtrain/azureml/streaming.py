"""Waiting for a run, and showing what it prints meanwhile."""

from __future__ import annotations

import re
import time

from dtrain.azureml import state
from dtrain.azureml.console import say
from dtrain.azureml.errors import ActivityFailedException, ExperimentExecutionException
from dtrain.azureml.records import AzureLayout
from dtrain.launch.console import LineReader
from dtrain.layout import RunLayout

_POLL_S = 0.1
_LOOK_AGAIN_S = 1.0


def wait(run: RunLayout, *, show_output: bool, raise_on_error: bool) -> None:
    """Block until ``run`` has ended. Raises ActivityFailedException when it failed, ExperimentExecutionException on Ctrl-C."""
    if show_output:
        say(f"RunId: {run.id}\nRun folder: {run.root}\n")
    reader = LineReader(AzureLayout(run).console)
    shown, next_look = "", 0.0
    try:
        while True:
            now = state.azure_status(run)
            if show_output and now != shown and now not in state.ENDED:
                shown = now
                say(f"[{now}]")
            if now in state.ENDED or time.monotonic() >= next_look:
                next_look = time.monotonic() + _LOOK_AGAIN_S
                reader.look_again()
            lines = reader.lines(reader.read(), final=now in state.ENDED)
            if show_output and lines:
                say("\n".join(lines))
            if now in state.ENDED:
                break
            time.sleep(_POLL_S)
    except KeyboardInterrupt:
        raise ExperimentExecutionException(
            f"waiting for run {run.id} was interrupted; the run goes on. run.cancel() ends it, `dtrain logs {run.id} --follow` "
            "shows it again"
        ) from None
    finally:
        reader.close()
    if show_output:
        say(f"\nExecution Summary\n=================\nRunId: {run.id}\nStatus: {now}\nRun folder: {run.root}\n")
    if now == "Failed" and raise_on_error:
        raise ActivityFailedException(_failure(run))


def _failure(run: RunLayout) -> str:
    status = state.status_of(run)
    text = f"run {run.id} failed with exit code {status.exit_code}: {status.cause}"
    failure = status.failure
    if failure is None:
        return f"{text}\nwhat the job said is in {AzureLayout(run).console}"
    trace = f"\n{failure.traceback.rstrip()}" if failure.traceback else ""
    missing = re.match(r"ModuleNotFoundError: No module named '(\w+)", failure.message)
    asks = f"\npip_packages=['{missing[1]}'], or an Environment, asks for a package that a job is to have" if missing else ""
    return f"{text}{trace}{asks}\nits whole output is in {run.rank(failure.rank).output_log}"
