"""``python -m dtrain.azureml.supervise RUN``: runs one submitted job to its end, in a process of its own.

Who submits sends the :class:`Order` on standard input, pickled: it is our own parent. Output goes to the run's console file.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

from dtrain.azureml import records, venv
from dtrain.azureml.files import files_elsewhere, list_code, list_source
from dtrain.azureml.records import AzureLayout, Mount, Order
from dtrain.azureml.stores import copy_changed, list_files, open_store
from dtrain.errors import DtrainError
from dtrain.files import write_json
from dtrain.launch.console import Console
from dtrain.launch.follow import follow_job, submit_run
from dtrain.launch.job import announce, planner, supervise_run
from dtrain.layout import RunLayout
from dtrain.spec import JobSpec
from dtrain.status import RunStatus, read_status, write_record


def main() -> NoReturn:
    # Imported by its name, as it is pickled: this module is also __main__.

    run = RunLayout(Path(sys.argv[1]))
    order: Order = pickle.load(sys.stdin.buffer)
    os.chdir(order.folder)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)  # the ranks inherit it
    console = Console()
    before = list_code(run)
    write_json(AzureLayout(run).source, list_source(run), durable=False)
    mounted = {mount: list_files(Path(mount.folder)) for mount in order.mounts}
    try:
        spec = _prepared(run, order, console) if order.packages else order.spec
        status = _run_by_slurm(run, spec, console) if spec.launcher_name == "slurm" else _run_here(run, spec, console)
    except DtrainError as error:
        console.say(f"dtrain: {error}", bad=True)
        _record_failure(run, error, console)
        sys.exit(error.exit_code)
    for mount, files in mounted.items():
        _upload(run, mount, files, console)
    if (elsewhere := files_elsewhere(run, before)) and status.state == "completed":
        text = (
            f"written outside of ./outputs and ./logs, and so not among the run's files: {', '.join(elsewhere)}; they are in "
            f"{run.code}; let the script write to ./outputs what is to be registered or downloaded"
        )
        console.say(f"dtrain: warning: {text}")
        records.note(run, "warning", text=text)
    sys.exit(status.exit_code)


def _upload(run: RunLayout, mount: Mount, before: dict[str, tuple[int, int]], console: Console) -> None:
    """Copy what the job wrote to a mounted folder to its store. A failure is told, and the files stay where they are."""
    try:
        names = copy_changed(Path(mount.folder), before, open_store(mount.url), mount.name)
    except DtrainError as error:
        text = f"what the job wrote to its copy of {mount.url} is not uploaded, and stays in {mount.folder}: {error}"
        records.note(run, "warning", text=text)
        console.say(f"dtrain: warning: {text}", bad=True)
        return
    if names:
        console.say(
            f"dtrain: uploaded {len(names)} {'file' if len(names) == 1 else 'files'} to {mount.url}: {', '.join(names[:10])}"
        )


def _run_here(run: RunLayout, spec: JobSpec, console: Console) -> RunStatus:
    plan = planner(spec, run.workspace, console.say)(run, run.code)
    announce(run, plan, console)
    return supervise_run(run, spec, plan, console)


def _run_by_slurm(run: RunLayout, spec: JobSpec, console: Console) -> RunStatus:
    """Submit the job, and follow it to its end. Who cancels the run, before there is a job or after, cancels that."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    job = submit_run(run, spec, console)
    signal.signal(signal.SIGTERM, lambda *_: job.cancel())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    return follow_job(run, job, console)


def _prepared(run: RunLayout, order: Order, console: Console) -> JobSpec:
    """Make the environment of the job, or find it made, and return the job with its Python. Blocks, for minutes perhaps.

    Raises ExperimentExecutionException when it cannot be made.
    """
    # Who cancels the run meanwhile is obeyed at once, and what was half made is removed.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    python = venv.prepare(run.workspace.environments, order.packages, AzureLayout(run).build_log, console.say)
    spec = dataclasses.replace(order.spec, python=python)
    write_json(run.spec, spec.to_json())
    records.note(run, "prepared")
    signal.signal(signal.SIGTERM, before)
    return spec


def _record_failure(run: RunLayout, error: DtrainError, console: Console) -> None:
    """The outcome of a job that could not be started; one that was started has its own."""
    status = read_status(run)
    if status.is_over:
        return
    failed = RunStatus(
        state="failed",
        size=status.size,
        started=status.started,
        ended=time.time(),
        exit_code=error.exit_code,
        cause=str(error),
        supervisor=status.supervisor,
    )
    try:
        write_record(run.status, failed)
    except OSError as trouble:
        console.say(f"dtrain: the outcome cannot be recorded in {run.status}: {trouble.strerror}", bad=True)


if __name__ == "__main__":
    main()
