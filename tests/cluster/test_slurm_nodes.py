"""Launcher `slurm` where the nodes are not what the job needs: one does not see the workspace, or they are too few."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

from dtrain.status import read_status

from .conftest import SlurmProject
from .test_slurm import ONE_EACH, TELLS

pytestmark = pytest.mark.needs("slurm", "mpi")

SHARE = "on a file system that all nodes share (--workspace, DTRAIN_WORKSPACE)"


@pytest.fixture
def apart(slurm: SlurmProject) -> Iterator[SlurmProject]:
    """node2 sees neither the workspace nor another folder: it has its own at the same paths."""
    hidden = [slurm.folder / name for name in ("workspace", "only-here")]
    for folder in hidden:
        folder.mkdir()
        slurm.hosts("exec", "node2", "mount", "-t", "tmpfs", "tmpfs", str(folder))
    yield slurm
    for folder in hidden:
        slurm.hosts("exec", "node2", "umount", str(folder))


def test_a_node_that_does_not_see_the_workspace_is_named(apart: SlurmProject) -> None:
    words = f"node node2 does not see the workspace {apart.folder}/workspace; choose one {SHARE}"
    done = apart.dtrain(*ONE_EACH, apart.script(TELLS))
    assert done.returncode == 2, done.stderr
    assert done.stderr.count(words) == 1
    assert read_status(apart.latest).cause == words
    apart.within = ("salloc", "--quiet", "--nodes=2", "--ntasks-per-node=1")
    done = apart.dtrain("run", apart.script(TELLS))
    assert (done.returncode, done.stderr) == (2, f"dtrain: {words}\n")
    assert len(list((apart.folder / "workspace").glob("**/spec.json"))) == 1


def test_a_node_without_the_ranks_python_is_named(apart: SlurmProject) -> None:
    python = apart.folder / "only-here" / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    apart.within = ("salloc", "--quiet", "--nodes=2", "--ntasks-per-node=1")
    done = apart.dtrain("run", "--workspace", "shared", "--python", str(python), apart.script(TELLS))
    assert done.returncode == 127, done.stderr
    assert f"there is no {python} on node2; ranks need their Python at the same path on all nodes" in done.stderr
    done = apart.dtrain("run", "--skip-preflight", "--workspace", "shared", "--python", str(python), apart.script(TELLS))
    assert done.returncode != 0, done.stderr
    assert "first to fail was rank 1 on node2: ended before it began: Exited with exit code" in done.stderr


def test_a_first_node_that_does_not_see_the_workspace_is_named(apart: SlurmProject) -> None:
    done = apart.dtrain("run", "--launcher", "slurm", "--sbatch-arg=--nodelist=node2", apart.script(TELLS))
    assert done.returncode == 1, done.stderr
    assert f"Slurm could not start job {apart.job} on node2: that node does not see {apart.latest.root}, or cannot" in done.stderr


@pytest.mark.parametrize("start", ["pmix", "mpirun"])
def test_a_rank_that_ends_before_it_can_record_anything_ends_the_job(apart: SlurmProject, start: str) -> None:
    """The nodes are not asked before."""
    apart.within = ("salloc", "--quiet", "--nodes=2", "--ntasks-per-node=1")
    done = apart.dtrain("run", "--skip-preflight", "--slurm-start", start, apart.script(TELLS))
    assert done.returncode == 1, done.stderr
    named = f"first to fail was rank 1 on node2: its host does not see the run folder {apart.latest.root}; use a workspace that"
    assert named in done.stderr
    assert not apart.hosts("exec", "node2", "find", str(apart.folder / "workspace"), "-mindepth", "1")


def test_more_ranks_than_an_allocation_has_room_for_are_refused_before_the_start(slurm: SlurmProject) -> None:
    slurm.within = ("salloc", "--quiet", "--nodes=2", "--ntasks-per-node=2")
    done = slurm.dtrain("run", "-n", "5", slurm.script(TELLS))
    assert done.returncode == 2, done.stderr
    assert "of 4 CPUs on 2 nodes, srun starts 4 ranks at most; lower -n" in done.stderr
    assert not list((slurm.folder / "workspace").glob("runs/*"))
    done = slurm.dtrain("run", "-n", "5", "--slurm-start", "mpirun", slurm.script(TELLS))  # as the message says
    assert done.returncode == 0, done.stderr


BOUND = """
import os
import dtrain
run = dtrain.init()
print(sorted(os.sched_getaffinity(0)), os.environ["OMP_NUM_THREADS"], flush=True)
"""


@pytest.mark.parametrize("start", ["pmix", "mpirun"])
def test_ranks_share_out_what_slurm_gave_the_job_on_a_node(
    slurm: SlurmProject, start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The nodes have four processors by their configuration, and as many as this machine in truth."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    processors = sorted(os.sched_getaffinity(0))
    if not 2 <= len(processors) <= 4:
        pytest.skip("on this machine Slurm would give the job fewer processors than the nodes have, or two ranks have one")
    options = ("--launcher", "slurm", "--nodes", "2", "--tasks-per-node", "2", "--slurm-start", start, "--bind", "core")
    done = slurm.dtrain("run", *options, "--sbatch-arg=--exclusive", slurm.script(BOUND))
    assert done.returncode == 0, done.stderr
    half = len(processors) // 2
    first, second = processors[:half], processors[half : 2 * half]
    expected = {(n, n // 2 + 1): (first, second)[n % 2] for n in range(4)}
    assert set(done.stdout.splitlines()) == {f"[node{k}:{n}] {cpus} {half}" for (n, k), cpus in expected.items()}


def test_processors_that_slurm_does_not_keep_ranks_to_are_not_shared_out(slurm: SlurmProject) -> None:
    """Another job, bound in the same way, would be on the same ones."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("this machine has one processor")
    done = slurm.dtrain(*ONE_EACH, "--bind", "core", slurm.script(BOUND))
    assert done.returncode == 2, done.stderr
    assert "--bind: Slurm gave the job 1 of the" in done.stderr
    assert "ask for whole nodes (--sbatch-arg=--exclusive), or leave out --bind" in done.stderr


def test_a_line_of_the_dry_run_can_be_pasted(slurm: SlurmProject) -> None:
    """Nobody supervises such ranks, and their run has no attempts."""
    slurm.within = ("salloc", "--quiet", "--nodes=2", "--ntasks-per-node=1")
    shown = slurm.dtrain("run", "--dry-run", slurm.script("import time\ntime.sleep(2.5)\nprint('lived', flush=True)\n"))
    assert shown.returncode == 0, shown.stderr
    done = slurm.run([*slurm.on_node1, *slurm.within, "sh", "-c", shown.stdout])
    assert (done.returncode, done.stdout) == (0, "lived\nlived\n"), done.stderr
