"""``RunConfiguration``, ``ScriptRunConfig`` and how ranks are spread: what estimators come down to as well."""

from __future__ import annotations

import copy
import functools
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from dtrain.azureml.environment import Environment
from dtrain.azureml.errors import RunConfigurationException, Settings, UserErrorException, check_kind, take_options
from dtrain.azureml.values import check_path, dict_of, list_of

FRAMEWORKS = ("Python", "TensorFlow")
COMMUNICATORS = ("None", "OpenMpi", "IntelMpi", "ParameterServer")


def check_count(name: str, value: Any, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserErrorException(f"{name}={value!r} is not a number from {least}")
    return value


def _check_count_or_none(name: str, value: Any) -> None:
    if value is not None:
        check_count(name, value)


def _check_seconds(name: str, value: Any) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is not None and not (is_number and value > 0):
        raise UserErrorException(f"{name}={value!r} is not a number of seconds above 0, nor None")


def arguments_of(value: Any) -> list[Any]:
    """A script's arguments as a list; text is taken apart as a shell does.

    Raises UserErrorException for a dict, for no list at all, and for None in it, which would be the text 'None'.
    """
    arguments = shlex.split(value) if isinstance(value, str) else list_of("arguments", value)
    for number, argument in enumerate(arguments):
        if argument is None:
            after = f" after {arguments[number - 1]!r:.80}" if number else ""
            raise UserErrorException(
                f"arguments has None{after}; give a text or a number, '' for an empty text, or leave both out"
            )
    return arguments


def _is_a(owner: str, kind: type) -> Callable[[str, Any], None]:
    """The check of a field of class ``owner`` that holds an object of another one."""
    return lambda name, value: check_kind(owner, name, value, kind.__name__)


def _check_references(name: str, value: Any) -> None:
    dict_of(name, value)


def _one_of(name: str, value: Any, allowed: Sequence[str]) -> str:
    """The word that is meant, however its letters are written (``framework="python"``)."""
    for word in allowed:
        if str(value).lower() == word.lower():
            return word
    raise RunConfigurationException(f"{name}={value!r}: there are {', '.join(allowed)}")


class DockerConfiguration(Settings):
    """Whether a container is asked for, which no job here runs in: submit says so."""

    _fields: ClassVar = ("use_docker", "shared_volumes", "arguments", "shm_size")
    _differs: ClassVar = dict.fromkeys(_fields, "no container is started: jobs run in this Python environment, and that is said")

    def __init__(
        self,
        use_docker: bool = False,
        shared_volumes: bool = True,
        arguments: Sequence[str] | None = None,
        shm_size: str | None = None,
    ) -> None:
        self.use_docker, self.shared_volumes = use_docker, shared_volumes
        self.arguments, self.shm_size = list(arguments or []), shm_size


def _only_true(name: str, value: Any) -> None:
    if value is not True:
        raise UserErrorException(f"{name}={value!r} is not available: a run's source, ./outputs and ./logs are always kept")


class HistorySection(Settings):
    """``run_config.history``: what is kept of a run, which is all of it."""

    _fields: ClassVar = ("output_collection", "snapshot_project")
    _checks: ClassVar = dict.fromkeys(_fields, _only_true)
    _differs: ClassVar = dict.fromkeys(_fields, "always True: a run's source, ./outputs and ./logs are kept")
    _refused: ClassVar = {"directories_to_watch": "./outputs and ./logs are kept; let the script write there"}

    def __init__(self) -> None:
        self.output_collection = self.snapshot_project = True


class MpiConfiguration(Settings):
    """Ranks under mpirun: ``node_count`` x ``process_count_per_node``."""

    _fields: ClassVar = ("process_count_per_node", "node_count")
    _checks: ClassVar = {"process_count_per_node": check_count, "node_count": _check_count_or_none}

    def __init__(self, process_count_per_node: int = 1, node_count: int | None = None) -> None:
        self.process_count_per_node, self.node_count = process_count_per_node, node_count


class TensorflowConfiguration(Settings):
    """A TensorFlow cluster of workers and parameter servers; worker 0 leads."""

    _fields: ClassVar = ("worker_count", "parameter_server_count")
    _checks: ClassVar = {"worker_count": check_count, "parameter_server_count": functools.partial(check_count, least=0)}

    def __init__(self, worker_count: int = 1, parameter_server_count: int = 1) -> None:
        self.worker_count, self.parameter_server_count = worker_count, parameter_server_count


class RunConfiguration(Settings):
    """How a script is run. Attributes that dtrain does not have are refused when they are set."""

    _fields: ClassVar = (
        "script",
        "arguments",
        "framework",
        "communicator",
        "target",
        "environment",
        "history",
        "node_count",
        "mpi",
        "tensorflow",
        "data_references",
        "max_run_duration_seconds",
        "environment_variables",
        "docker",
    )
    _checks: ClassVar = {
        "node_count": check_count,
        "max_run_duration_seconds": _check_seconds,
        "mpi": _is_a("RunConfiguration", MpiConfiguration),
        "tensorflow": _is_a("RunConfiguration", TensorflowConfiguration),
        "docker": _is_a("RunConfiguration", DockerConfiguration),
        "history": _is_a("RunConfiguration", HistorySection),
        "data_references": _check_references,
    }
    _elsewhere: ClassVar = {
        "compute_target": "target",
        "process_count_per_node": "mpi.process_count_per_node",
        "worker_count": "tensorflow.worker_count",
        "parameter_server_count": "tensorflow.parameter_server_count",
        "conda_dependencies": "environment.python.conda_dependencies",
        "source_directory": "ScriptRunConfig(source_directory=)",
    }
    _differs: ClassVar = {
        "auto_prepare_environment": "always True: packages that are missing are installed; `dtrain azureml --no-install` refuses",
    }
    _refused: ClassVar = {
        "amlcompute": "create the target with ComputeTarget.create, and set target to its name",
        "data": "use data_references, or a Datastore's path in the arguments",
        "hdi": "there is no Spark here",
        "load": "make a RunConfiguration in the script",
        "save": "make a RunConfiguration in the script",
        "services": "there are no services of Azure's",
        "spark": "there is no Spark here",
    }

    def __init__(
        self,
        script: str | None = None,
        arguments: Sequence[Any] | None = None,
        framework: str | None = None,
        communicator: str | None = None,
        conda_dependencies: Any = None,
    ) -> None:
        self.script = script
        self.arguments = arguments_of(arguments)
        self.framework = framework or "Python"
        self.communicator = communicator or "None"
        self.target: Any = "local"
        self.node_count = 1
        self.mpi = MpiConfiguration()
        self.tensorflow = TensorflowConfiguration()
        self.data_references: dict[str, Any] = {}
        self.max_run_duration_seconds: float | None = None
        self.environment_variables: dict[str, str] = {}
        self.docker = DockerConfiguration()
        self.history = HistorySection()
        self.environment = Environment("default")
        if conda_dependencies is not None:
            self.environment.python.conda_dependencies = conda_dependencies

    @property
    def auto_prepare_environment(self) -> bool:
        """True: packages that are missing are installed. Raises UserErrorException when it is set to something else."""
        return True

    @auto_prepare_environment.setter
    def auto_prepare_environment(self, value: bool) -> None:
        if value is not True:
            raise UserErrorException(
                f"auto_prepare_environment={value!r} is not there: packages that are missing are installed; `dtrain azureml "
                "--no-install` refuses instead"
            )

    def _distribution(self) -> MpiConfiguration | TensorflowConfiguration | None:
        """What the framework and the communicator ask for. Raises RunConfigurationException for what we do not have."""
        communicator = _one_of("communicator", self.communicator, COMMUNICATORS)
        _one_of("framework", self.framework, FRAMEWORKS)
        if communicator in ("OpenMpi", "IntelMpi"):
            return self.mpi
        return self.tensorflow if communicator == "ParameterServer" else None


_SCRIPT_RUN: Mapping[str, Any] = {
    "script": None,
    "arguments": None,
    "run_config": None,
    "compute_target": None,
    "environment": None,
    "distributed_job_config": None,
    "max_run_duration_seconds": 2592000,
    "resume_from": None,
    "docker_runtime_config": None,
}


# Options that stand for a field of the run configuration; distribute() sets several by the last one.
_OF_THE_RUN = {
    "compute_target": "target",
    "environment": "environment",
    "max_run_duration_seconds": "max_run_duration_seconds",
    "docker_runtime_config": "docker",
    "distributed_job_config": "",
}


class ScriptRunConfig(Settings):
    """A script and how it is run, for ``experiment.submit``. Called by control scripts; does not block."""

    _fields: ClassVar = ("source_directory", "script", "arguments", "run_config", "resume_from")
    _checks: ClassVar = {
        "source_directory": check_path,
        "script": check_path,
        "run_config": _is_a("ScriptRunConfig", RunConfiguration),
    }
    _elsewhere: ClassVar = {
        **{name: f"run_config.{place}" for name, place in RunConfiguration._elsewhere.items() if name != "source_directory"},
        **{name: f"run_config.{name}" for name in RunConfiguration._fields if name not in ("script", "arguments")},
        "distributed_job_config": "an argument of ScriptRunConfig()",
    }
    _refused: ClassVar = {
        "command": "name a Python script with script=",
    }
    _options: ClassVar = tuple(_SCRIPT_RUN)
    _differs: ClassVar = {
        "(docker_runtime_config=)": "no container is started: jobs run in this Python environment, and that is said",
        "(max_run_duration_seconds=)": "the run ends Failed, with exit code 124",
    }

    def __init__(self, source_directory: str | None = None, *positional: Any, **given: Any) -> None:
        """Raises UserErrorException for what is not available without Azure, TypeError for an unknown argument."""
        if len(positional) > 3:
            raise TypeError("ScriptRunConfig() takes source_directory, script, arguments, run_config; the others by name")
        named = dict(zip(("script", "arguments", "run_config"), positional, strict=False))
        if twice := named.keys() & given.keys():
            raise TypeError(f"ScriptRunConfig() got {sorted(twice)[0]!r} twice")
        options = take_options("ScriptRunConfig", {**named, **given}, _SCRIPT_RUN, self._refused)
        config: RunConfiguration = RunConfiguration() if options["run_config"] is None else options["run_config"]
        check_kind("ScriptRunConfig", "run_config", config, "RunConfiguration")
        if any(options[name] != _SCRIPT_RUN[name] for name in _OF_THE_RUN):
            config = copy.copy(config)  # which may be another one's, too
        self.source_directory = source_directory or "."
        self.script = options["script"] or config.script
        self.arguments = arguments_of(config.arguments if options["arguments"] is None else options["arguments"])
        self.run_config = config
        self.resume_from = options["resume_from"]
        if self.script is None:
            raise UserErrorException("ScriptRunConfig has no script: give script='train.py'")
        for name, field in _OF_THE_RUN.items():
            if field and options[name] != _SCRIPT_RUN[name]:
                setattr(config, field, options[name])
        distribute(config, options["distributed_job_config"])


def distribute(config: RunConfiguration, distribution: Any) -> None:
    """Set the communicator and its numbers by an MpiConfiguration or TensorflowConfiguration."""
    if distribution is None:
        return
    if isinstance(distribution, MpiConfiguration):
        config.communicator, config.mpi = "OpenMpi", distribution
        config.node_count = distribution.node_count or config.node_count
    elif isinstance(distribution, TensorflowConfiguration):
        config.framework, config.communicator, config.tensorflow = "TensorFlow", "ParameterServer", distribution
    else:
        raise UserErrorException(
            f"distributed training by {distribution!r} is not there; use MpiConfiguration or TensorflowConfiguration"
        )
