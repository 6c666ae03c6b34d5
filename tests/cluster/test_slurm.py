"""Launcher `slurm` on a Slurm of three nodes: submitted, and within an allocation."""

from __future__ import annotations

import os
import sys

import pytest

from dtrain.status import read_status

from .conftest import SlurmProject

pytestmark = pytest.mark.needs("slurm", "mpi")

SUBMIT = ("run", "--launcher", "slurm", "--nodes", "2", "--tasks-per-node", "2")
TELLS = """
import os, sys
import dtrain
run = dtrain.init()
assert run.comm.allgather_obj(run.rank) == list(range(run.size))
print(f"{run.rank} of {run.size}, {run.local_rank} of {run.local_size} here, {sys.argv[1:]} {os.environ.get('MARK')}", flush=True)
"""
LINES = {f"[node{n}:{rank}] {rank} of 4, {rank % 2} of 2 here" for rank, n in enumerate((1, 1, 2, 2))}


def told(output: str) -> set[str]:
    return {line.partition(", [")[0] for line in output.splitlines()}


@pytest.mark.parametrize("start", ["auto", "mpirun"])
def test_a_submitted_job_is_followed_to_its_end(slurm: SlurmProject, start: str) -> None:
    done = slurm.dtrain(*SUBMIT, "--slurm-start", start, "--env", "MARK=set", slurm.script(TELLS), "a b", "it's")
    assert done.returncode == 0, done.stderr
    assert told(done.stdout) == LINES
    assert "['a b', \"it's\"] set" in done.stdout
    assert f"ranks are started by {'srun with PMIx' if start == 'auto' else 'mpirun of Open MPI'}" in done.stderr
    assert f"dtrain: submitted as Slurm job {slurm.job}" in done.stderr
    assert f"dtrain: run {slurm.latest.id} completed in" in done.stderr
    assert read_status(slurm.latest).state == "completed"
    assert slurm.slurm("squeue", "-h", "-t", "all", "-j", slurm.job, "-o", "%D %C") == "2 4\n"


def test_the_first_failure_and_its_exit_code_come_back(slurm: SlurmProject) -> None:
    script = slurm.script(TELLS + "if run.rank == 3:\n    sys.exit(7)\nrun.comm.barrier()\n")
    done = slurm.dtrain(*SUBMIT, script)
    assert done.returncode == 7, done.stderr
    assert "first to fail was rank 3 on node2: called sys.exit(7)" in done.stderr
    assert done.stderr.count("first to fail") == 1


@pytest.mark.parametrize(("start", "title"), [("mpirun", "mpirun"), ("pmix", "srun")])
def test_an_allocation_is_used_from_within(slurm: SlurmProject, start: str, title: str) -> None:
    slurm.within = ("salloc", "--quiet", "--nodes=2", "--ntasks-per-node=2")
    done = slurm.dtrain("run", "--slurm-start", start, slurm.script(TELLS))
    assert done.returncode == 0, done.stderr
    assert told(done.stdout) == LINES
    assert "4 ranks · launcher slurm" in done.stderr
    assert not slurm.latest.slurm_job.exists()


@pytest.mark.needs("mpich")
def test_an_allocation_is_used_by_mpich_over_pmi2(slurm: SlurmProject) -> None:
    slurm.within = ("salloc", "--quiet", "--nodes=2", "--ntasks-per-node=2")
    python = os.environ["DTRAIN_TEST_MPICH_PYTHON"]
    argv = [python if word == sys.executable else word for word in slurm.argv("run", slurm.script(TELLS))]
    done = slurm.run(argv)
    assert done.returncode == 0, done.stderr
    assert told(done.stdout) == LINES


def test_programs_that_are_each_a_world_of_one_are_found_out(slurm: SlurmProject) -> None:
    slurm.within = ("salloc", "--quiet", "--nodes=2", "--ntasks-per-node=1")
    done = slurm.dtrain("run", "--slurm-start", "pmi2", slurm.script("import mpi4py.MPI\nprint('trains alone')\n"))
    assert done.returncode == 1
    assert done.stdout == "" or "trains alone" not in done.stdout
    assert "srun started 2 ranks, but Open MPI" in done.stderr
    assert "sees a world of 1" in done.stderr
    assert "--slurm-start" in done.stderr
