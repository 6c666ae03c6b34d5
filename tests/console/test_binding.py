"""`--bind`: real ranks on processors of their own."""

from __future__ import annotations

import os

import orjson
import pytest

from dtrain.binding import parse_cpus

from .conftest import Project

BOUND = """
import os
rank = os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("DTRAIN_RANK"))
print(rank, sorted(os.sched_getaffinity(0)), os.environ["OMP_NUM_THREADS"], os.environ.get("MKL_NUM_THREADS"))
"""


@pytest.mark.parametrize(
    ("size", "launch"),
    [
        (1, ("-n", "1")),
        pytest.param(2, ("-n", "2"), marks=pytest.mark.needs("mpi")),
        (2, ("--launcher", "multi_worker", "-n", "2", "--start-timeout", "5")),
    ],
)
def test_ranks_are_bound_as_the_dry_run_says(
    project: Project, size: int, launch: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under every launcher alike; what the user set stays."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    processors = os.sched_getaffinity(0)
    if len(processors) < size:
        pytest.skip("one processor for two ranks")
    options = ("run", *launch, "--bind", "core", "--env", "MKL_NUM_THREADS=3", project.script(BOUND))
    plan = orjson.loads(project.dtrain(*options[:-1], "--dry-run", "--json", options[-1]).stdout)
    planned = {str(each["local_rank"]): parse_cpus(each["processors"]) for each in plan["binding"]}
    assert len(planned) == size
    assert sum(map(len, planned.values())) == len(set().union(*planned.values())) <= len(processors)
    told = project.dtrain(*options[:-1], "--dry-run", options[-1]).stderr.splitlines()
    assert [line.split(" processors")[0] for line in told] == [f"dtrain: rank {rank} is bound to" for rank in planned]

    done = project.dtrain(*options)
    lines = sorted(line.split("] ", 1)[1] for line in done.stdout.splitlines())
    assert lines == [f"{rank} {sorted(cpus)} {len(cpus)} 3" for rank, cpus in planned.items()]


def test_what_slurm_decides_is_said_by_the_dry_run(project: Project) -> None:
    options = ("--launcher", "slurm", "--nodes", "2", "--tasks-per-node", "4", "--bind", "core", "--dry-run")
    done = project.dtrain("run", *options, project.script(""))
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith(
        "dtrain: --bind core: each rank is bound to one of 4 equal shares of the cores of what Slurm will"
    )


@pytest.mark.needs("mpi")
def test_what_cannot_be_bound(project: Project) -> None:
    many = str(len(os.sched_getaffinity(0)) + 1)
    script = project.script("")
    done = project.dtrain("run", "-n", many, "--max-ranks", many, "--bind", "core", script)
    assert (done.returncode, f"{many} ranks on this host exceed" in done.stderr) == (2, True)
    done = project.dtrain("run", "-H", f"localhost:{many}", "--max-ranks", many, "--bind", "core", script)
    assert (done.returncode, f"host localhost: --bind core: {many} ranks on this host exceed" in done.stderr) == (2, True)
    assert "did you mean core?" in project.dtrain("run", "--bind", "cores", script).stderr
    assert not list(project.folder.glob("workspace/runs/*"))
