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
from dtrain.azureml.records import AzureLayout, Copy, Order, Submitted
from dtrain.azureml.runconfig import RunConfiguration, ScriptRunConfig
from dtrain.azureml.workspace import Workspace
from dtrain.launch.job import fill_run
from dtrain.layout import RunLayout
from dtrain.masking import Masker
from dtrain.processes import ProcessRecord
from dtrain.spec import JobSpec
from dtrain.status import RunStatus, write_record

_RESUME = f"{VARIABLE[1:]}MODEL_LOCATION"
"""Where a script finds what it is given as ``--resume-from``, too."""

# Kept so that an ended supervisor is no zombie for longer than to the next submit.
_supervisors: list[subprocess.Popen[bytes]] = []


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job that was checked: ``packages`` have to be installed for it, ``notes`` are said when it has started. ``sweep`` is what
    the rank of a sweep is to do, pickled; empty of another job."""

    spec: JobSpec
    script_run: ScriptRunConfig
    submitted: Submitted
    packages: list[str]
    notes: list[str]
    sweep: bytes = b""


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
        arguments, variables, copies = _resolve(job.script_run, run, workspace)
        spec = dataclasses.replace(job.spec, args=tuple(arguments), environment={**job.spec.environment, **variables})
        masker = Masker(spec.secret_values().values())
        asked = job.submitted.definition
        definition = masker.value({**asked, "arguments": asked.get("arguments", arguments)})  # of a sweep its children's
        records.write_submitted(run, dataclasses.replace(job.submitted, definition=definition))
        for text in job.notes:
            records.note(run, "warning", text=text)
        if job.packages or copies:
            records.note(run, "preparing")
        # Before the supervisor is told what to run: from then on it writes the status itself.
        status = RunStatus(state="running", size=spec.size, started=time.time(), supervisor=ProcessRecord.of(process.pid))
        write_record(run.status, status)
        write_record(AzureLayout(run).supervisor, status.supervisor)
        if job.sweep:
            AzureLayout(run).sweep.write_bytes(job.sweep)
        fill_run(run, spec, workspace._folder)
    except BaseException:
        if process is not None:
            process.kill()
            process.wait()
        shutil.rmtree(run.root, ignore_errors=True)
        raise
    _tell(process, Order(spec=spec, folder=os.getcwd(), packages=tuple(job.packages), copies=tuple(copies)), run)
    for text in job.notes:
        warn(text)


def _resolve(script_run: ScriptRunConfig, run: RunLayout, workspace: Workspace) -> tuple[list[str], dict[str, str], list[Copy]]:
    """Arguments as text, references to datastores as paths; each reference's variable; and the copies that they need."""
    config: RunConfiguration = script_run.run_config
    found = _Data(AzureLayout(run).data, workspace)
    for name, reference in config.data_references.items():
        found.path_of(reference, name)
    arguments = []
    for value in script_run.arguments:
        if isinstance(value, Datastore | DataReference):
            arguments.append(found.path_of(value))
        elif isinstance(value, str) and value.startswith(VARIABLE):
            if value.removeprefix(VARIABLE) not in found.paths:
                raise UserErrorException(
                    f"argument {value!r} is a reference to a datastore that data_references has not; it has "
                    f"{', '.join(found.paths) or 'none'}: give the reference itself in the arguments, without str()"
                )
            arguments.append(found.paths[value.removeprefix(VARIABLE)])
        else:
            arguments.append(str(value))
    variables = {f"{VARIABLE[1:]}{name}": path for name, path in found.paths.items()}
    if script_run.resume_from is not None:
        variables[_RESUME] = _resume_path(script_run.resume_from, found)
        arguments += ["--resume-from", variables[_RESUME]]
    return arguments, variables, found.copies


class _Data:
    """The references of a job to datastores: their ``paths`` in it, by their names, and the ``copies`` among them."""

    def __init__(self, folder: Path, workspace: Workspace) -> None:
        self.paths: dict[str, str] = {}
        self.copies: list[Copy] = []
        self._folder, self._workspace = folder, workspace
        self._known: dict[str, DataReference] = {}

    def path_of(self, value: Any, name: str = "") -> str:
        """The path of a reference by its ``name``. Raises UserErrorException for what is none, and for a name used twice."""
        if isinstance(value, Datastore):
            value = value.as_mount()
        reference = value._reference(self._workspace, name) if isinstance(value, DataReferenceConfiguration) else value
        if not isinstance(reference, DataReference):
            raise UserErrorException(f"data_references has {reference!r:.80}; give references: datastore.path('...').as_mount()")
        name = name or reference.data_reference_name
        reference._check_same(name, self._known.setdefault(name, reference))
        if name not in self.paths:
            place = reference._place(self._folder)
            self.paths[name] = place.path if isinstance(place, Copy) else str(place)
            self.copies += [place] if isinstance(place, Copy) else []
        return self.paths[name]

    def copy_of(self, reference: DataReference) -> str:
        """The path of a place that a job only reads, and that has to be there."""
        place = reference._place(self._folder)
        if not isinstance(place, Copy):
            return str(place)
        self.copies.append(dataclasses.replace(place, mode="download"))
        return place.path


def _resume_path(resume_from: Any, found: _Data) -> str:
    """The folder that a script is given as ``--resume-from``: a run's outputs, a datastore's path, or a path as it is."""
    if isinstance(resume_from, DataPath):
        resume_from = resume_from._target
    layout = getattr(resume_from, "_layout", None) if not isinstance(resume_from, str | Path) else None
    if isinstance(layout, RunLayout):
        return str(layout.outputs)
    if isinstance(resume_from, Datastore | DataReference):
        return found.copy_of(resume_from.as_mount() if isinstance(resume_from, Datastore) else resume_from)
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
        said = AzureLayout(run).console.read_text(errors="replace").strip() or "nothing"
        shutil.rmtree(run.root, ignore_errors=True)
        raise ExperimentExecutionException(
            f"the supervisor of the run, {sys.executable}, did not start; it said: {said}"
        ) from None
