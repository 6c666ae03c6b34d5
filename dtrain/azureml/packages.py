"""Compares the packages that a job asks for with what is installed in this Python."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shlex
import sys
from collections.abc import Iterable
from dataclasses import dataclass

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from dtrain import install as commands
from dtrain.azureml import venv
from dtrain.azureml.errors import UserErrorException

# What the SDK's own packages were for is dtrain's part here.
_OURS = re.compile(r"azureml(-.*)?|dtrain|inference-schema|applicationinsights")
# Packages of conda that no Python package answers for, or another one.
_NOT_PYTHON = frozenset(
    {"pip", "cudatoolkit", "cudnn", "nccl", "openmpi", "mpich", "gcc", "gxx", "cmake", "git", "blas", "mkl", "openblas"}
)
_OTHER_NAMES = {"tensorflow-gpu": "tensorflow", "pytorch": "torch", "py-opencv": "opencv-python"}
# A build of the same under another name.
_ALSO = {
    "tensorflow": ("tensorflow-cpu", "tensorflow-gpu"),
    "cupy": tuple(f"cupy-cuda{release}" for release in ("11x", "12x", "13x")),
}
# What is the same for all jobs: what launcher and ranks share, and what has to be compiled for what is here. With the command
# that installs it, if there is one.
_NOT_FOR_ONE_JOB = {
    **dict.fromkeys(venv.FIXED, ""),
    "mpi4py": commands.MPI,
    "chainer": commands.CHAINER,
    "horovod": commands.HOROVOD,
}


@dataclass(frozen=True)
class Lack:
    """One package that is missing, or of another version (``installed``) than ``wanted``. ``requirement`` is what pip is asked
    for, and ``name`` the package's in it."""

    wanted: str
    installed: str | None
    name: str
    requirement: str

    def __str__(self) -> str:
        return f"{self.wanted} ({f'installed is {self.installed}' if self.installed else 'not installed'})"


def find_lacks(pip: Iterable[str], conda: Iterable[str]) -> list[Lack]:
    """What of the asked packages is not here, as asked. Raises UserErrorException for what is no requirement."""
    wanted = [*map(_from_conda, conda), *pip]
    return [lack for text in wanted if text is not None and (lack := _lack(text)) is not None]


def _from_conda(text: str) -> str | None:
    """A package of conda's as pip would ask for it; None for one that is no Python package."""
    match = re.fullmatch(r"(?:[\w-]+::)?([\w.-]+)\s*(==?|[<>!~]=?)?\s*(\S*)", text.strip())
    if match is None:
        raise UserErrorException(f"conda package {text!r} is not understood; write it as name, or name=version")
    name, operator, version = match[1].lower(), match[2] or "", match[3]
    if name in _NOT_PYTHON:
        return None
    version = version.split("=")[0]  # conda's build string
    if operator == "=":  # of conda's: any version that begins so
        return f"{name}=={version}" + ("" if version.endswith("*") else ".*")
    return f"{name}{operator}{version}"


def _lack(text: str) -> Lack | None:
    try:
        requirement = Requirement(text)
    except InvalidRequirement as error:
        raise UserErrorException(f"package {text!r} is not understood: {error}".split("\n")[0]) from error
    name = canonicalize_name(requirement.name)
    if _OURS.fullmatch(name) or (requirement.marker is not None and not requirement.marker.evaluate()):
        return None
    here = _OTHER_NAMES.get(name, str(name))
    if name == "python":
        installed: str | None = platform.python_version()
    else:
        installed = installed_version(here)
    if installed is None or not requirement.specifier.contains(installed, prereleases=True):
        requirement.name = here
        return Lack(text, installed, here, str(requirement))
    return None


def installed_version(name: str) -> str | None:
    """The version of a package, or of a build of it under another name; None where there is none."""
    return next((version for each in (name, *_ALSO.get(name, ())) if (version := _installed(each))), None)


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def missing_packages(
    pip: Iterable[str], conda: Iterable[str], *, any_version: bool, install: bool
) -> tuple[list[str], list[str]]:
    """What has to be installed for a job, as pip's requirements; and sentences about what is of another version than asked for,
    where ``any_version`` lets that pass: for Python itself, always.

    Raises UserErrorException for what cannot be installed for one job, and without ``install`` for all that is missing.
    """
    lacks = find_lacks(pip, conda)
    # Environments of Azure's name a Python of their time, which neither dtrain nor today's packages run on: only said.
    bad = [lack for lack in lacks if lack.installed is None or not (any_version or lack.name == "python")]
    others = dict.fromkeys(lack for lack in lacks if lack not in bad)
    notes = [f"the job asked for {lack.wanted}; it runs with {_runs_with(lack)}" for lack in others]
    fixed = [lack for lack in bad if lack.name in _NOT_FOR_ONE_JOB]
    if bad and (fixed or not install):
        raise UserErrorException(_refusal(fixed or bad))
    return [lack.requirement for lack in bad], notes


def _runs_with(lack: Lack) -> str:
    return f"Python {lack.installed} ({sys.executable})" if lack.name == "python" else str(lack.installed)


def _refusal(bad: list[Lack]) -> str:
    """Which packages are missing, and what to do about it."""
    lines = [_NOT_FOR_ONE_JOB[lack.name] for lack in bad if _helps(lack)]
    plain = [shlex.quote(lack.requirement) for lack in bad if lack.name not in _NOT_FOR_ONE_JOB]
    if plain:
        lines.insert(0, f"{shlex.quote(sys.executable)} -m pip install {' '.join(plain)}")
    line = f"; run: {' && '.join(lines)}" if lines else "; ask for another version"
    other = ", or accept what is installed: `dtrain azureml --any-version ...`" if any(lack.installed for lack in bad) else ""
    return f"the job asks for packages that this Python has not: {', '.join(map(str, bad))}{line}{other}"


def _helps(lack: Lack) -> bool:
    """Whether the command that installs a package, of the one version that dtrain works with, brings what is asked for."""
    pinned = re.search(rf"\b{re.escape(lack.name)}==([\w.]+)", _NOT_FOR_ONE_JOB.get(lack.name, ""))
    if pinned is None:
        return lack.installed is None and bool(_NOT_FOR_ONE_JOB.get(lack.name))
    return Requirement(lack.requirement).specifier.contains(pinned[1])
