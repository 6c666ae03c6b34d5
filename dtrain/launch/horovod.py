"""Launcher ``horovod``: mpirun starts the ranks, as Horovod's own does, once it is seen that Horovod can run here."""

from __future__ import annotations

import importlib.machinery
import mmap
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dtrain import install, resources
from dtrain.errors import MissingDependency, NotRunnable, UsageError
from dtrain.job_options import Controller
from dtrain.launch import mpi
from dtrain.launch.mpi_families import MpiInstallation, find_mpi
from dtrain.launch.places import Place
from dtrain.launch.plan import LaunchPlan
from dtrain.layout import RunLayout
from dtrain.spec import JobSpec

# Left alone, Horovod waits for a missing rank for ever and only warns. The first is when it begins to complain, the second when
# it ends the job; long enough for a rank that traces a large graph or validates alone. Cycle time, fusion and autotuning stay as
# they are: a shorter cycle burns a core, and training steps on CPU ranks got slower.
STALL_VARIABLES = {"HOROVOD_STALL_CHECK_TIME_SECONDS": "60", "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "600"}

# TensorFlow's own two pools heed none of the other libraries' variables (of resources.py); left alone, each rank has threads
# for the whole host: with all of them set to its share, two ranks on two cores made 204 steps/s of a small MLP instead of 187
# (bench_tensorflow.py). Horovod waits in no thread of these pools: one is enough. A task of a cluster may, and is left its own.
THREAD_VARIABLES = ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS")


# In the library's names, which are all that can be seen of it without loading it: it needs MPI's, and has Gloo within.
_BUILT_WITH = {"mpi": b"libmpi", "gloo": b"GlooController"}


@dataclass(frozen=True, kw_only=True)
class HorovodInstallation:
    """A Horovod that serves TensorFlow over MPI, and the MPI to start it with."""

    folder: Path
    mpi: MpiInstallation


def find_horovod(spec: JobSpec, path: list[str] | None = None) -> HorovodInstallation:
    """Find Horovod and MPI for the ranks of ``spec``; raises as :func:`find_built`, and where there is no MPI."""
    return HorovodInstallation(folder=find_built(spec, "mpi", path), mpi=find_mpi(spec.interpreter))


def find_built(spec: JobSpec, controller: Controller, path: list[str] | None = None) -> Path:
    """The folder of the Horovod for the ranks of ``spec``, on the ``path`` of their Python (None: it is asked for it); it is not
    imported.

    Raises MissingDependency when it is not installed, or built without TensorFlow or the ``controller``, and UsageError when
    something in the source folder would be imported in its place.
    """
    shadow = next((p for name in ("horovod.py", "horovod") if _is_importable(p := spec.source_folder / name)), None)
    if shadow is not None:
        raise UsageError(f"{shadow} would be imported in place of the package Horovod by every rank; give it another name")
    # `python -m dtrain.cli` puts the current folder on the path, which is not where the ranks look.
    found = importlib.machinery.PathFinder.find_spec(
        "horovod", [p for p in (module_path(spec) if path is None else path) if p not in ("", os.getcwd())]
    )
    if found is None or not found.submodule_search_locations:
        raise MissingDependency(f"launcher 'horovod' needs Horovod, which {spec.interpreter} has not; run: {install.HOROVOD}")
    folder = Path(next(iter(found.submodule_search_locations)))
    library = next(folder.glob("tensorflow/mpi_lib*.so"), None)
    if library is None:
        raise MissingDependency(f"the Horovod in {folder} is built without TensorFlow; build it anew: {install.HOROVOD}")
    if not _mentions(library, _BUILT_WITH[controller]):
        if controller == "gloo":
            raise MissingDependency(
                f"the Horovod in {folder} is built without Gloo, which --controller gloo and elastic jobs need; build it anew, "
                f"with cmake there: {install.HOROVOD_GLOO}"
            )
        raise MissingDependency(
            f"the Horovod in {folder} is built without MPI, by which its ranks are started; build it anew: {install.HOROVOD}"
        )
    return folder


def module_path(spec: JobSpec) -> list[str]:
    """Where the ranks' Python looks for modules. Raises NotRunnable when it does not say."""
    if spec.python is None:
        return sys.path
    argv = [spec.interpreter, "-c", "import sys; print(*sys.path, sep='\\n')"]
    try:
        return subprocess.run(argv, capture_output=True, text=True, timeout=30, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError) as error:
        raise NotRunnable(f"{spec.interpreter} cannot be asked where its modules are: {error}") from error


def _is_importable(path: Path) -> bool:
    return path.is_file() if path.suffix else (path / "__init__.py").is_file()


def _mentions(library: Path, name: bytes) -> bool:
    """Whether a shared library holds a name: of another one that it needs, or of something of its own."""
    with open(library, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(name) >= 0


def plan(spec: JobSpec, run: RunLayout, cwd: Path, horovod: HorovodInstallation, places: Sequence[Place] = ()) -> LaunchPlan:
    """The plan of launcher ``mpi``, with Horovod's variables. Pure; ``cwd`` is the folder in which the ranks will work."""
    environ = {**os.environ, **spec.environment}
    given = replace(spec, environment={**horovod_variables(environ), **spec.environment})
    planned = mpi.plan(given, run, cwd, horovod.mpi, places, (*resources.THREAD_VARIABLES, *THREAD_VARIABLES))
    return replace(planned, launcher="horovod")


def horovod_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """What ends a stalled job; what the user set stays, and setting one of the two leaves both to the user."""
    return {} if any(name in environ for name in STALL_VARIABLES) else dict(STALL_VARIABLES)
