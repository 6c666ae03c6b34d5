"""A checked job's run folder is filled, and the supervisor process started that runs it."""

from __future__ import annotations

import dataclasses
import os
import pickle
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtrain import env, switches
from dtrain.azureml import records
from dtrain.azureml.console import warn
from dtrain.azureml.datapath import DataPath
from dtrain.azureml.datastore import VARIABLE, DataReference, DataReferenceConfiguration, Datastore
from dtrain.azureml.errors import ExperimentExecutionException, UserErrorException
from dtrain.azureml.records import AzureLayout, Mount, Order, Submitted
from dtrain.azureml.runconfig import RunConfiguration, ScriptRunConfig
from dtrain.azureml.workspace import Workspace
from dtrain.launch.job import fill_run
from dtrain.layout import RunLayout
from dtrain.processes import ProcessRecord
from dtrain.spec import JobSpec
from dtrain.status import RunStatus, write_record

_RESUME = f"{VARIABLE[1:]}MODEL_LOCATION"
"""Where a script finds what it is given as ``--resume-from``, too."""

# Kept so that an ended supervisor is no zombie for longer than to the next submit.
_supervisors: list[subprocess.Popen[bytes]] = []


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job that was checked: ``packages`` have to be installed for it, ``notes`` are said when it has started."""

    spec: JobSpec
    script_run: ScriptRunConfig
    submitted: Submitted
    packages: list[str]
    notes: list[str]


def switch() -> dict[str, str]:
    """The variable by which ranks and supervisors know dtrain's azureml as this process does."""
    return switches.azureml_switch(force=switches.azureml_mode() == "force")


def start(run: RunLayout, job: Job, workspace: Workspace) -> None:
    """Fill the run folder while the supervisor's Python starts, and then tell that what to run; or leave nothing of both.

    Blocks until the supervisor knows; its job goes on without the caller. Raises DtrainError for what cannot be started.
    """
    process: subprocess.Popen[bytes] | None = None
    try:
        AzureLayout(run).root.mkdir()
        process = _start_supervisor(run)
        arguments, variables, mounts = _resolve(job.script_run, run, workspace)
        if job.script_run.resume_from is not None:
            variables[_RESUME] = _resume_path(job.script_run.resume_from, run)
            arguments += ["--resume-from", variables[_RESUME]]
        job.submitted.definition["arguments"] = arguments
        spec = dataclasses.replace(job.spec, args=tuple(arguments), environment={**job.spec.environment, **variables})
        records.write_submitted(run, job.submitted)
        for text in job.notes:
            records.note(run, "warning", text=text)
        if job.packages:
            records.note(run, "preparing")
        # Before the supervisor is told what to run: from then on it writes the status itself.
        status = RunStatus(state="running", size=spec.size, started=time.time(), supervisor=ProcessRecord.of(process.pid))
        write_record(run.status, status)
        write_record(AzureLayout(run).supervisor, status.supervisor)
        fill_run(run, spec, workspace._folder)
    except BaseException:
        if process is not None:
            process.kill()
            process.wait()
        shutil.rmtree(run.root, ignore_errors=True)
        raise
    _tell(process, Order(spec=spec, folder=os.getcwd(), packages=tuple(job.packages), mounts=tuple(mounts)), run)
    for text in job.notes:
        warn(text)


def _resolve(script_run: ScriptRunConfig, run: RunLayout, workspace: Workspace) -> tuple[list[str], dict[str, str], list[Mount]]:
    """Arguments as text, references to datastores as paths; each reference's variable; and what of them is to be uploaded in the
    end."""
    config: RunConfiguration = script_run.run_config
    downloads = AzureLayout(run).root / "data"
    paths: dict[str, str] = {}
    mounts: list[Mount] = []

    def path_of(value: Any, name: str = "") -> str:
        if isinstance(value, Datastore):
            value = value.as_mount()
        reference = value._reference(workspace, name) if isinstance(value, DataReferenceConfiguration) else value
        if not isinstance(reference, DataReference):
            raise UserErrorException(f"data_references has {reference!r:.80}; give references: datastore.path('...').as_mount()")
        name = name or reference.data_reference_name
        if name not in paths:
            paths[name] = reference._resolve(downloads)
            if (mount := reference._mount(paths[name])) is not None:
                mounts.append(mount)
        return paths[name]

    for name, reference in config.data_references.items():
        path_of(reference, name)
    arguments = []
    for value in script_run.arguments:
        if isinstance(value, Datastore | DataReference):
            arguments.append(path_of(value))
        elif isinstance(value, str) and value.startswith(VARIABLE):
            if value.removeprefix(VARIABLE) not in paths:
                raise UserErrorException(
                    f"argument {value!r} is a reference to a datastore that data_references has not; it has "
                    f"{', '.join(paths) or 'none'}: give the reference itself in the arguments, without str()"
                )
            arguments.append(paths[value.removeprefix(VARIABLE)])
        else:
            arguments.append(str(value))
    return arguments, {f"{VARIABLE[1:]}{name}": path for name, path in paths.items()}, mounts


def _resume_path(resume_from: Any, run: RunLayout) -> str:
    """The folder that a script is given as ``--resume-from``: a run's outputs, a datastore's path, or a path as it is."""
    if isinstance(resume_from, DataPath):
        resume_from = resume_from._target
    layout = getattr(resume_from, "_layout", None) if not isinstance(resume_from, str | Path) else None
    if isinstance(layout, RunLayout):
        return str(layout.outputs)
    if isinstance(resume_from, Datastore | DataReference):
        reference = resume_from.as_mount() if isinstance(resume_from, Datastore) else resume_from
        return reference._resolve(AzureLayout(run).root / "data")
    path = Path(resume_from).absolute()
    if not path.exists():
        raise UserErrorException(f"resume_from={str(resume_from)!r}: there is no file or folder {path}")
    return str(path)


def _start_supervisor(run: RunLayout) -> subprocess.Popen[bytes]:
    """A process that waits for the spec of the job that it is to run."""
    _supervisors[:] = [each for each in _supervisors if each.poll() is None]
    with open(AzureLayout(run).console, "ab") as console:
        process = subprocess.Popen(
            [sys.executable, "-m", "dtrain.azureml.supervise", str(run.root)],
            stdin=subprocess.PIPE,
            stdout=console,
            stderr=console,
            start_new_session=True,  # Ctrl-C of the control script's terminal, and its end, are not the job's
            env=env.inherited() | switch(),
        )
    _supervisors.append(process)
    return process


def _tell(process: subprocess.Popen[bytes], order: Order, run: RunLayout) -> None:
    assert process.stdin is not None
    try:
        with process.stdin:
            process.stdin.write(pickle.dumps(order))
    except BrokenPipeError:
        raise ExperimentExecutionException(
            f"the supervisor of run {run.id} did not start; what it said is in {AzureLayout(run).console}"
        ) from None
