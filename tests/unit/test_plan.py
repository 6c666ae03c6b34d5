"""Plans are values: what each launcher would start."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dtrain.launch import local, mpi
from dtrain.launch.mpi import FAMILIES, MpiInstallation
from dtrain.layout import RunLayout
from dtrain.spec import JobSpec, available_cores


@pytest.fixture
def script(tmp_path: Path) -> str:
    (tmp_path / "train.py").write_text("")
    return str(tmp_path / "train.py")


def installation(title: str) -> MpiInstallation:
    family = next(family for family in FAMILIES if family.title == title)
    return MpiInstallation(mpirun="/opt/mpirun", family=family, version="5")


def test_openmpi(script: str, tmp_path: Path) -> None:
    spec = JobSpec(target=script, workers=available_cores() + 1, max_ranks=10_000, args=("--n", "a b"))
    plan = mpi.plan(spec, RunLayout(tmp_path / "run"), tmp_path, installation("Open MPI"))
    (process,) = plan.processes
    assert process.argv[0] == "/opt/mpirun"
    assert process.argv[-4:] == ("dtrain._rank_main", "train.py", "--n", "a b")
    assert ("--allow-run-as-root" in process.argv) == (os.geteuid() == 0)
    assert "mpi_yield_when_idle" in process.argv
    assert process.argv[process.argv.index("--bind-to") + 1] == "none"
    assert process.environment["OMP_NUM_THREADS"] == "1"


def test_ranks_that_have_a_core_each_do_not_yield(script: str, tmp_path: Path) -> None:
    spec = JobSpec(target=script, workers=1, launcher="mpi")
    plan = mpi.plan(spec, RunLayout(tmp_path / "run"), tmp_path, installation("Open MPI"))
    assert "mpi_yield_when_idle" not in plan.processes[0].argv


def test_mpich(script: str, tmp_path: Path) -> None:
    plan = mpi.plan(JobSpec(target=script, workers=2), RunLayout(tmp_path / "run"), tmp_path, installation("MPICH"))
    assert plan.processes[0].argv[:5] == ("/opt/mpirun", "-bind-to", "none", "-n", "2")
    assert plan.processes[0].environment["DTRAIN_VOCABULARY"] == "pmi"


def test_what_the_user_set_holds(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "7")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    spec = JobSpec(target=script, environment={"OMP_NUM_THREADS": "5"})
    (process,) = local.plan(spec, RunLayout(tmp_path / "run"), tmp_path).processes
    assert process.environment["OMP_NUM_THREADS"] == "5"
    assert "OPENBLAS_NUM_THREADS" not in process.environment


def test_module_and_source(tmp_path: Path, script: str) -> None:
    spec = JobSpec(target="package.train", is_module=True, source=tmp_path)
    (process,) = local.plan(spec, RunLayout(tmp_path / "run"), tmp_path).processes
    assert process.argv[-3:] == ("dtrain._rank_main", "-m", "package.train")
    assert spec.experiment_name == "train"
    assert JobSpec(target=script, source=tmp_path.parent).script_in_source == f"{tmp_path.name}/train.py"
