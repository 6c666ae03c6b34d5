"""``Environment`` and ``CondaDependencies``: which packages and variables a job asks for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from dtrain.azureml.console import warn
from dtrain.azureml.errors import Settings, UserErrorException
from dtrain.azureml.values import list_of
from dtrain.azureml.versions import write_next
from dtrain.azureml.workspace import Workspace
from dtrain.files import read_json
from dtrain.layout import check_name
from dtrain.registry.store import numbers_in

DEFAULT_CPU_IMAGE = "dtrain/this-python"
DEFAULT_GPU_IMAGE = "dtrain/this-python"
_NO_CONTAINER = "jobs run in this Python environment, not in containers; install what they need here"


class CondaDependencies(Settings):
    """Packages that a job needs: those that are not installed when it is submitted are, by pip, for it."""

    _fields: ClassVar = ()
    _differs: ClassVar = {
        "add_channel": "nothing comes from conda's channels: packages that are missing are pip's",
        "set_python_version": "jobs run by this Python; submit says so where they ask for another one",
    }

    def __init__(self, conda_dependencies_file_path: str | None = None) -> None:
        self._pip: list[str] = []
        self._conda: list[str] = []
        if conda_dependencies_file_path is not None:
            conda, pip = read_conda_file(Path(conda_dependencies_file_path))
            self._conda, self._pip = conda, pip

    @staticmethod
    def create(
        pip_indexurl: str | None = None,
        pip_packages: Sequence[str] | None = None,
        conda_packages: Sequence[str] | None = None,
        python_version: str | None = None,
        pin_sdk_version: bool = True,
    ) -> CondaDependencies:
        """Packages of pip and conda. ``python_version`` is compared with this Python's. UserErrorException for an index."""
        if pip_indexurl is not None:
            raise UserErrorException("pip_indexurl= has no effect here; set PIP_INDEX_URL, which dtrain's pip reads")
        made = CondaDependencies()
        made._pip = list_of("pip_packages", pip_packages)
        python = [f"python={python_version}"] if python_version else []
        made._conda = [*python, *list_of("conda_packages", conda_packages)]
        return made

    def add_pip_package(self, pip_package: str) -> None:
        """Ask for a package of pip's."""
        self._pip.append(pip_package)

    def add_conda_package(self, conda_package: str) -> None:
        """Ask for a package of conda's."""
        self._conda.append(conda_package)

    def set_python_version(self, version: str) -> None:
        """Ask for a Python. Jobs run by this one, which submit says where it is another."""
        self.remove_conda_package("python")
        self._conda.insert(0, f"python={version}")

    def add_channel(self, channel: str) -> None:
        """Only a warning: nothing comes from conda's channels."""
        warn(f"channel {channel!r} is not used: packages that are missing are pip's")

    def add_tensorflow_pip_package(self, core_type: str = "cpu", version: str | None = None) -> None:
        """Ask for TensorFlow."""
        self._pip.append("tensorflow" + (f"=={version}" if version else ""))

    def remove_pip_package(self, pip_package: str) -> None:
        """Ask for the package no longer."""
        self._pip = [each for each in self._pip if _name(each) != _name(pip_package)]

    def remove_conda_package(self, conda_package: str) -> None:
        """Ask for the package no longer."""
        self._conda = [each for each in self._conda if _name(each) != _name(conda_package)]

    def serialize_to_string(self) -> str:
        """The packages as the text of a conda file."""
        conda = [f"- {package}" for package in self._conda]
        pip = ["- pip:", *(f"  - {package}" for package in self._pip)] if self._pip else []
        return "\n".join(["dependencies:", *conda, *pip]) + "\n"

    def save_to_file(self, base_directory: str, conda_file_path: str | None = None) -> str:
        """Write a conda file (conda_dependencies.yml) in a folder, and return its path there."""
        return self.save(str(Path(base_directory) / (conda_file_path or "conda_dependencies.yml")))

    def save(self, path: str | None = None) -> str:
        """Write a conda file (None: conda_dependencies.yml), and return its path."""
        target = Path(path or "conda_dependencies.yml")
        target.write_text(self.serialize_to_string())
        return str(target)

    @property
    def pip_packages(self) -> Iterable[str]:
        return iter(self._pip)

    @property
    def conda_packages(self) -> Iterable[str]:
        return iter(self._conda)


class PythonSection(Settings):
    """``environment.python``."""

    _fields: ClassVar = ("user_managed_dependencies", "conda_dependencies", "interpreter_path")
    _refused: ClassVar = {"conda_dependencies_file": "use Environment.from_conda_specification"}

    def __init__(self) -> None:
        self.user_managed_dependencies = False
        self.conda_dependencies = CondaDependencies()
        self.interpreter_path = "python"


class DockerSection(Settings):
    """``environment.docker``: read, and said at submit not to be used."""

    _fields: ClassVar = ("enabled", "base_image", "base_dockerfile", "gpu_support", "shared_volumes", "arguments", "shm_size")
    _differs: ClassVar = dict.fromkeys(_fields, "no container is started: jobs run in this Python environment, and that is said")
    _refused: ClassVar = {"base_image_registry": _NO_CONTAINER}

    def __init__(self) -> None:
        self.enabled = False
        self.base_image: str | None = None
        self.base_dockerfile: str | None = None
        self.gpu_support, self.shared_volumes = False, True
        self.arguments: list[str] = []
        self.shm_size: str | None = None


class Environment(Settings):
    """Packages and variables under a name. Called by control scripts; does not block."""

    _fields: ClassVar = ("name", "version", "environment_variables", "python", "docker")
    _elsewhere: ClassVar = {
        "conda_dependencies": "python.conda_dependencies",
        "pip_packages": "python.conda_dependencies.add_pip_package()",
        "conda_packages": "python.conda_dependencies.add_conda_package()",
        "user_managed_dependencies": "python.user_managed_dependencies",
        "interpreter_path": "python.interpreter_path",
    }
    _refused: ClassVar = {
        "build": _NO_CONTAINER,
        "build_local": _NO_CONTAINER,
        "from_docker_image": _NO_CONTAINER,
        "from_dockerfile": _NO_CONTAINER,
        "from_existing_conda_environment": "set python.interpreter_path to its Python, python.user_managed_dependencies to True",
        "get_image_details": _NO_CONTAINER,
        "inferencing_stack_version": "models are registered and downloaded here, not deployed",
        "spark": "there is no Spark here",
        "databricks": "there is no Databricks here",
        "r": "there is no R here",
        "load_from_directory": "Environment.get(ws, name) reads one that was registered",
        "save_to_directory": "Environment.register(ws) keeps it",
    }
    _differs: ClassVar = {
        "from_pip_requirements": "pip_version is not used, and that is said",
        "docker": "no container is started: submit says so where docker is asked for",
        "python": "packages that this Python has not are installed by pip, into a virtual environment of the workspace; "
        "interpreter_path is used with user_managed_dependencies=True, and has to have dtrain",
        "get": "one that register() kept; a curated one (AzureML-TensorFlow-2.3-GPU) asks for its framework, as it is installed",
    }

    def __init__(self, name: str) -> None:
        self.name = name
        self.version: str | None = None
        self.environment_variables: dict[str, str] = {}
        self.python = PythonSection()
        self.docker = DockerSection()

    @staticmethod
    def from_pip_requirements(name: str, file_path: str, pip_version: str | None = None) -> Environment:
        """An environment of a requirements file's packages. Raises UserErrorException when there is no such file."""
        if pip_version is not None:
            warn(f"pip_version={pip_version!r} is not used: packages that are missing are installed by the pip that is here")
        made = Environment(name)
        made.python.conda_dependencies._pip = read_requirements(Path(file_path))
        return made

    @staticmethod
    def from_conda_specification(name: str, file_path: str) -> Environment:
        """An environment of a conda file's packages. Raises UserErrorException when there is none, or it cannot be read."""
        made = Environment(name)
        made.python.conda_dependencies = CondaDependencies(file_path)
        return made

    def register(self, workspace: Workspace) -> Environment:
        """Keep it in the workspace as the next version of its name; the same again is the version that it was."""
        folder = _folder(workspace) / check_name("environment", self.name)
        values, versions = self._values(), numbers_in(folder)
        if versions and read_json(folder / f"{versions[-1]}.json") == values:
            self.version = str(versions[-1])
        else:
            self.version = str(write_next(folder, values))
        return self

    def _values(self) -> dict[str, Any]:
        """What it asks for, as JSON has it."""
        packages = self.python.conda_dependencies
        return {
            "pip": list(packages._pip),
            "conda": list(packages._conda),
            "environment_variables": {name: str(value) for name, value in self.environment_variables.items()},
            "user_managed_dependencies": self.python.user_managed_dependencies,
            "interpreter_path": self.python.interpreter_path,
            "docker": {name: getattr(self.docker, name) for name in DockerSection._fields},
        }

    @staticmethod
    def _of(name: str, values: Mapping[str, Any]) -> Environment:
        """The environment of :meth:`_values`; what is not among them is as in a new one."""
        made = Environment(name)
        made.environment_variables = dict(values["environment_variables"])
        made.python.conda_dependencies._pip, made.python.conda_dependencies._conda = list(values["pip"]), list(values["conda"])
        made.python.user_managed_dependencies = values.get("user_managed_dependencies", False)
        made.python.interpreter_path = values.get("interpreter_path", "python")
        for field, value in values.get("docker", {}).items():
            setattr(made.docker, field, value)
        return made

    @staticmethod
    def get(workspace: Workspace, name: str, version: str | None = None, label: str | None = None) -> Environment:
        """The version that was registered under this name; None: the newest. Raises UserErrorException when there is none."""
        if label not in (None, "latest"):
            raise UserErrorException(f"label={label!r} is not available: 'latest' is the newest version, as no label is")
        folder = _folder(workspace) / check_name("environment", name)
        versions = numbers_in(folder)
        if not versions:
            if name.startswith("AzureML-"):
                return _curated(name)
            raise UserErrorException(
                f"no environment {name!r} is registered in workspace {workspace.name!r}; register() keeps one, and "
                "Environment(name) makes one, with the packages that the script needs"
            )
        number = str(versions[-1] if version is None else version)
        if number not in map(str, versions):
            has = ", ".join(map(str, versions))
            raise UserErrorException(f"environment {name!r} has version {has}, and not {number}, which was asked for")
        made = Environment._of(name, read_json(folder / f"{number}.json"))
        made.version = number
        return made

    def __repr__(self) -> str:
        packages = self.python.conda_dependencies
        return f"Environment(name={self.name!r}, version={self.version!r}, pip={packages._pip}, conda={packages._conda})"

    def clone(self, new_name: str) -> Environment:
        """The same under another name."""
        return Environment._of(new_name, self._values())

    @staticmethod
    def list(workspace: Workspace) -> Mapping[str, Environment]:
        """The registered environments by name, the newest version of each; a curated one is found by its name, too."""
        return _Environments(workspace)


class _Environments(Mapping[str, Environment]):
    """Environments of a workspace; each is read when it is asked for, as :meth:`Environment.get` does."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace

    def __getitem__(self, name: str) -> Environment:
        try:
            return Environment.get(self._workspace, name)
        except UserErrorException as error:
            raise KeyError(str(error)) from error

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(path.name for path in _folder(self._workspace).glob("*") if numbers_in(path)))

    def __len__(self) -> int:
        return len(tuple(iter(self)))


def _folder(workspace: Workspace) -> Path:
    """Where a workspace's registered environments are, each a folder of versions."""
    return workspace._folder.azureml / "environments"


_FRAMEWORKS = {
    "chainer": "chainer",
    "tensorflow": "tensorflow",
    "pytorch": "torch",
    "scikit": "scikit-learn",
    "sklearn": "scikit-learn",
}


def _curated(name: str) -> Environment:
    """An environment under the name of one of Azure's curated ones, which asks for its framework in the version that is here."""
    made = Environment(name)
    made.python.conda_dependencies._pip = [package for word, package in _FRAMEWORKS.items() if word in name.lower()]
    warn(f"environment {name}: Azure's curated environments are not here; the job runs in this Python, with what is installed")
    return made


def _name(requirement: str) -> str:
    return re.split(r"[\s=<>!~;\[]", requirement.strip(), maxsplit=1)[0].lower().replace("_", "-")


def read_requirements(path: Path) -> list[str]:
    """The requirements of a pip file. Raises UserErrorException when it is absent, or has a line that is no requirement."""
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise UserErrorException(f"requirements file {path} cannot be read: {error.strerror}") from error
    found = [re.sub(r"(^|\s)#.*", "", line).strip() for line in lines]
    if options := [line for line in found if line.startswith("-")]:
        raise UserErrorException(f"{path} has {options[0]!r}; give a file of packages alone, a requirement a line")
    return [line for line in found if line]


def read_conda_file(path: Path) -> tuple[list[str], list[str]]:
    """The packages of conda and of pip in a conda file (YAML): its lists ``dependencies`` and ``dependencies: - pip:``.

    Raises UserErrorException when it is absent, or not of that form.
    """
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise UserErrorException(f"conda file {path} cannot be read: {error.strerror}") from error
    conda: list[str] = []
    pip: list[str] = []
    section, pip_indent = "", -1
    for number, line in enumerate(lines, 1):
        text = re.sub(r"(^|\s)#.*", "", line).rstrip()
        match = re.fullmatch(r"(\s*)(?:- *)?(.*?)", text)
        assert match is not None
        indent, item, is_item = len(match[1]), match[2].strip("'\""), text.lstrip().startswith("-")
        if not item or text == "---":
            continue
        if indent == 0 and not is_item:
            section = item.partition(":")[0]
        elif section == "dependencies" and is_item and item == "pip:":
            pip_indent = indent
        elif section == "dependencies" and is_item:
            pip_indent = -1 if indent <= pip_indent else pip_indent
            (pip if pip_indent >= 0 else conda).append(item)
        elif section == "dependencies":
            raise UserErrorException(f"{path}, line {number}: {line!r} is not understood; give packages as pip_packages instead")
    return conda, pip
