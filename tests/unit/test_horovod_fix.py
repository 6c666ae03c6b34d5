"""What dtrain does about Horovod before Horovod itself can run."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from dtrain.errors import MissingDependency
from dtrain.tensorflow import horovod_fix


def loader(missing: str) -> ModuleType:
    """TensorFlow's module that loads libraries, whose first attempt fails as for want of ``missing``; as it is mended."""
    module = ModuleType("load_library")
    calls: list[str] = []

    def load_op_library(library_filename: str) -> str:
        calls.append(library_filename)
        if len(calls) == 1:
            raise LookupError(f"{missing}: cannot open shared object file: No such file or directory")
        return "loaded"

    module.load_op_library = load_op_library  # type: ignore[attr-defined]
    horovod_fix._find_mpi(module)
    return module


def test_a_library_of_mpi_is_taken_from_this_environment_or_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    with pytest.raises(MissingDependency, match=r"Horovod needs libmpi\.so\.40 .* start the script with that MPI's mpirun"):
        loader("libmpi.so.40").load_op_library("/site/horovod/tensorflow/mpi_lib.so")
    with pytest.raises(LookupError, match="libcudart"):
        loader("libcudart.so.12").load_op_library("/site/horovod/tensorflow/mpi_lib.so")
    with pytest.raises(LookupError, match="libmpi"):
        loader("libmpi.so.40").load_op_library("/site/another/ops.so")
    (tmp_path / "lib").mkdir()
    maps = Path("/proc/self/maps").read_text()
    libc = next(line.split()[-1] for line in maps.splitlines() if "libc.so" in line or "/libc-" in line)
    (tmp_path / "lib" / "libmpi.so.40").symlink_to(libc)
    assert loader("libmpi.so.40").load_op_library("/site/horovod/tensorflow/mpi_lib.so") == "loaded"
