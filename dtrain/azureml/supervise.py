"""``python -m dtrain.azureml.supervise RUN``: runs one submitted job to its end, in a process of its own.

Who submits sends the :class:`Order` on standard input, pickled: it is our own parent. Output goes to the run's console file.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

from dtrain.azureml import records, venv
from dtrain.azureml.files import files_elsewhere, list_code, list_source
from dtrain.azureml.records import AzureLayout, Copy, Order
from dtrain.azureml.stores import copy_changed, list_files, make_copy, open_store
from dtrain.errors import DtrainError
from dtrain.files import write_json
from dtrain.launch.console import Console
from dtrain.launch.follow import follow_job, submit_run
from dtrain.launch.job import announce, planner, supervise_run
from dtrain.layout import RunLayout
from dtrain.masking import Masker
from dtrain.spec import JobSpec
from dtrain.status import RunStatus, read_status, write_record


def main() -> NoReturn:
    # Imported by its name, as it is pickled: this module is also __main__.

    run = RunLayout(Path(sys.argv[1]))
    try:
        order: Order = pickle.load(sys.stdin.buffer)
    except (EOFError, pickle.UnpicklingError):
        shutil.rmtree(run.root)  # who submits was killed before all was there, and this is what is left of the run
        sys.exit(f"run {run.id} was not submitted: its control script ended meanwhile")
    os.chdir(order.folder)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)  # the ranks inherit it
    console = Console(masker=Masker(order.spec.secret_values().values()))
    before = list_code(run)
    write_json(AzureLayout(run).source, list_source(run), durable=False)
    try:
        spec = _with_packages(run, order, console) if order.packages else order.spec
        for copy in order.copies:
            _make(copy, console)
        mounted = {copy: list_files(Path(copy.path)) for copy in order.copies if copy.mode == "mount"}
        if mounted:
            records.note(run, "mounted", urls=[copy.url for copy in mounted])
        if order.packages or order.copies:
            records.note(run, "prepared")
        status = _run_by_slurm(run, spec, console) if spec.launcher_name == "slurm" else _run_here(run, spec, console)
    except DtrainError as error:
        console.say(f"dtrain: {error}", bad=True)
        _record_failure(run, error, console)
        sys.exit(error.exit_code)
    for copy, files in mounted.items():
        _upload(run, copy, files, console)
    if mounted:
        records.note(run, "uploaded")
    if (elsewhere := files_elsewhere(run, before)) and status.state == "completed":
        text = (
            f"written outside of ./outputs and ./logs, and so not among the run's files: {', '.join(elsewhere)}; they are in "
            f"{run.code}; let the script write to ./outputs what is to be registered or downloaded"
        )
        console.say(f"dtrain: warning: {text}")
        records.note(run, "warning", text=text)
    sys.exit(status.exit_code)


def _make(copy: Copy, console: Console) -> None:
    """Make a copy that the job is to have. Blocks, perhaps for long. Raises DtrainError where it cannot be made."""
    place = f"{copy.name} of {copy.url}" if copy.name else copy.url
    console.say(f"dtrain: copying {place}")
    began = time.monotonic()
    console.say(f"dtrain: copied {_files(make_copy(copy))} in {time.monotonic() - began:.1f} s")


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count} files"


def _upload(run: RunLayout, copy: Copy, before: dict[str, tuple[int, int]], console: Console) -> None:
    """Copy what the job wrote to a mounted folder to its store. A failure is told, and the files stay where they are."""
    try:
        names = copy_changed(Path(copy.path), before, open_store(copy.url), copy.name)
    except DtrainError as error:
        text = f"what the job wrote to its copy of {copy.url} is not uploaded, and stays in {copy.path}: {error}"
        records.note(run, "warning", text=text)
        console.say(f"dtrain: warning: {text}", bad=True)
        return
    if names:
        console.say(f"dtrain: uploaded {_files(len(names))} to {copy.url}: {', '.join(names[:10])}")


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


def _with_packages(run: RunLayout, order: Order, console: Console) -> JobSpec:
    """Make the environment of the job, or find it made, and return the job with its Python. Blocks, for minutes perhaps.

    Raises ExperimentExecutionException when it cannot be made.
    """
    # Who cancels the run meanwhile is obeyed at once, and what was half made is removed.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    python = venv.prepare(run.workspace.environments, order.packages, AzureLayout(run).build_log, console.say)
    spec = dataclasses.replace(order.spec, python=python)
    write_json(run.spec, spec.to_json())
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
