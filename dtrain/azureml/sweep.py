"""A sweep: the run of a HyperDriveConfig, whose one rank (sweep_rank.py) runs a job for each setting as its child."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from dtrain.azureml import records, start, submit
from dtrain.azureml.compute import find_entry
from dtrain.azureml.datapath import DataPath
from dtrain.azureml.datastore import DataReference, Datastore
from dtrain.azureml.errors import UserErrorException
from dtrain.azureml.hyperdrive import HyperDriveConfig, PrimaryMetricGoal
from dtrain.azureml.parameters import Setting
from dtrain.azureml.policies import EarlyTerminationPolicy
from dtrain.azureml.recording import read_rank
from dtrain.azureml.runconfig import RunConfiguration, ScriptRunConfig
from dtrain.azureml.targets import hosts_of
from dtrain.azureml.values import variables_of
from dtrain.azureml.workspace import Workspace
from dtrain.job_options import Hangs
from dtrain.layout import RunLayout
from dtrain.masking import Masker
from dtrain.resources import THREAD_VARIABLES
from dtrain.spec import JobSpec

TAG = "hyperparameters"
"""The tag of a child that holds its setting, as JSON text."""
_KEY = "hyperDrive"  # of a run definition
_GRACE_S = 20.0  # longer than a child has


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What a sweep's rank is to do: run ``job`` with each of the ``settings``, so many ``at_once``, for up to ``limit_s``.

    ``threads`` are the variables of thread counts that the user has set: the rank itself is given others.
    """

    job: ScriptRunConfig
    settings: list[Setting]
    metric: str
    goal: PrimaryMetricGoal
    policy: EarlyTerminationPolicy
    at_once: int
    limit_s: float
    threads: dict[str, str]

    def job_of(self, setting: Setting, source: Path) -> ScriptRunConfig:
        """The job with one setting among its arguments, from the folder ``source``."""
        job = copy.copy(self.job)
        job.source_directory = str(source)
        for name, value in setting.items():
            job.arguments = [*job.arguments, name if name.startswith("-") else f"--{name}", value]
        return job


def submit_config(workspace: Workspace, experiment: str, config: Any, *, parent: str = "") -> RunLayout:
    """Start the sweep of a HyperDriveConfig, or the job of anything else, and return its run's folder. Raises as both do."""
    begin = submit_sweep if isinstance(config, HyperDriveConfig) else submit.submit
    return begin(workspace, experiment, config, parent=parent)


def submit_sweep(workspace: Workspace, experiment: str, config: HyperDriveConfig, *, parent: str = "") -> RunLayout:
    """Start a sweep, and return its run's folder; does not wait. The run has a copy of the source, which its children run.

    Raises what a submit of its first child would, and UserErrorException for what cannot be sent to another process.
    """
    draft = _draft(config, workspace)
    source = Path(draft.job.source_directory).absolute()
    child = submit.check(workspace, experiment, draft.job_of(draft.settings[0], source), parent=parent)
    _, entry = find_entry(workspace, draft.job.run_config.target)
    on_hosts = bool(hosts_of(entry))  # of which every job takes the first ones
    room = 1 if on_hosts else max(1, entry.get("max_nodes", 1) // child.submitted.node_count)
    sweep = dataclasses.replace(draft, at_once=min(draft.at_once, room))
    notes = list(child.notes)
    if len(sweep.settings) < (most := config._options_given["max_total_runs"]):
        notes.append(f"max_total_runs={most}, but there are {len(sweep.settings)} settings to try")
    if sweep.at_once < draft.at_once:
        why = "is of hosts, and all runs are on the same ones" if on_hosts else "has nodes for no more"
        at_once = f"{sweep.at_once} of {draft.at_once} runs go on at once"
        notes.append(f"{at_once}: compute target {child.submitted.target!r} {why}")
    spec = JobSpec(
        target="dtrain.azureml.sweep_rank",
        is_module=True,
        source=source,
        launcher="local",
        experiment=experiment,
        environment=start.switch(),
        secrets=child.spec.secrets,
        grace_s=_GRACE_S,
        hangs=Hangs(hang_timeout_s=None),
    )
    shown = [str(value.as_mount() if isinstance(value, Datastore) else value) for value in draft.job.arguments]
    definition = {**child.submitted.definition, "arguments": shown, _KEY: config._record(sweep.at_once)}
    job = dataclasses.replace(
        child,
        spec=spec,
        script_run=ScriptRunConfig(str(source), script=draft.job.script, run_config=RunConfiguration()),
        submitted=dataclasses.replace(child.submitted, node_count=1, master="127.0.0.1", definition=definition),
        packages=[],  # which are each child's
        notes=notes,
        sweep=_pickled(sweep, child.spec),
    )
    return submit.begin(job, workspace)


def _draft(config: HyperDriveConfig, workspace: Workspace) -> Sweep:
    """The sweep as it is asked for, whatever the target has room for."""
    settings, given = config._settings(), config._options_given
    return Sweep(
        job=_portable(submit.script_run_of(config._job), workspace),
        settings=settings,
        metric=given["primary_metric_name"],
        goal=config._goal,
        policy=config._policy,
        at_once=min(given["max_concurrent_runs"] or len(settings), len(settings)),
        limit_s=given["max_duration_minutes"] * 60.0,
        threads={name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ},
    )


def _portable(job: ScriptRunConfig, workspace: Workspace) -> ScriptRunConfig:
    """The job as another process, in another folder, can submit it: the target by its name, paths whole, arguments plain."""
    job = copy.copy(job)
    job.run_config = copy.copy(job.run_config)
    job.run_config.target = find_entry(workspace, job.run_config.target)[0]
    job.arguments = [value if isinstance(value, Datastore | DataReference) else str(value) for value in job.arguments]
    if isinstance(job.resume_from, str | Path):
        job.resume_from = str(Path(job.resume_from).absolute())
    elif (layout := getattr(job.resume_from, "_layout", None)) is not None and not isinstance(job.resume_from, DataPath):
        job.resume_from = str(layout.outputs)
    return job


def _pickled(sweep: Sweep, spec: JobSpec) -> bytes:
    """The sweep as its run's folder keeps it. Raises UserErrorException for what cannot be, and for a secret's value in it."""
    try:
        data = pickle.dumps(sweep)
    except Exception as error:  # whatever an object of the script's raises
        raise UserErrorException(f"the job of a HyperDriveConfig holds what no other process can have: {error}") from error
    texts = _texts(sweep)
    for name, value in spec.secret_values().items():
        if Masker([value]).value(texts) != texts:
            raise UserErrorException(
                f"the job of a HyperDriveConfig has the value of secret {name} in its arguments, variables or packages, and they "
                f"are kept in a file for its children: leave it out there, os.environ[{name!r}] has it in each"
            )
    return data


def _texts(sweep: Sweep) -> list[str]:
    """What a script has written into a sweep that could be a secret: arguments, variables, and packages with their addresses."""
    config: RunConfiguration = sweep.job.run_config
    environment = config.environment
    dependencies = environment.python.conda_dependencies
    named = [variables_of("environment_variables", each.environment_variables) for each in (config, environment)]
    values = [value for each in (*named, *sweep.settings) for value in each.values()]
    return [str(each) for each in (*sweep.job.arguments, config.arguments, *dependencies._pip, *dependencies._conda, *values)]


def read_sweep(run: RunLayout) -> Sweep:
    """What a sweep's rank is to do. Called by that rank."""
    sweep: Sweep = pickle.loads(records.AzureLayout(run).sweep.read_bytes())
    return sweep


def sweep_record(run: RunLayout) -> dict[str, Any] | None:
    """What is told of a sweep in its run's definition; None of another run."""
    record: dict[str, Any] | None = records.read_submitted(run).definition.get(_KEY)
    return record


def setting_text(setting: Mapping[str, Any]) -> str:
    """A setting as its tag's text."""
    return orjson.dumps(setting).decode()


def logged_values(run: RunLayout, metric: str) -> list[float]:
    """The numbers that a child's rank 0 has logged of a metric, in order; nan, which is neither better nor worse, left out."""
    try:
        found = read_rank(run, 0).get(metric, [])
    except UserErrorException:  # of a name that was logged as rows, too
        return []
    values = found if isinstance(found, list) else [found]
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    return [float(value) for value in numbers if not math.isnan(value)]


def logged_names(run: RunLayout) -> list[str]:
    """The names that a child's rank 0 has logged by, in order; none where it used one for numbers and for rows."""
    try:
        return list(read_rank(run, 0))
    except UserErrorException:
        return []
