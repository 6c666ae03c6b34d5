"""From a ScriptRunConfig or an estimator to a running job: checked here, then run by a supervisor process of its own."""

from __future__ import annotations

import dataclasses
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from dtrain import env, switches
from dtrain.azureml import records
from dtrain.azureml.compute import LOCAL, check_nodes, hosts_of
from dtrain.azureml.console import warn
from dtrain.azureml.datapath import DataPath
from dtrain.azureml.datastore import VARIABLE, DataReference, DataReferenceConfiguration, Datastore
from dtrain.azureml.environment import Environment
from dtrain.azureml.errors import AzureMLException, ExperimentExecutionException, UserErrorException
from dtrain.azureml.estimator import Estimator
from dtrain.azureml.old_code import find_old_names, uses_horovod
from dtrain.azureml.packages import check_packages
from dtrain.azureml.records import AzureLayout, Submitted
from dtrain.azureml.runconfig import MpiConfiguration, RunConfiguration, ScriptRunConfig, TensorflowConfiguration
from dtrain.azureml.workspace import Workspace
from dtrain.errors import DtrainError
from dtrain.hosts import Host
from dtrain.job_options import ClusterOptions, Launcher, available_cores, default_max_ranks
from dtrain.launch.job import fill_run, planner
from dtrain.layout import RunLayout
from dtrain.processes import ProcessRecord
from dtrain.spec import JobSpec
from dtrain.status import RunStatus, write_record

_RESUME = f"{VARIABLE[1:]}MODEL_LOCATION"
"""Where a script finds what it is given as ``--resume-from``, too."""

# Kept so that an ended supervisor is no zombie for longer than to the next submit.
_supervisors: list[subprocess.Popen[bytes]] = []


def submit(workspace: Workspace, experiment: str, config: Any, *, parent: str = "") -> RunLayout:
    """Check ``config`` (a ScriptRunConfig or an estimator), make its run folder and start its supervisor.

    Returns when the supervisor has started; the job goes on without the caller. Raises UserErrorException,
    ComputeTargetException or ExperimentExecutionException for what cannot be started; no run is left then.
    """
    script_run = _script_run(config)
    run_config: RunConfiguration = script_run.run_config
    distribution = run_config._distribution()
    hosts = hosts_of(workspace, run_config.target)
    nodes = _count_nodes(run_config, distribution, len(hosts))
    target = check_nodes(workspace, run_config.target, nodes)
    notes = _check_environment(run_config)
    old, old_names = find_old_names(Path(script_run.source_directory).absolute(), str(script_run.script))
    notes += old_names
    try:
        spec = _job_spec(script_run, experiment, distribution, nodes)
        seats = _seats(hosts, distribution, nodes)
        spec = dataclasses.replace(spec, hosts=seats, environment={**old, **spec.environment})
        planner(spec, workspace._folder)
        run = workspace._folder.create_run(spec.experiment_name)
        submitted = Submitted(
            experiment=experiment,
            target=target,
            node_count=nodes,
            master=hosts[0].name if hosts else "127.0.0.1",
            parent=parent,
            workspace=workspace._details,
            definition=_definition(script_run, spec, target, nodes, distribution),
        )
        return _start(run, spec, script_run, submitted, workspace, notes)
    except AzureMLException:
        raise
    except DtrainError as error:
        raise UserErrorException(str(error)) from error


def _script_run(config: Any) -> ScriptRunConfig:
    if isinstance(config, Estimator):
        return config._config
    if isinstance(config, ScriptRunConfig):
        return config
    raise UserErrorException(
        f"experiment.submit() takes a ScriptRunConfig or an estimator, not {type(config).__name__} {config!r:.80}"
    )


def _count_nodes(config: RunConfiguration, distribution: Any, hosts: int) -> int:
    """How many nodes a job has; of ``hosts``, where the target is made of them, it may take them all."""
    nodes = config.node_count
    if isinstance(nodes, bool) or not isinstance(nodes, int) or nodes < 1:
        raise UserErrorException(f"node_count={nodes!r} is not a number from 1")
    if distribution is None and nodes > 1:
        raise UserErrorException(f"node_count={nodes} without a communicator: give distributed_job_config=MpiConfiguration()")
    if isinstance(distribution, TensorflowConfiguration):
        workers, servers = distribution.worker_count, distribution.parameter_server_count
        if workers + servers < nodes:
            raise UserErrorException(
                f"node_count={nodes} exceeds worker_count={workers} and parameter_server_count={servers} together: lower "
                "node_count, or raise worker_count"
            )
        if nodes == 1 and config.target not in (None, LOCAL):
            # Where no number is given: workers are one a node, and servers share the nodes with them.
            return min(max(workers, servers), hosts or workers + servers)
    return nodes


def _check_environment(config: RunConfiguration) -> list[str]:
    """Sentences about what of the environment is not as asked for. Raises UserErrorException where packages are missing."""
    environment = config.environment
    if not isinstance(environment, Environment):
        raise UserErrorException(f"environment={environment!r:.80} is no Environment; Environment.get(ws, name) gives one")
    notes = []
    if (
        config.docker.use_docker
        or environment.docker.enabled
        or environment.docker.base_image
        or environment.docker.base_dockerfile
    ):
        notes.append("docker is not used: the job runs in this Python environment")
    if environment.python.interpreter_path not in ("python", sys.executable):
        notes.append(
            f"interpreter_path={environment.python.interpreter_path!r} is not used: the job runs in {sys.executable}; start "
            "dtrain with the Python that it needs"
        )
    if environment.python.user_managed_dependencies:
        return notes
    dependencies = environment.python.conda_dependencies
    return notes + check_packages(dependencies._pip, dependencies._conda, any_version=switches.takes_any_version())


def _job_spec(script_run: ScriptRunConfig, experiment: str, distribution: Any, nodes: int) -> JobSpec:
    config: RunConfiguration = script_run.run_config
    source = Path(script_run.source_directory).absolute()
    if not source.is_dir():
        raise UserErrorException(f"source_directory {str(script_run.source_directory)!r} is not a folder (from {Path.cwd()})")
    launcher: Launcher = "local"
    workers, cluster = 1, None
    if isinstance(distribution, MpiConfiguration):
        workers = nodes * distribution.process_count_per_node
        launcher = "horovod" if uses_horovod(source, str(script_run.script)) else "mpi"  # which starts the same mpirun
    elif isinstance(distribution, TensorflowConfiguration):
        workers, launcher = distribution.worker_count, "parameter_server"
        cluster = ClusterOptions(servers=distribution.parameter_server_count, tf_config="workers")
    _check_processes(workers + (cluster.servers or 0 if cluster is not None else 0), nodes)
    variables = {**config.environment.environment_variables, **config.environment_variables}
    return JobSpec(
        target=str(source / str(script_run.script)),
        source=source,
        workers=workers,
        launcher=launcher,
        cluster=cluster,
        experiment=experiment,
        environment={**{name: str(value) for name, value in variables.items()}, **_switch()},
        timeout_s=config.max_run_duration_seconds,
    )


def _seats(hosts: tuple[Host, ...], distribution: Any, nodes: int) -> tuple[Host, ...]:
    """The hosts of a job, each with as many slots as a node is to have processes; of a TensorFlow cluster, as it has."""
    if not isinstance(distribution, MpiConfiguration):
        return hosts if distribution is not None else ()
    count = distribution.process_count_per_node
    full = next((host for host in hosts[:nodes] if host.slots < count), None)
    if full is not None:
        raise UserErrorException(
            f"process_count_per_node={count} exceeds the {full.slots} of host {full.name}; lower it, or give the host more: "
            f"`dtrain compute add NAME --hosts {full.name}:{count},...`"
        )
    return tuple(Host(host.name, count) for host in hosts[:nodes])


def _check_processes(count: int, nodes: int) -> None:
    most = default_max_ranks()
    if count > most:
        raise UserErrorException(
            f"{count} processes on {nodes} {'node' if nodes == 1 else 'nodes'} exceed {most}, which a machine of "
            f"{available_cores()} cores takes; lower node_count, process_count_per_node or worker_count"
        )


def _switch() -> dict[str, str]:
    return switches.azureml_switch(force=switches.azureml_mode() == "force")


def _definition(script_run: ScriptRunConfig, spec: JobSpec, target: str, nodes: int, distribution: Any) -> dict[str, Any]:
    """The run definition that ``get_details`` shows, with the SDK's keys."""
    config: RunConfiguration = script_run.run_config
    dependencies = config.environment.python.conda_dependencies
    return {
        "script": script_run.script,
        "arguments": [],
        "target": target,
        "framework": str(config.framework),
        "communicator": str(config.communicator),
        "nodeCount": nodes,
        "maxRunDurationSeconds": config.max_run_duration_seconds,
        "environment": {
            "name": config.environment.name,
            "environmentVariables": dict(config.environment.environment_variables),
            "python": {"pip": list(dependencies._pip), "conda": list(dependencies._conda), "interpreterPath": sys.executable},
        },
        "mpi": {"processCountPerNode": config.mpi.process_count_per_node},
        "tensorflow": {
            "workerCount": config.tensorflow.worker_count,
            "parameterServerCount": config.tensorflow.parameter_server_count,
        },
        "launcher": spec.launcher_name,
    }


def _start(
    run: RunLayout, spec: JobSpec, script_run: ScriptRunConfig, submitted: Submitted, workspace: Workspace, notes: list[str]
) -> RunLayout:
    """Fill the run folder while the supervisor's Python starts, and then tell that what to run; or leave nothing of both."""
    process: subprocess.Popen[bytes] | None = None
    try:
        AzureLayout(run).root.mkdir()
        process = _start_supervisor(run)
        arguments, variables = _resolve(script_run, run, workspace)
        if script_run.resume_from is not None:
            variables[_RESUME] = _resume_path(script_run.resume_from, run)
            arguments += ["--resume-from", variables[_RESUME]]
        submitted.definition["arguments"] = arguments
        spec = dataclasses.replace(spec, args=tuple(arguments), environment={**spec.environment, **variables})
        records.write_submitted(run, submitted)
        for text in notes:
            records.note(run, "warning", text=text)
        # Before the supervisor is told what to run: from then on it writes the status itself.
        status = RunStatus(state="running", size=spec.size, started=time.time(), supervisor=ProcessRecord.of(process.pid))
        write_record(run.status, status)
        fill_run(run, spec, workspace._folder)
    except BaseException:
        if process is not None:
            process.kill()
            process.wait()
        shutil.rmtree(run.root, ignore_errors=True)
        raise
    _tell(process, spec, run)
    for text in notes:
        warn(text)
    return run


def _resolve(script_run: ScriptRunConfig, run: RunLayout, workspace: Workspace) -> tuple[list[str], dict[str, str]]:
    """Arguments as text, references to datastores as paths; and each reference's variable."""
    config: RunConfiguration = script_run.run_config
    downloads = AzureLayout(run).root / "data"
    paths: dict[str, str] = {}

    def path_of(value: Any, name: str = "") -> str:
        if isinstance(value, Datastore):
            value = value.as_mount()
        reference = value._reference(workspace, name) if isinstance(value, DataReferenceConfiguration) else value
        if not isinstance(reference, DataReference):
            raise UserErrorException(f"data_references has {reference!r:.80}; give references: datastore.path('...').as_mount()")
        name = name or reference.data_reference_name
        if name not in paths:
            paths[name] = reference._resolve(downloads)
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
    return arguments, {f"{VARIABLE[1:]}{name}": path for name, path in paths.items()}


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
    return str(Path(resume_from).absolute())


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
            env=env.inherited() | _switch(),
        )
    _supervisors.append(process)
    return process


def _tell(process: subprocess.Popen[bytes], spec: JobSpec, run: RunLayout) -> None:
    assert process.stdin is not None
    try:
        with process.stdin:
            process.stdin.write(pickle.dumps((spec, os.getcwd())))
    except BrokenPipeError:
        raise ExperimentExecutionException(
            f"the supervisor of run {run.id} did not start; what it said is in {AzureLayout(run).console}"
        ) from None
