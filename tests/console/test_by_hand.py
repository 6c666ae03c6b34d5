"""Scripts that nobody's `dtrain run` started: plain python, and mpirun of Open MPI and MPICH."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import Project

SCRIPT = """
import os, sys
import dtrain
run = dtrain.init(experiment="mine")
assert dtrain.init() is run
run.log("rank", run.rank, step=1)
run.log("rank", run.rank + 0.5)
run.tags["by"] = "hand"
assert run.comm.allgather_obj(run.rank) == list(range(run.size))
(run.outputs / f"{run.rank}.txt").write_text(str(run.size))
if sys.argv[1:] and run.rank == run.size - 1:
    exec(sys.argv[1])
run.comm.barrier()
"""

WAYS = [
    pytest.param("alone", 1),
    pytest.param("openmpi", 2, marks=pytest.mark.needs("mpi")),
    pytest.param("mpich", 2, marks=pytest.mark.needs("mpich")),
]


def start(project: Project, way: str, *args: str) -> subprocess.CompletedProcess[str]:
    project.script(SCRIPT)
    python, mpirun = sys.executable, []
    if way == "openmpi":
        mpirun = ["mpirun", "--allow-run-as-root", "--bind-to", "none", "--map-by", "slot:OVERSUBSCRIBE", "-n", "2"]
    elif way == "mpich":
        python = os.environ["DTRAIN_TEST_MPICH_PYTHON"]
        mpirun = [str(Path(python).parent / "mpirun"), "-n", "2"]
    argv = [*mpirun, python, "train.py", *args]
    return project.run(argv)


@pytest.mark.parametrize(("way", "size"), WAYS)
def test_makes_the_same_run_folder(project: Project, way: str, size: int) -> None:
    done = start(project, way)
    assert done.returncode == 0, done.stderr
    data = project.json("show", "latest")
    assert (data["state"], data["size"], data["tags"]) == ("completed", size, {"by": "hand"})
    assert data["id"].startswith("mine-")
    assert [rank["metrics"]["rank"] for rank in data["ranks"]] == [rank + 0.5 for rank in range(size)]
    run = project.latest
    assert (run.code / "train.py").read_text() == SCRIPT
    assert sorted(path.name for path in run.outputs.glob("*.txt")) == [f"{rank}.txt" for rank in range(size)]
    assert len(list(run.root.parent.iterdir())) == 1
    assert project.dtrain("register", "latest", "--name", "net").returncode == 0


@pytest.mark.parametrize(("way", "size"), WAYS)
@pytest.mark.parametrize(
    ("how", "code", "words"),
    [
        ("raise KeyError('lost')", 1, "KeyError: 'lost'"),
        ("sys.exit(3)", 3, "sys.exit with code 3"),
        ("raise SystemExit('no data')", 1, "raised SystemExit"),
    ],
)
def test_failure_is_recorded_and_nobody_waits(project: Project, way: str, size: int, how: str, code: int, words: str) -> None:
    done = start(project, way, how)
    assert done.returncode == code
    data = project.json("show", "latest")
    assert (data["state"], data["exit_code"], data["failure"]["rank"]) == ("failed", code, size - 1)
    assert words in data["cause"]


@pytest.mark.parametrize(("way", "size"), WAYS)
@pytest.mark.parametrize("how", ["try:\n    sys.exit(3)\nexcept SystemExit:\n    pass", "sys.exit()", "sys.exit(0)"])
def test_an_exit_that_is_none_is_no_failure(project: Project, way: str, size: int, how: str) -> None:
    done = start(project, way, f"run.comm.barrier() if 'SystemExit' not in {how!r} else None\n{how}")
    assert done.returncode == 0, done.stderr
    assert project.json("show", "latest")["state"] == "completed"


@pytest.mark.parametrize(("way", "size"), WAYS[:1])
def test_killed_rank(project: Project, way: str, size: int) -> None:
    start(project, way, "os.kill(os.getpid(), 9)")
    data = project.json("show", "latest")
    assert data["state"] == "failed"
    assert "rank 0 on" in data["cause"]
    assert "vanished" in data["cause"]


@pytest.mark.needs("mpi")
def test_workspace_that_cannot_be_written_is_said_by_all_ranks(project: Project) -> None:
    project.env["DTRAIN_WORKSPACE"] = "/proc/dtrain"
    done = start(project, "openmpi")
    assert done.returncode != 0
    assert "WorkspaceError: workspace /proc/dtrain cannot be written" in done.stderr


def test_a_run_to_resume_that_is_not_there(project: Project) -> None:
    project.env["DTRAIN_RESUME"] = "/nowhere"
    done = start(project, "alone")
    assert done.returncode == 1
    assert "there is no run to resume in /nowhere" in done.stderr


@pytest.mark.needs("mpi")
def test_a_rank_that_cannot_open_its_files_keeps_nobody_waiting(project: Project) -> None:
    project.script(
        "import os, pathlib\nimport dtrain.run\n"
        "real = dtrain.run.MetricWriter\n"
        "def blind(path):\n"
        "    return real(pathlib.Path('/nowhere/m.jsonl') if os.environ['OMPI_COMM_WORLD_RANK'] == '1' else path)\n"
        "dtrain.run.MetricWriter = blind\ndtrain.run.init()\n",
        "blind.py",
    )
    mpirun = ["mpirun", "--allow-run-as-root", "--bind-to", "none", "--map-by", "slot:OVERSUBSCRIBE", "-n", "2"]
    done = project.run([*mpirun, sys.executable, "blind.py"])
    assert done.returncode != 0
    assert done.stderr.count("WorkspaceError: metrics cannot be written to /nowhere") == 2


@pytest.mark.needs("mpi", "mpich")
def test_mpirun_of_another_mpi(project: Project) -> None:
    project.script(SCRIPT)
    mpirun = str(Path(os.environ["DTRAIN_TEST_MPICH_PYTHON"]).parent / "mpirun")
    done = project.run([mpirun, "-n", "2", sys.executable, "train.py"])
    assert done.returncode != 0
    assert "sees a world of 1" in done.stderr
    assert not (project.folder / "workspace").exists()


def test_a_metric_cannot_have_the_name_of_what_every_row_has(project: Project) -> None:
    script = project.script("import dtrain\nrun = dtrain.init()\nrun.log('self', 1)\nrun.log('step', 1)\n")
    done = project.dtrain("run", script)
    assert "UsageError: a metric cannot be called 'step'" in done.stderr, done.stderr
