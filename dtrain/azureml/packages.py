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

from dtrain.azureml.errors import UserErrorException

# What the SDK's own packages were for is dtrain's part here.
_OURS = re.compile(r"azureml(-.*)?|inference-schema|applicationinsights")
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


@dataclass(frozen=True)
class Lack:
    """One package that is missing, or of another version (``installed``) than ``wanted``."""

    wanted: str
    installed: str | None

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
    if name == "python":
        installed: str | None = platform.python_version()
    else:
        here = _OTHER_NAMES.get(name, str(name))
        installed = next((version for each in (here, *_ALSO.get(here, ())) if (version := _installed(each))), None)
    if installed is None or not requirement.specifier.contains(installed, prereleases=True):
        return Lack(text, installed)
    return None


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_packages(pip: Iterable[str], conda: Iterable[str], *, any_version: bool) -> list[str]:
    """Sentences about packages of another version than asked for, where ``any_version`` lets them pass.

    Raises UserErrorException with the pip line for what is missing, and for other versions unless ``any_version``.
    """
    lacks = find_lacks(pip, conda)
    bad = [lack for lack in lacks if lack.installed is None or not any_version]
    if bad:
        others = [lack for lack in bad if lack.wanted.lower().startswith("python")]
        install = [shlex.quote(lack.wanted.replace(" ", "")) for lack in bad if lack not in others]
        line = f"; run: {shlex.quote(sys.executable)} -m pip install {' '.join(install)}" if install else ""
        other = ", or accept what is installed: `dtrain azureml --any-version ...`" if any(lack.installed for lack in bad) else ""
        raise UserErrorException(f"the job asks for packages that this Python has not: {', '.join(map(str, bad))}{line}{other}")
    return [f"the job asked for {lack.wanted}; it runs with {lack.installed}" for lack in lacks]
