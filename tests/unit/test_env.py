"""Which rank a process is, by every vocabulary of variables."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from dtrain import env, resources
from dtrain.env import RankEnv
from dtrain.errors import RankError
from dtrain.launch import ssh
from dtrain.layout import RunLayout
from dtrain.roles import Dialect, Task, cluster_tasks
from dtrain.tf_config import cluster_variables

OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
PMI = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
TORCH = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
HOROVOD = {"HOROVOD_RANK": "3", "HOROVOD_SIZE": "4", "HOROVOD_LOCAL_RANK": "1", "HOROVOD_LOCAL_SIZE": "2"}
SLURM = {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}


def test_a_worker_of_an_elastic_job_goes_by_its_number() -> None:
    found = RankEnv.read({**HOROVOD, "HOROVOD_ELASTIC": "1", "DTRAIN_VOCABULARY": "horovod", **env.worker_variables(7)})
    assert (found.rank, found.number, found.name, found.elastic, found.world_size) == (3, 7, "worker 7", True, 1)
    by_hand = RankEnv.read({**HOROVOD, "HOROVOD_ELASTIC": "1"})
    assert (by_hand.number, by_hand.elastic, by_hand.task) == (3, True, None)
    assert not RankEnv.read(HOROVOD).elastic


@pytest.mark.parametrize(
    ("vocabulary", "variables"),
    [("openmpi", OPENMPI), ("pmi", PMI), ("torch", TORCH), ("horovod", HOROVOD), ("slurm", SLURM)],
    ids=["openmpi", "pmi", "torch", "horovod", "slurm"],
)
def test_each_vocabulary(vocabulary: str, variables: dict[str, str]) -> None:
    found = RankEnv.read(variables)
    assert found == RankEnv(rank=3, size=4, local_rank=1, local_size=2, vocabulary=vocabulary)


def test_alone() -> None:
    assert RankEnv.read({}) == RankEnv(rank=0, size=1, local_rank=0, local_size=1, vocabulary="alone")


def test_what_a_launcher_gives_is_what_a_rank_reads(tmp_path: Path) -> None:
    run = RunLayout(tmp_path / "run")
    given = env.launch_variables(run, size=4, vocabulary="openmpi", resume_from=tmp_path / "old")
    found = RankEnv.read({**OPENMPI, **given, **env.supervised_variables(2)})
    assert (found.run_dir, found.resume_from, found.rank, found.supervised) == (run.root, tmp_path / "old", 3, True)
    assert found.layout == RunLayout(run.root, 2)
    alone = env.launch_variables(run, size=1, vocabulary="dtrain", resume_from=None) | env.rank_variables(0, 0, 1)
    assert RankEnv.read({**PMI, **alone}).size == 1  # the launcher's word holds, whatever else is set
    assert env.RUN_DIR not in env.inherited({**given, "HOME": "/"})
    assert env.inherited({**given, "HOME": "/"}) == {"HOME": "/"}


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({**OPENMPI, "PMI_RANK": "0", "PMI_SIZE": "4"}, "OMPI_COMM_WORLD_RANK=3 of OMPI_COMM_WORLD_SIZE=4.*PMI_RANK=0"),
        ({"OMPI_COMM_WORLD_RANK": "1"}, "OMPI_COMM_WORLD_SIZE is not"),
        ({**OPENMPI, "OMPI_COMM_WORLD_RANK": "4"}, "OMPI_COMM_WORLD_RANK=4 is not in 0 to 3"),
        ({**OPENMPI, "OMPI_COMM_WORLD_SIZE": "many"}, "OMPI_COMM_WORLD_SIZE='many' is not a number"),
        ({"DTRAIN_VOCABULARY": "openmpi", "DTRAIN_RUN_DIR": "/r"}, "OMPI_COMM_WORLD_RANK is not set"),
        ({**OPENMPI, "DTRAIN_VOCABULARY": "openmpi", "DTRAIN_SIZE": "8"}, "8 ranks were asked for, but OMPI_COMM_WORLD_SIZE=4"),
    ],
)
def test_contradictions_are_told(variables: dict[str, str], words: str) -> None:
    with pytest.raises(RankError, match=words):
        RankEnv.read(variables)


def test_families_that_agree_are_no_contradiction() -> None:
    assert RankEnv.read({**TORCH, **OPENMPI, **HOROVOD}).rank == 3


def test_slurm_counts_daemons_under_mpirun_and_is_no_rank_in_a_batch_script() -> None:
    assert RankEnv.read({**OPENMPI, **SLURM, "SLURM_PROCID": "0"}).rank == 3
    assert RankEnv.read({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}).vocabulary == "alone"


def test_a_lone_rank_variable_of_torch_means_nothing() -> None:
    assert RankEnv.read({"RANK": "1"}).size == 1


def test_threads_are_shared_unless_set() -> None:
    shared = resources.thread_variables(8, 3, {"MKL_NUM_THREADS": "5"})
    assert shared["OMP_NUM_THREADS"] == shared["OPENBLAS_NUM_THREADS"] == "2"
    assert "MKL_NUM_THREADS" not in shared
    assert resources.thread_variables(2, 4, {})["OMP_NUM_THREADS"] == "1"


def test_ranks_are_told_how_to_keep_memory_unless_the_user_says_so() -> None:
    shared = resources.share_variables("none", [1], {})
    assert "glibc.malloc.hugetlb=1" in shared["GLIBC_TUNABLES"].split(":")
    assert "GLIBC_TUNABLES" not in resources.share_variables("none", [1], {"GLIBC_TUNABLES": ""})


def test_malloc_knows_what_ranks_are_told() -> None:
    """A name that glibc does not know it passes over without a word."""
    loader = shutil.which("ld.so")
    if loader is None:
        pytest.skip("no glibc from 2.35: its loader lists tunables")
    listed = subprocess.run([loader, "--list-tunables"], capture_output=True, text=True, check=True)
    known = {line.split(":")[0] for line in listed.stdout.splitlines()}
    told = resources.memory_variables({})["GLIBC_TUNABLES"].split(":")
    assert {each.split("=")[0] for each in told} <= known


def test_what_stands_on_a_command_line_is_no_key() -> None:
    told = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "LC_ALL", "MALLOC_ARENA_MAX", "GLIBC_TUNABLES")
    keys = ("PYTHONTOKEN", "PYTHON_API_KEY", "LD_API_KEY", "MALLOC_KEY", "LC_KEY_1")
    assert set(ssh.starting_variables(dict.fromkeys((*told, *keys), "x"))) == set(told)


def test_workspace_is_the_option_else_the_variable_else_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert env.workspace("a", {"DTRAIN_WORKSPACE": "/b"}).root == tmp_path / "a"
    assert env.workspace(None, {"DTRAIN_WORKSPACE": "/b"}).root == Path("/b")
    assert env.workspace(None, {}).root == tmp_path / "workspace"


def tf_config(cluster: Any, task: Any = None) -> dict[str, str]:
    return {"TF_CONFIG": json.dumps({"cluster": cluster, "task": task})}


CLUSTER = {"worker": ["a:1", "b:2", "a:3"], "ps": ["a:4"], "chief": ["a:5"]}


@pytest.mark.parametrize(
    ("dialect", "leader"), [("chief", Task("chief", 0)), ("workers", Task("worker", 0)), ("master", Task("master", 0))]
)
def test_the_cluster_that_is_written_is_the_one_that_is_read(dialect: Dialect, leader: Task, tmp_path: Path) -> None:
    evaluator = dialect == "chief"
    tasks = cluster_tasks(dialect, workers=2, servers=1, evaluator=evaluator)
    addresses = {task: f"127.0.0.1:{3000 + n}" for n, task in enumerate(tasks)}
    assert tasks[0] == leader
    launched = env.launch_variables(RunLayout(tmp_path), size=len(tasks), vocabulary="tf_config", resume_from=None)
    for rank, task in enumerate(tasks):
        written = cluster_variables(addresses, task, dialect)
        config = json.loads(written["TF_CONFIG"])
        assert "evaluator" not in config["cluster"]
        assert config.get("environment") == ("cloud" if dialect == "workers" else None)
        by_hand = RankEnv.read(written)
        assert (by_hand.task, by_hand.rank, by_hand.world_size) == (task, rank, 1)
        assert by_hand.size == len(tasks) - (evaluator and task.role != "evaluator")
        found = RankEnv.read({**launched, **env.rank_variables(rank, rank, len(tasks)), **written})
        assert (found.task, found.rank, found.size, found.local_rank, found.local_size) == (
            task,
            rank,
            *(len(tasks), rank),
            len(tasks),
        )
        assert env.inherited({**launched, **written}) == {}
    assert env.inherited(written) == written  # somebody else's is the script's


def test_a_task_among_those_of_its_host() -> None:
    found = RankEnv.read(tf_config(CLUSTER, {"type": "worker", "index": "2"}))
    assert (found.task, found.rank, found.size, found.name) == (Task("worker", 2), 3, 5, "worker 2")
    assert (found.local_rank, found.local_size) == (2, 4)


@pytest.mark.parametrize("text", ["", " ", "{}", '{"cluster": {}}', '{"task": {"type": "worker", "index": 0}}'])
def test_no_cluster_is_alone(text: str) -> None:
    assert RankEnv.read({"TF_CONFIG": text}) == RankEnv()


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"TF_CONFIG": "{worker"}, "is not JSON"),
        ({"TF_CONFIG": "[1]"}, "is not a JSON object"),
        (tf_config(["a:1"]), "not an object of roles"),
        (tf_config({"wroker": ["a:1"]}), "has a role 'wroker'; allowed are roles chief, master, worker"),
        (tf_config({"worker": "a:1"}), "worker='a:1', which is no list"),
        (tf_config({"worker": ["a"]}), "no list of 'host:port'"),
        (tf_config({"worker": ["a:1"], "evaluator": ["a:2"]}), "lists an evaluator"),
        (tf_config({"chief": ["a:1"], "master": ["a:2"]}), "has 2 chiefs or masters"),
        (tf_config(CLUSTER), "does not say in task.type"),
        (tf_config(CLUSTER, {"type": "boss", "index": 0}), "task.type='boss'"),
        (tf_config(CLUSTER, {"type": "ps", "index": -1}), "task.index=-1"),
        (tf_config(CLUSTER, {"type": "ps", "index": 1}), "this is ps 1, which is not in its cluster of chief 0, worker 0"),
        ({**OPENMPI, **tf_config(CLUSTER, {"type": "ps", "index": 0})}, "RANK=3 of .*TF_CONFIG=4 of TF_CONFIG's cluster=5"),
        ({"DTRAIN_VOCABULARY": "tf_config", "DTRAIN_SIZE": "2"}, "TF_CONFIG is not set"),
        (
            {
                "DTRAIN_VOCABULARY": "tf_config",
                "DTRAIN_RANK": "1",
                "DTRAIN_SIZE": "5",
                **tf_config(CLUSTER, {"type": "ps", "index": 0}),
            },
            "as rank 1 of 5, but TF_CONFIG makes it rank 4 of 5",
        ),
        (
            {
                "DTRAIN_VOCABULARY": "tf_config",
                "DTRAIN_RANK": "1",
                "DTRAIN_SIZE": "3",
                **tf_config(CLUSTER, {"type": "worker", "index": 0}),
            },
            "as rank 1 of 3, but TF_CONFIG makes it rank 1 of 5",
        ),
    ],
)
def test_tf_config_that_cannot_be_is_shown(variables: dict[str, str], words: str) -> None:
    with pytest.raises(RankError, match=words):
        RankEnv.read(variables)


def test_tf_config_is_not_for_ranks_that_dtrain_launched_through_mpi() -> None:
    found = RankEnv.read({**OPENMPI, "DTRAIN_VOCABULARY": "openmpi", "TF_CONFIG": "{broken"})
    assert (found.rank, found.task) == (3, None)
