"""Starts TensorFlow scripts as ranks, and reads the weights that they leave."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def _lanes() -> dict[str, dict[str, str]]:
    """Which Keras ``tf.keras`` can be here, and the variables that choose it."""
    try:
        is_keras2 = version("keras").startswith("2.")
    except PackageNotFoundError:
        is_keras2 = False
    return {"keras2": {}} if is_keras2 else {"keras3": {}, "tf_keras": {"TF_USE_LEGACY_KERAS": "1"}}


KERAS = _lanes()


def environ(folder: Path, **more: str) -> dict[str, str]:
    ours = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DTRAIN_WORKSPACE": str(folder / "workspace")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("OMPI_", "PMIX_", "PRTE_", "DTRAIN_"))}
    return {**inherited, **ours, "PATH": path, **more}


def run_python(folder: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """``python ARGUMENTS`` in ``folder``; ``more`` are variables."""
    return run_command(folder, sys.executable, *arguments, **more)


def run_command(folder: Path, *command: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=folder, env=environ(folder, **more), capture_output=True, text=True, timeout=240, check=False
    )


def dtrain_run(folder: Path, ranks: int, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return run_python(
        folder, "-m", "dtrain.cli", "run", "-n", str(ranks), "--launcher", "horovod", "--source", str(HERE), *arguments, **more
    )


def weights(folder: Path, case: str, size: int, rank: int) -> dict[str, np.ndarray]:
    with np.load(folder / f"{case}-{size}-{rank}.npz") as file:
        return {name: file[name] for name in file.files}


def assert_close(one: dict[str, np.ndarray], other: dict[str, np.ndarray], tolerance: float, about: str) -> None:
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_allclose(one[name], other[name], rtol=0, atol=tolerance, err_msg=f"{about}: {name}")
