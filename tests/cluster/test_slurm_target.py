"""A Slurm partition as a compute target of Azure ML's names: control scripts on node1, jobs on any."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from tests.azureml.conftest import BEGIN
from tests.azureml.test_packages import wheel

from .conftest import SlurmProject

pytestmark = pytest.mark.needs("slurm", "mpi")

TRAIN = """
import os, socket, time
from mpi4py import MPI
from azureml.core.run import Run
run = Run.get_context()
rank = MPI.COMM_WORLD.rank
run.log("rank", rank)
places = MPI.COMM_WORLD.allgather(socket.gethostname())
print("places", places, os.environ["AZ_BATCH_MASTER_NODE"], os.environ["AZUREML_NODE_COUNT"], flush=True)
if rank == 0:
    open("outputs/model.txt", "w").write("weights")
while os.environ.get("WAIT") and not os.path.exists("outputs/go"):
    time.sleep(0.05)
"""

# Of a control script: its run has begun, and waits to be let go on, by a file.
RUNNING = """
import time
waits = ScriptRunConfig("src", "train.py", compute_target="queue")
waits.run_config.environment_variables = {"WAIT": "1"}
run = experiment.submit(waits)
while run.get_status() != "Running":
    time.sleep(0.05)
"""


@pytest.fixture
def queue(slurm: SlurmProject) -> SlurmProject:
    """A project with a compute target ``queue``: two of the partition's three nodes."""
    for command in (
        ("azureml", "init", "--name", "mine"),
        ("compute", "add", "queue", "--slurm-partition", "debug", "--max-nodes", "2", "--sbatch-arg=--time=10"),
    ):
        done = slurm.dtrain(*command)
        assert done.returncode == 0, done.stderr
    (slurm.folder / "src").mkdir()
    (slurm.folder / "src" / "train.py").write_text(TRAIN)
    return slurm


def control(slurm: SlurmProject, text: str) -> subprocess.CompletedProcess[str]:
    slurm.script(BEGIN.replace('"cluster", AmlCompute', '"here", AmlCompute') + text, "submit.py")
    done = slurm.dtrain("azureml", "submit.py", timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def told(done: subprocess.CompletedProcess[str]) -> Any:
    return json.loads(done.stdout.splitlines()[-1])


def test_a_job_waits_in_the_queue_runs_and_leaves_a_model(queue: SlurmProject) -> None:
    assert queue.json("compute", "list")["queue"]["slurm"] == {"partition": "debug", "sbatch_args": ["--time=10"], "cores": 4}
    done = control(
        queue,
        """
import subprocess, time
blocker = subprocess.run(["sbatch", "--parsable", "--nodes=3", "--exclusive", "--wrap", "sleep 100"],
                         capture_output=True, text=True, check=True).stdout.strip()
while subprocess.run(["squeue", "-h", "-j", blocker, "-o", "%T"], capture_output=True, text=True).stdout.strip() != "RUNNING":
    time.sleep(0.1)
target = ComputeTarget(ws, "queue")
run = experiment.submit(Estimator(
    source_directory="src", entry_script="train.py", compute_target=target, node_count=2, process_count_per_node=2,
    distributed_training=MpiConfiguration(), environment_variables={"WAIT": "1"},
))
folder = run.get_details()["runFolder"]
def until(wanted):
    seen = set()
    while (now := run.get_status()) != wanted:
        seen.add(now)
        time.sleep(0.02)
    return sorted(seen)
seen = [until("Queued")]
while not os.path.exists(os.path.join(folder, "slurm.json")):
    time.sleep(0.05)
still = run.get_status()
subprocess.run(["scancel", blocker], check=True)
seen.append(until("Running"))
open(os.path.join(folder, "outputs", "go"), "w").close()
details = run.wait_for_completion(show_output=True)
model = run.register_model("weights", "outputs/model.txt")
print(json.dumps({"seen": seen, "still": still, "status": details["status"], "target": details["target"], "model": model.id,
                  "metrics": run.get_metrics(ranks="all")}))
""",
    )
    found = told(done)
    assert (found["still"], found["status"], found["target"], found["model"]) == ("Queued", "Completed", "queue", "weights:1")
    assert set(found["seen"][1]) <= {"Queued"}
    assert found["metrics"] == {str(rank): {"rank": rank} for rank in range(4)}
    assert re.search(r"places \['node1', 'node1', 'node2', 'node2'\] node1:6000 2", done.stdout)
    assert "submitted as Slurm job" in done.stdout


def test_cancel_is_scancel_and_a_failure_has_its_traceback(queue: SlurmProject, wait_until: Callable[..., None]) -> None:
    (queue.folder / "src" / "fails.py").write_text("raise ValueError('bad batch')")
    done = control(
        queue,
        """
import time
run = experiment.submit(ScriptRunConfig("src", "train.py", compute_target="queue"))
run.get_details()
early = experiment.submit(ScriptRunConfig("src", "train.py", compute_target="queue"))
early.cancel()
run.cancel()
waits = ScriptRunConfig("src", "train.py", compute_target="queue")
waits.run_config.environment_variables = {"WAIT": "1"}
late = experiment.submit(waits)
while late.get_status() != "Running":
    time.sleep(0.05)
late.cancel()
for each in (run, early, late):
    each.wait_for_completion()
failed = experiment.submit(ScriptRunConfig("src", "fails.py", compute_target="queue"))
try:
    failed.wait_for_completion()
except Exception as error:
    print(type(error).__name__, error)
print(json.dumps([each.get_status() for each in (run, early, late, failed)]))
""",
    )
    assert told(done) == ["Canceled", "Canceled", "Canceled", "Failed"]
    assert "ActivityFailedException" in done.stdout
    assert "ValueError: bad batch" in done.stdout
    wait_until(lambda: not queue.slurm("squeue", "-h"), 30)


def test_a_run_whose_supervisor_is_killed_goes_on_and_is_told_to_its_end(queue: SlurmProject) -> None:
    done = control(
        queue,
        RUNNING
        + """
import signal
folder = run.get_details()["runFolder"]
os.kill(json.load(open(os.path.join(folder, "azureml", "supervisor.json")))["pid"], signal.SIGKILL)
states = [run.get_status()]
open(os.path.join(folder, "outputs", "go"), "w").close()
run.wait_for_completion()
print(json.dumps([*states, run.get_status(), run.get_metrics()]))
""",
    )
    assert told(done) == ["Running", "Completed", {"rank": 0}]


def test_a_job_that_slurm_puts_back_into_its_queue_is_queued(queue: SlurmProject) -> None:
    done = control(
        queue,
        RUNNING
        + """
import subprocess
job = json.load(open(os.path.join(run.get_details()["runFolder"], "slurm.json")))["job_id"]
subprocess.run(["scontrol", "requeuehold", job], check=True)
while (again := run.get_status()) in ("Running", "Finalizing"):
    time.sleep(0.05)
run.cancel()
run.wait_for_completion()
print(json.dumps([again, run.get_status()]))
""",
    )
    assert told(done) == ["Queued", "Canceled"]


def test_ranks_on_nodes_have_the_packages_that_were_missing(queue: SlurmProject) -> None:
    wheel(queue.folder / "wheels", "toy", "1.1")
    queue.env.update(PIP_NO_INDEX="1", PIP_FIND_LINKS=str(queue.folder / "wheels"))
    (queue.folder / "src" / "toys.py").write_text(
        "import socket, toy\nfrom mpi4py import MPI\nprint(toy.VERSION, MPI.COMM_WORLD.size, socket.gethostname())"
    )
    done = control(
        queue,
        """
run = experiment.submit(Estimator(
    source_directory="src", entry_script="toys.py", compute_target="queue", node_count=2, pip_packages=["toy>1"],
    distributed_training=MpiConfiguration(),
))
print(run.get_status())
run.wait_for_completion(show_output=True)
""",
    )
    assert "\nPreparing\n" in done.stdout
    assert {"1.1 2 node1", "1.1 2 node2"} <= {line.partition("] ")[2] for line in done.stdout.splitlines()}


CANNOT = {
    "nodes": (
        "ScriptRunConfig('src', 'train.py', compute_target='queue', distributed_job_config=MpiConfiguration(1, 3))",
        "node_count=3 exceeds compute target 'queue', which has max_nodes=2",
    ),
    "processes": (
        "ScriptRunConfig('src', 'train.py', compute_target='queue', distributed_job_config=MpiConfiguration(5, 2))",
        "process_count_per_node=5 exceeds 4, the cores of each node of Slurm partition debug",
    ),
    "servers": (
        "ScriptRunConfig('src', 'train.py', compute_target='queue', distributed_job_config=TensorflowConfiguration(1, 1))",
        "parameter servers do not run on Slurm partition debug",
    ),
}


def test_what_it_does_not_have_is_refused_with_the_numbers(queue: SlurmProject) -> None:
    tries = "".join(
        f"try:\n    experiment.submit({text})\nexcept Exception as error:\n    print({name!r}, error)\n"
        for name, (text, _) in CANNOT.items()
    )
    done = control(queue, tries)
    for name, (_, expected) in CANNOT.items():
        assert any(line.startswith(name) and expected in line for line in done.stdout.splitlines()), done.stdout
    for options, words in (
        (("--slurm-partition", "debg"), "no Slurm partition 'debg' (did you mean debug"),
        (
            ("--slurm-partition", "debug", "--max-nodes", "9"),
            "--max-nodes 9 is not a number from 1 to 3, the nodes of Slurm partition",
        ),
        (("--slurm-partition", "debug", "--sbatch-arg=--nodes=2"), "--sbatch-arg --nodes=2 cannot be given: use --nodes"),
        (("--slurm-partition", "debug", "--hosts", "node1:2"), "give one of them"),
    ):
        refused = queue.dtrain("compute", "add", "other", *options)
        assert (refused.returncode, words in refused.stderr) == (2, True), refused.stderr
    assert queue.dtrain("compute", "remove", "queue").returncode == 0
