"""``Estimator``, ``Chainer`` and ``TensorFlow``: keyword arguments that come down to a ScriptRunConfig."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from dtrain.azureml.console import warn
from dtrain.azureml.datastore import DataReference, Datastore
from dtrain.azureml.environment import CondaDependencies, Environment, read_requirements
from dtrain.azureml.errors import Settings, TrainingException, UserErrorException, take_options
from dtrain.azureml.packages import installed_version
from dtrain.azureml.runconfig import (
    MpiConfiguration,
    RunConfiguration,
    ScriptRunConfig,
    TensorflowConfiguration,
    check_count,
    distribute,
)
from dtrain.azureml.values import check_path, dict_of, list_of, variables_of
from dtrain.binding import count_gpus

_KNOWN: Mapping[str, Any] = {
    "compute_target": None,
    "entry_script": None,
    "script_params": None,
    "node_count": 1,
    "process_count_per_node": 1,
    "distributed_backend": None,
    "distributed_training": None,
    "use_gpu": False,
    "use_docker": True,
    "custom_docker_image": None,
    "custom_docker_base_image": None,
    "user_managed": False,
    "conda_packages": None,
    "pip_packages": None,
    "conda_dependencies_file_path": None,
    "conda_dependencies_file": None,
    "pip_requirements_file_path": None,
    "pip_requirements_file": None,
    "environment_variables": None,
    "environment_definition": None,
    "inputs": None,
    "shm_size": None,
    "resume_from": None,
    "max_run_duration_seconds": None,
}
_NO_VM = "create a compute target with ComputeTarget.create, or leave it out for this machine"
_REFUSED: Mapping[str, str] = {
    "vm_size": _NO_VM,
    "vm_priority": _NO_VM,
    "image_registry_details": "jobs run in this Python environment, not in containers",
    **dict.fromkeys(("_disable_validation", "_enable_optimized_mode", "_show_lint_warnings"), "a setting of the SDK's own"),
    "source_directory_data_store": "the source is copied into the run's folder",
}


_INSTALLED = "what is installed is used; another version is said"
_PACKAGES = "what is missing is installed by pip, into a virtual environment of the workspace; conda is not used"
_NO_CONTAINER = "no container is started: jobs run in this Python environment, and that is said"


_PACKAGE_OPTIONS = (
    "pip_packages",
    "conda_packages",
    "pip_requirements_file",
    "pip_requirements_file_path",
    "conda_dependencies_file",
    "conda_dependencies_file_path",
)


class Estimator(Settings):
    """A script, its arguments, and how many processes of which packages run it. Called by control scripts; does not block.

    ``script_params`` keep their order; a value of ``''`` makes a bare flag of its name.
    """

    _framework: ClassVar[str | None] = None
    _options: ClassVar = tuple(_KNOWN)
    _differs: ClassVar = {
        "(conda_packages=)": _PACKAGES,
        "(custom_docker_base_image=)": _NO_CONTAINER,
        "(custom_docker_image=)": _NO_CONTAINER,
        "(environment_definition=)": "in place of packages that are given otherwise, which are named as not used",
        "(node_count=)": "groups of processes of this machine, hosts, or nodes of Slurm's, up to the compute target's max_nodes",
        "(pip_packages=)": _PACKAGES,
        "(resume_from=)": "a path, a datastore's path or a run (its outputs): the script is given it as --resume-from",
        "(shm_size=)": _NO_CONTAINER,
        "(use_docker=)": "no container is started, whichever is given: jobs run in this Python environment",
        "(use_gpu=)": "a job sees the GPUs of the machine; where there is none, that is said",
        "(user_managed=)": "True: packages are not looked for",
    }
    _refused: ClassVar = {f"({name}=)": reason for name, reason in _REFUSED.items() if not name.startswith("_")}
    _elsewhere: ClassVar = ScriptRunConfig._elsewhere

    def __init__(self, source_directory: str | None = None, **given: Any) -> None:
        """Raises UserErrorException for what is not available without Azure, TypeError for an unknown argument."""
        known = _KNOWN if self._framework is None else {**_KNOWN, "framework_version": None}
        if type(self) is TensorFlow:
            known = {**known, "worker_count": None, "parameter_server_count": None}
        options = _shaped(take_options(type(self).__name__, given, known, _REFUSED))
        check_path("source_directory", source_directory)
        script = options["entry_script"]
        if script is None:
            raise TrainingException(f"{type(self).__name__} has no entry_script; give the script to run, relative to the source")
        for name in ("node_count", "process_count_per_node"):
            check_count(name, options[name])
        arguments, references = _arguments(options["script_params"])
        config = RunConfiguration(script=script, arguments=arguments)
        config.target = options["compute_target"] if options["compute_target"] is not None else "local"
        config.node_count = options["node_count"]
        config.max_run_duration_seconds = options["max_run_duration_seconds"]
        config.environment = self._environment(Path(source_directory or "."), options)
        for reference in [*references, *map(_reference, options["inputs"])]:
            name = reference.data_reference_name
            reference._check_same(name, config.data_references.setdefault(name, reference))
        distribute(config, self._distribution(options))
        self._config = ScriptRunConfig(source_directory, run_config=config, resume_from=options["resume_from"])
        self._note_what_is_not_used(options)

    @classmethod
    def get_supported_versions(cls) -> list[str]:
        """The versions of the framework that jobs can have: the one that is installed, or none."""
        version = installed_version(cls._framework) if cls._framework is not None else None
        return [] if version is None else [version]

    @property
    def source_directory(self) -> str:
        return str(self._config.source_directory)

    @property
    def run_config(self) -> RunConfiguration:
        return self._config.run_config

    @property
    def conda_dependencies(self) -> CondaDependencies:
        return self._config.run_config.environment.python.conda_dependencies

    def _distribution(self, options: dict[str, Any]) -> MpiConfiguration | TensorflowConfiguration | None:
        """How ranks are spread: by ``distributed_training``, or by the older ``distributed_backend`` and its counts."""
        chosen: MpiConfiguration | TensorflowConfiguration | None = options["distributed_training"]
        backend = options["distributed_backend"]
        per_node = options["process_count_per_node"]
        if chosen is not None and backend is not None:
            raise UserErrorException("distributed_training and distributed_backend exclude each other; leave the older one out")
        if backend is not None:
            if backend not in ("mpi", "ps"):
                raise UserErrorException(f"distributed_backend={backend!r}: there are 'mpi' and 'ps'")
            if backend == "ps" and type(self) is not TensorFlow:
                raise UserErrorException("distributed_backend='ps' is TensorFlow's; use the TensorFlow estimator, or 'mpi'")
            servers = options.get("parameter_server_count")
            chosen = (
                MpiConfiguration(per_node)
                if backend == "mpi"
                else TensorflowConfiguration(options["worker_count"] or 1, 1 if servers is None else servers)
            )
        elif options.get("worker_count") or options.get("parameter_server_count"):
            raise UserErrorException("worker_count and parameter_server_count go with distributed_backend='ps'")
        if isinstance(chosen, type):  # `distributed_training=MpiConfiguration`, without its brackets
            chosen = chosen()
        if chosen is None and (options["node_count"] > 1 or per_node > 1):
            raise UserErrorException(
                f"node_count={options['node_count']}, process_count_per_node={per_node}: say how the processes are joined, "
                "with distributed_training=MpiConfiguration()"
            )
        if isinstance(chosen, MpiConfiguration) and per_node != 1:
            chosen = MpiConfiguration(per_node, chosen.node_count)
        if chosen is not None and type(self) is SKLearn:
            raise UserErrorException("SKLearn is of one process; use Estimator for a script that joins several by MPI")
        if isinstance(chosen, TensorflowConfiguration) and type(self) is Chainer:
            raise UserErrorException("Chainer has no parameter servers; use MpiConfiguration()")
        return chosen

    def _environment(self, source: Path, options: dict[str, Any]) -> Environment:
        environment: Environment | None = options["environment_definition"]
        if environment is not None:
            for name in _PACKAGE_OPTIONS:
                if options[name]:
                    warn(f"{name}={options[name]!r} is not used: environment_definition= says which packages the job has")
        else:
            environment = Environment("estimator")
            dependencies = environment.python.conda_dependencies
            if (conda := options["conda_dependencies_file"] or options["conda_dependencies_file_path"]) is not None:
                environment = Environment.from_conda_specification("estimator", str(source / conda))
                dependencies = environment.python.conda_dependencies
            if (file := options["pip_requirements_file"] or options["pip_requirements_file_path"]) is not None:
                dependencies._pip += read_requirements(source / file)
            dependencies._pip += options["pip_packages"]
            dependencies._conda += options["conda_packages"]
            if self._framework is not None and self._framework not in dependencies._pip:
                dependencies._pip.append(self._framework)
        if options["user_managed"] or options["environment_variables"]:
            environment = copy.deepcopy(environment)  # which may be another estimator's, too
        if options["user_managed"]:
            environment.python.user_managed_dependencies = True
        environment.environment_variables.update(options["environment_variables"])
        return environment

    def _note_what_is_not_used(self, options: dict[str, Any]) -> None:
        """Say which options have no effect here; none is passed over in silence."""
        for name in ("custom_docker_image", "custom_docker_base_image", "shm_size"):
            if options[name]:
                warn(f"{name}={options[name]!r} is not used: jobs run in this Python environment, not in containers")
        if options["use_gpu"] and not count_gpus():
            warn("use_gpu=True, but this machine has no NVIDIA GPU that a job could see; it runs on the processor")
        version = options.get("framework_version")
        if version is not None and self._framework is not None:
            for installed in self.get_supported_versions():  # none: submit says so, with what to do
                if not installed.startswith(str(version)):
                    warn(f"framework_version={version!r} was asked for; the job runs with {self._framework} {installed}")


class Chainer(Estimator):
    """An estimator that asks for Chainer. ``import chainer`` in its scripts is made to work on today's NumPy and Python."""

    _options: ClassVar = ("framework_version",)
    _refused: ClassVar = {}
    _differs: ClassVar = {"(framework_version=)": _INSTALLED}

    _framework = "chainer"


class TensorFlow(Estimator):
    """An estimator that asks for TensorFlow; also takes the older ``worker_count`` and ``parameter_server_count``."""

    _options: ClassVar = ("framework_version", "worker_count", "parameter_server_count")
    _refused: ClassVar = {}
    _differs: ClassVar = {"(framework_version=)": _INSTALLED}
    _framework = "tensorflow"


class SKLearn(Estimator):
    """An estimator that asks for scikit-learn; of one process."""

    _options: ClassVar = ("framework_version",)
    _refused: ClassVar = {}
    _differs: ClassVar = {"(framework_version=)": _INSTALLED}
    _framework = "scikit-learn"


def _shaped(options: dict[str, Any]) -> dict[str, Any]:
    """The options, with lists and dicts where those are meant. Raises UserErrorException for what cannot be one."""
    lists = {name: list_of(name, options[name]) for name in ("pip_packages", "conda_packages", "inputs")}
    for name, value in options.items():
        if name == "entry_script" or "_file" in name:
            check_path(name, value)
    variables = variables_of("environment_variables", options["environment_variables"])
    return {
        **options,
        **lists,
        "script_params": dict_of("script_params", options["script_params"]),
        "environment_variables": variables,
    }


def _reference(value: Any) -> DataReference:
    if isinstance(value, Datastore):
        return value.as_mount()
    if isinstance(value, DataReference):
        return value
    raise UserErrorException(f"inputs has {value!r}; give references: datastore.path('...').as_mount(), or a dataset's")


def _arguments(script_params: Mapping[str, Any]) -> tuple[list[Any], list[DataReference]]:
    """Arguments in the order of ``script_params``, and the datastore references among them."""
    arguments: list[Any] = []
    references = []
    for name, value in script_params.items():
        arguments.append(name)
        if isinstance(value, Datastore | DataReference):
            references.append(_reference(value))
            arguments.append(references[-1])
        elif value is not None and value != "":
            arguments.append(value)
    return arguments, references
