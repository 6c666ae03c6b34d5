"""From a ScriptRunConfig or an estimator to a running job: checked here, then run by a supervisor process of its own."""

from __future__ import annotations

import copy
import dataclasses
import shutil
import sys
from pathlib import Path
from typing import Any

from dtrain import switches
from dtrain.azureml.compute import check_nodes, find_entry
from dtrain.azureml.dataset import check_datasets
from dtrain.azureml.environment import Environment
from dtrain.azureml.errors import AzureMLException, Settings, UserErrorException
from dtrain.azureml.estimator import Estimator
from dtrain.azureml.old_code import find_old_names, uses_horovod
from dtrain.azureml.packages import missing_packages
from dtrain.azureml.records import Submitted
from dtrain.azureml.runconfig import (
    MpiConfiguration,
    RunConfiguration,
    ScriptRunConfig,
    TensorflowConfiguration,
    arguments_of,
)
from dtrain.azureml.start import Job, start, switch
from dtrain.azureml.targets import LOCAL, Partition, hosts_of, partition_of
from dtrain.azureml.values import variables_of
from dtrain.azureml.workspace import Workspace
from dtrain.errors import DtrainError
from dtrain.hosts import Host
from dtrain.job_options import ClusterOptions, Launcher, available_cores, default_max_ranks
from dtrain.launch.job import planner
from dtrain.layout import RunLayout
from dtrain.spec import JobSpec


def submit(workspace: Workspace, experiment: str, config: Any, *, parent: str = "") -> RunLayout:
    """Check ``config`` (a ScriptRunConfig or an estimator), make its run folder and start its supervisor.

    Returns when the supervisor has started; the job goes on without the caller. Raises UserErrorException,
    ComputeTargetException or ExperimentExecutionException for what cannot be started; no run is left then.
    """
    return begin(check(workspace, experiment, config, parent=parent), workspace)


def begin(job: Job, workspace: Workspace) -> RunLayout:
    """Make the run folder of a job that was checked, and start its supervisor. Raises as :func:`submit`."""
    try:
        run = workspace._folder.create_run(job.spec.experiment_name)
        start(run, job, workspace)
        return run
    except AzureMLException:
        raise
    except DtrainError as error:
        raise UserErrorException(str(error)) from error


def check(workspace: Workspace, experiment: str, config: Any, *, parent: str = "") -> Job:
    """The job that ``config`` asks for. Writes nothing. Raises as :func:`submit`."""
    script_run = copy.copy(script_run_of(config))
    script_run.arguments = arguments_of(script_run.arguments)
    check_datasets(script_run.arguments)
    run_config: RunConfiguration = script_run.run_config
    distribution = run_config._distribution()
    target, entry = find_entry(workspace, run_config.target)
    hosts, partition = hosts_of(entry), partition_of(entry)
    nodes = _count_nodes(run_config, distribution, len(hosts))
    check_nodes(target, entry, {**_tasks(distribution, hosts), "node_count": nodes})
    wanted, notes = _check_environment(run_config)
    try:
        spec = _job_spec(script_run, experiment, distribution, nodes, partition)
        old, old_names = find_old_names(Path(script_run.source_directory).absolute(), str(script_run.script))
        notes += old_names
        spec = dataclasses.replace(spec, hosts=_seats(hosts, distribution, nodes), environment={**old, **spec.environment})
        if partition is None:
            planner(spec, workspace._folder)
        submitted = Submitted(
            experiment=experiment,
            target=target,
            node_count=nodes,
            master="" if partition is not None else hosts[0].name if hosts else "127.0.0.1",
            parent=parent,
            workspace=workspace._details,
            definition=_definition(script_run, spec, target, nodes, distribution),
        )
        return Job(spec=spec, script_run=script_run, submitted=submitted, packages=wanted, notes=notes)
    except AzureMLException:
        raise
    except DtrainError as error:
        raise UserErrorException(str(error)) from error


def script_run_of(config: Any) -> ScriptRunConfig:
    """What a ScriptRunConfig or an estimator comes down to. Raises UserErrorException for anything else."""
    if isinstance(config, Estimator):
        return config._config
    if isinstance(config, ScriptRunConfig):
        return config
    what = f"{type(config).__name__} {config!r:.80}"
    raise UserErrorException(f"experiment.submit() takes a ScriptRunConfig, an estimator or a HyperDriveConfig, not {what}")


def _tasks(distribution: Any, hosts: tuple[Host, ...]) -> dict[str, int]:
    """What a TensorFlow cluster needs a node each for, and how many; hosts take as many as they have slots."""
    if hosts or not isinstance(distribution, TensorflowConfiguration):
        return {}
    return {name: getattr(distribution, name) for name in distribution._fields}


def _count_nodes(config: RunConfiguration, distribution: Any, hosts: int) -> int:
    """How many nodes a job has; of ``hosts``, where the target is made of them, it may take them all."""
    nodes = config.node_count
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


def _check_environment(config: RunConfiguration) -> tuple[list[str], list[str]]:
    """The packages that have to be installed for the job, and sentences about what is not as asked for.

    Raises UserErrorException where packages are missing that cannot be, or may not.
    """
    environment = config.environment
    if not isinstance(environment, Environment):
        raise UserErrorException(f"environment={environment!r:.80} is no Environment; Environment.get(ws, name) gives one")
    notes = []
    sections: tuple[Settings, ...] = (config.docker, environment.docker)
    if asked := dict.fromkeys(name for section in sections for name in _changed(section)):
        notes.append(f"docker is not used ({', '.join(asked)}): the job runs in this Python environment")
    python = environment.python
    if python.user_managed_dependencies:
        return [], notes
    if python.interpreter_path not in ("python", sys.executable):
        notes.append(
            f"interpreter_path={python.interpreter_path!r} is not used: the job runs in {sys.executable}; with "
            "user_managed_dependencies=True it is"
        )
    dependencies = python.conda_dependencies
    any_version, install = switches.takes_any_version(), switches.installs_packages()
    wanted, others = missing_packages(dependencies._pip, dependencies._conda, any_version=any_version, install=install)
    return wanted, [*notes, *others]


def _changed(section: Settings) -> list[str]:
    """The settings of a section that are not as its constructor makes them."""
    untouched = type(section)()
    return [name for name in section._fields if getattr(section, name) != getattr(untouched, name)]


def _own_python(environment: Environment) -> Path | None:
    """The Python that an environment names for its ranks; None: this one."""
    named = environment.python.interpreter_path
    return Path(named) if environment.python.user_managed_dependencies and named not in ("python", sys.executable) else None


def _job_spec(
    script_run: ScriptRunConfig, experiment: str, distribution: Any, nodes: int, partition: Partition | None
) -> JobSpec:
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
    if partition is not None:
        launcher = _slurm_launcher(partition, distribution)
    else:
        _check_processes(workers + (cluster.servers or 0 if cluster is not None else 0), nodes)
    given = (config.environment.environment_variables, config.environment_variables)
    variables = {name: text for each in given for name, text in variables_of("environment_variables", each).items()}
    return JobSpec(
        target=str(source / str(script_run.script)),
        source=source,
        workers=workers,
        launcher=launcher,
        cluster=cluster,
        slurm=partition.options(nodes, workers // nodes) if partition is not None else None,
        experiment=experiment,
        environment={**variables, **switch()},
        secrets=tuple(switches.secret_names()),
        timeout_s=config.max_run_duration_seconds,
        python=_own_python(config.environment),
    )


def _slurm_launcher(partition: Partition, distribution: Any) -> Launcher:
    """Raises UserErrorException for a job that cannot go to Slurm."""
    if isinstance(distribution, TensorflowConfiguration):
        raise UserErrorException(
            f"parameter servers do not run on Slurm partition {partition.name}: it starts ranks of one kind. Use "
            "MpiConfiguration(), or a compute target of hosts: `dtrain compute add NAME --hosts node1:2,node2:2`"
        )
    if shutil.which("sbatch") is None:
        raise UserErrorException(
            f"the compute target is Slurm partition {partition.name}, and there is no sbatch on PATH; submit from a host that "
            "submits to Slurm"
        )
    return "slurm"


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


def _definition(script_run: ScriptRunConfig, spec: JobSpec, target: str, nodes: int, distribution: Any) -> dict[str, Any]:
    """The run definition that ``get_details`` shows, with the SDK's keys; the arguments are added when they are resolved."""
    config: RunConfiguration = script_run.run_config
    dependencies = config.environment.python.conda_dependencies
    return {
        "script": script_run.script,
        "target": target,
        "framework": str(config.framework),
        "communicator": str(config.communicator),
        "nodeCount": nodes,
        "maxRunDurationSeconds": config.max_run_duration_seconds,
        "environment": {
            "name": config.environment.name,
            "environmentVariables": dict(config.environment.environment_variables),
            "python": {"pip": list(dependencies._pip), "conda": list(dependencies._conda), "interpreterPath": spec.interpreter},
        },
        "mpi": {"processCountPerNode": config.mpi.process_count_per_node},
        "tensorflow": {
            "workerCount": config.tensorflow.worker_count,
            "parameterServerCount": config.tensorflow.parameter_server_count,
        },
        "launcher": spec.launcher_name,
    }
