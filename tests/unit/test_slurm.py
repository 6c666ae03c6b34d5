"""Launcher `slurm` as far as it is pure: options, the environment of an allocation, plans, and a spec that is read back."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import orjson
import pytest

from dtrain.allocation import Allocation, tasks_on_node
from dtrain.env import RankEnv
from dtrain.errors import UsageError
from dtrain.hosts import Host
from dtrain.job_options import ClusterOptions, Hangs, Restarts, SlurmOptions
from dtrain.launch import slurm
from dtrain.launch.console import Console
from dtrain.launch.follow import submit_job
from dtrain.launch.mpi_families import FAMILIES, MpiInstallation
from dtrain.launch.slurm import Start
from dtrain.layout import RunLayout, Workspace
from dtrain.spec import JobSpec

ALLOCATION = Allocation(job_id="12", nodelist="node[1-2]", nodes=2, tasks=4, cpus=8, cpus_per_task=3)


@pytest.fixture
def script(tmp_path: Path) -> str:
    (tmp_path / "train.py").write_text("")
    return str(tmp_path / "train.py")


def installed(title: str, mpirun: str = "/opt/mpirun") -> MpiInstallation:
    return MpiInstallation(mpirun=mpirun, family=next(f for f in FAMILIES if f.title == title), version="5")


@pytest.mark.parametrize(
    ("options", "asked", "allocated", "ranks"),
    [
        (SlurmOptions(), None, None, 1),
        (SlurmOptions(), None, 6, 6),
        (SlurmOptions(), 3, 6, 3),
        (SlurmOptions(nodes=2), None, None, 2),
        (SlurmOptions(nodes=2), 5, None, 5),
        (SlurmOptions(nodes=2, tasks_per_node=4), None, None, 8),
        (SlurmOptions(nodes=2, tasks_per_node=4), 8, None, 8),
        (SlurmOptions(tasks_per_node=4), None, None, 4),
        (SlurmOptions(tasks_per_node=4), 8, None, 8),
    ],
)
def test_number_of_ranks(options: SlurmOptions, asked: int | None, allocated: int | None, ranks: int) -> None:
    assert options.ranks(asked, allocated) == ranks


@pytest.mark.parametrize(
    ("given", "asked", "words"),
    [
        ({"nodes": 0}, None, "--nodes 0"),
        ({"start": "pmx"}, None, r"did you mean pmix"),
        ({"nodes": 3}, 2, "without a rank"),
        ({"nodes": 2, "tasks_per_node": 2}, 3, "contradicts"),
        ({"tasks_per_node": 2}, 3, "no multiple"),
        ({"sbatch_args": ("time=3",)}, None, "no option of sbatch"),
        ({"sbatch_args": ("--nodes=3",)}, None, "use --nodes"),
        ({"sbatch_args": ("--array=0-3",)}, None, "cannot be given"),
        ({"sbatch_args": ("-N4",)}, None, "use --nodes"),
        ({"sbatch_args": ("-a0-3",)}, None, "cannot be given"),
        ({"sbatch_args": ("--arr=0-3",)}, None, "cannot be given"),
    ],
)
def test_options_that_cannot_be(given: dict[str, object], asked: int | None, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        SlurmOptions(**given).ranks(asked, None)  # type: ignore[arg-type]


def test_options_that_do_not_go_together(script: str) -> None:
    with pytest.raises(UsageError, match="go with --launcher slurm, not with mpi"):
        JobSpec(target=script, workers=2, slurm=SlurmOptions(nodes=2))
    with pytest.raises(UsageError, match="not with slurm"):
        JobSpec(target=script, workers=2, launcher="slurm", cluster=ClusterOptions(servers=1))
    with pytest.raises(UsageError, match="not with slurm"):
        JobSpec(target=script, workers=2, launcher="slurm", hosts=(Host("a", 2),))


@pytest.mark.parametrize("name", ["localhost", os.uname().nodename])
def test_the_host_that_salloc_was_called_on_is_none_of_the_jobs(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """By whatever name; a node of the job's is also localhost."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\necho "$NODES"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    spec = JobSpec(target=script, workers=2, hosts=(Host("node1.cluster"), Host(name)))
    monkeypatch.setenv("NODES", "node1 node2")
    with pytest.raises(UsageError, match=f"^host {name}: not in Slurm job 12, which has node1, node2, .* name those"):
        slurm.check_hosts(spec, ALLOCATION)
    monkeypatch.setenv("NODES", f"node1 {os.uname().nodename.partition('.')[0]}")
    slurm.check_hosts(spec, ALLOCATION)


@pytest.mark.parametrize(("node", "tasks"), [(0, 2), (2, 2), (3, 1), (4, 16), (5, None)])
def test_tasks_on_node(node: int, tasks: int | None) -> None:
    assert tasks_on_node("2(x3),1,16", node) == tasks


def test_allocation() -> None:
    assert Allocation.read({}) is None
    environ = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "a[1-2]", "SLURM_CPUS_ON_NODE": "4"}
    assert Allocation.read(environ) == Allocation(job_id="7", nodelist="a[1-2]", nodes=2, tasks=2, cpus=4)
    environ |= {"SLURM_JOB_CPUS_PER_NODE": "8(x2)"}
    assert Allocation.read(environ) == Allocation(job_id="7", nodelist="a[1-2]", nodes=2, tasks=2, cpus=8, cpus_by_node=(8, 8))
    assert Allocation.read({**environ, "SLURM_OVERCOMMIT": "1"}).cpus_by_node == ()  # type: ignore[union-attr]
    environ |= {"SLURM_NTASKS": "6", "SLURM_CPUS_PER_TASK": "2", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"}
    found = Allocation.read(environ)
    assert found is not None
    assert (found.tasks, found.cpus_per_task) == (6, 2)
    with pytest.raises(UsageError, match="srun started this 2 times"):
        Allocation.read({**environ, "SLURM_STEP_NUM_TASKS": "2"})


def test_a_task_knows_how_many_are_on_its_own_node() -> None:
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_TASKS_PER_NODE": "2,1"}
    found = RankEnv.read({**step, "SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_NODEID": "1"})
    assert (found.vocabulary, found.rank, found.size, found.local_rank, found.local_size) == ("slurm", 2, 3, 0, 1)


def test_submission(script: str, tmp_path: Path) -> None:
    options = SlurmOptions(nodes=2, tasks_per_node=2, sbatch_args=("--time=10", "--qos=a b"))
    spec = JobSpec(target=script, workers=4, max_ranks=1, launcher="slurm", slurm=options)
    plan = slurm.submission(spec, RunLayout(tmp_path / "100%"), tmp_path)
    (process,) = plan.processes
    assert process.argv[:2] == ("sbatch", "--parsable")
    assert {"--nodes=2", "--ntasks=4", "--ntasks-per-node=2", "--time=10", "--qos=a b"} <= set(process.argv)
    assert f"--output={tmp_path}/100%%/slurm.log" in process.argv
    assert process.argv[-2:] == ("--wrap", f"exec {sys.executable} -m dtrain.launch.batch {tmp_path / '100%'}")


@pytest.mark.parametrize(("by", "title"), [("pmix", "Open MPI"), ("pmi2", "MPICH")])
def test_srun(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str, title: str) -> None:
    for name in ("OMP_NUM_THREADS", "OPAL_PREFIX", "PMIX_PREFIX"):
        monkeypatch.delenv(name, raising=False)
    spec = JobSpec(target=script, workers=4, launcher="slurm", args=("a b",))
    start = Start(by=by, mpi=installed(title))  # type: ignore[arg-type]
    plan = slurm.plan(spec, RunLayout(tmp_path / "run"), tmp_path, allocation=ALLOCATION, start=start)
    (process,) = plan.processes
    assert plan.ordered
    assert process.argv[0] == "srun"
    assert {f"--mpi={by}", "--nodes=2", "--ntasks=4", "--ntasks-per-node=2", "--cpus-per-task=3"} <= set(process.argv)
    assert ("PMIX_SECURITY_MODE" in process.argv) == (by == "pmix")
    assert process.argv[-3:] == ("dtrain._rank_main", "train.py", "a b")
    assert process.environment["OMP_NUM_THREADS"] == "3"
    assert process.environment["DTRAIN_VOCABULARY"] == "slurm"
    assert "OPAL_PREFIX" not in process.environment  # of a site's MPI
    own = Start(by=by, mpi=installed(title, str(Path(sys.executable).with_name("mpirun"))))  # type: ignore[arg-type]
    (process,) = slurm.plan(spec, RunLayout(tmp_path / "run"), tmp_path, allocation=ALLOCATION, start=own).processes
    assert ("OPAL_PREFIX" in process.environment) == (by == "pmix")


BY_SRUN, BY_MPIRUN = (Start(by=by, mpi=installed("Open MPI")) for by in ("pmix", "mpirun"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ranks", "options", "cpus_per_task", "start", "words"),
    [
        (12, SlurmOptions(), None, BY_SRUN, None),
        (
            13,
            SlurmOptions(),
            None,
            BY_SRUN,
            r"-n 13 exceeds the room in Slurm job 12: of 12 CPUs on 2 nodes, srun starts 12 ranks",
        ),
        (13, SlurmOptions(), None, BY_MPIRUN, None),
        (3, SlurmOptions(), 3, BY_SRUN, None),
        (4, SlurmOptions(), 3, BY_SRUN, r"12 CPUs on 2 nodes, 3 for each task \(--cpus-per-task\), srun starts 3 ranks at most"),
        (9, SlurmOptions(nodes=1), None, BY_SRUN, "srun starts 8 ranks"),
        (10, SlurmOptions(nodes=2, tasks_per_node=5), None, BY_SRUN, "srun starts 9 ranks"),
        (3, SlurmOptions(nodes=3), None, BY_MPIRUN, "--nodes 3 exceeds the 2 of Slurm job 12"),
    ],
)
def test_more_ranks_than_the_allocation_has_room_for_are_refused(
    script: str, ranks: int, options: SlurmOptions, cpus_per_task: int | None, start: Start, words: str | None
) -> None:
    """Two nodes, of which the job has 8 and 4 CPUs."""
    spec = JobSpec(target=script, workers=ranks, launcher="slurm", slurm=options)
    allocation = Allocation(
        job_id="12", nodelist="a[1-2]", nodes=2, tasks=2, cpus=8, cpus_per_task=cpus_per_task, cpus_by_node=(8, 4)
    )
    with pytest.raises(UsageError, match=words) if words is not None else contextlib.nullcontext():
        slurm.check_room(spec, allocation, start)


def test_bound_ranks_are_left_alone_by_srun(script: str, tmp_path: Path) -> None:
    """They bind themselves; and are told their threads then."""
    for bind in ("core", "none"):
        spec = JobSpec(target=script, workers=4, launcher="slurm", bind=bind)  # type: ignore[arg-type]
        (process,) = slurm.plan(spec, RunLayout(tmp_path), tmp_path, allocation=ALLOCATION, start=BY_SRUN).processes
        bound = (
            "--cpu-bind=none" in process.argv,
            process.environment.get("DTRAIN_BIND"),
            process.environment.get("OMP_NUM_THREADS"),
        )
        assert bound == ((True, "core", None) if bind == "core" else (False, None, "3"))


def test_the_dry_run_says_what_is_known_of_bound_ranks(script: str, tmp_path: Path) -> None:
    allocation = dataclasses.replace(ALLOCATION, cpus_by_node=(8, 8))
    bound = JobSpec(target=script, workers=4, launcher="slurm", bind="core")

    def share(**given: Any) -> str:
        spec = dataclasses.replace(bound, **given)
        return slurm.plan(spec, RunLayout(tmp_path), tmp_path, allocation=allocation, start=BY_SRUN).share

    given = "what Slurm gave job 12 on its node (8 CPUs on each of 2 nodes); which these are Slurm decides when the job runs"
    assert share() == f"--bind core: each rank is bound to one of 2 equal shares of the cores of {given}"
    assert share(workers=3) == f"--bind core: each rank is bound to an equal share of the cores of {given}"
    assert share(bind="numa") == f"--bind numa: each rank is bound to the cores of a NUMA node of {given}"
    assert share(bind="none") == ""


def test_uneven_ranks_are_left_to_srun(script: str, tmp_path: Path) -> None:
    spec = JobSpec(target=script, workers=3, launcher="slurm")
    start = Start(by="none", mpi=None)
    (process,) = slurm.plan(spec, RunLayout(tmp_path), tmp_path, allocation=ALLOCATION, start=start).processes
    assert not any("per-node" in word for word in process.argv)
    spec = JobSpec(target=script, workers=1, launcher="slurm")
    (process,) = slurm.plan(spec, RunLayout(tmp_path), tmp_path, allocation=ALLOCATION, start=start).processes
    assert "--nodes=1" in process.argv


def test_mpirun(script: str, tmp_path: Path) -> None:
    spec = JobSpec(target=script, workers=4, launcher="slurm", environment={"OMP_NUM_THREADS": "5"})
    start = Start(by="mpirun", mpi=installed("Open MPI"))
    plan = slurm.plan(spec, RunLayout(tmp_path / "run"), tmp_path, allocation=ALLOCATION, start=start)
    (process,) = plan.processes
    assert plan.launcher == "slurm"
    assert process.argv[0] == "/opt/mpirun"
    assert process.environment["DTRAIN_VOCABULARY"] == "openmpi"
    assert process.environment["OMP_NUM_THREADS"] == "5"
    # Nobody would remove it from the other nodes.
    assert (plan.scratch, "PRTE_MCA_prte_tmpdir_base" in process.environment) == (None, False)


def test_a_secret_is_read_back_from_the_environment(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = JobSpec(target=script, launcher="slurm", environment={"KEY": "hidden-value"}, secrets=("KEY",))
    written = orjson.dumps(spec.to_json(), default=str)
    assert b"hidden-value" not in written
    monkeypatch.setenv("KEY", "hidden-value")
    assert JobSpec.from_json(json.loads(written), tmp_path).secret_values() == {"KEY": "hidden-value"}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"args": ("--key=hidden-value",)}, "the script's arguments hold its value"),
        ({"environment": {"URL": "https://me:hidden-value@host/"}}, "--env URL holds the value of a secret"),
    ],
)
def test_what_a_masked_spec_would_change_is_not_submitted(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], words: str
) -> None:
    monkeypatch.setenv("KEY", "hidden-value")
    spec = JobSpec(target=script, launcher="slurm", secrets=("KEY",), **given)
    with pytest.raises(UsageError, match=words):
        submit_job(spec, Workspace(tmp_path / "workspace"), Console())
    assert not list(tmp_path.glob("workspace/runs/*"))


@pytest.mark.parametrize("is_module", [False, True])
def test_a_spec_is_read_back_for_the_copy(script: str, tmp_path: Path, is_module: bool) -> None:
    spec = JobSpec(
        target="pack.train" if is_module else script,
        is_module=is_module,
        source=tmp_path,
        args=("a", "b c"),
        workers=4,
        launcher="slurm",
        slurm=SlurmOptions(nodes=2, sbatch_args=("--time=1",), start="pmi2"),
        environment={"A": "b"},
        timeout_s=3.5,
        resume_from=tmp_path / "earlier",
        python=Path(sys.executable),
        restarts=Restarts(max_restarts=2, restart_on=(1, 2)),
        hangs=Hangs(hang_timeout_s=None),
    )
    code = tmp_path / "code"
    code.mkdir()
    (code / "train.py").write_text("")
    again = JobSpec.from_json(json.loads(orjson.dumps(spec.to_json(), default=str)), code)
    assert again.script_in_source == spec.script_in_source
    assert again.source_folder == code
    written, rewritten = spec.to_json(), again.to_json()
    for changed in ("source", "target"):
        del written[changed], rewritten[changed]
    assert rewritten == written
