"""Control scripts of the SDK's style, run for real: what is submitted, how it ends, and what is told of it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Callable

import pytest

from dtrain.status import read_status
from tests.azureml.conftest import AzureProject

TRAIN = """
import argparse, os
from azureml.core.run import Run
parser = argparse.ArgumentParser()
parser.add_argument("--lr", type=float)
parser.add_argument("--nesterov", action="store_true")
parser.add_argument("--data")
args = parser.parse_args()
run = Run.get_context()
assert run.id == os.environ["AZUREML_RUN_ID"]
rank = int(os.environ.get("OMPI_COMM_WORLD_RANK", 0))
for loss in (0.5, 0.25):
    run.log("loss", loss + rank)
run.log("accuracy", 0.75)
run.log_list("sizes", [3])
run.log_row("point", x=1, y=2)
run.log_row("point", x=3, y=4)
run.log_table("table", {"a": [1, 2], "b": 7})
nodes, index = os.environ["AZUREML_NODE_COUNT"], os.environ["AZ_BATCHAI_TASK_INDEX"]
print("lr", args.lr, "nesterov", args.nesterov, "nodes", nodes, "index", index)
if args.data:
    print("data:", open(os.path.join(args.data, "numbers.txt")).read())
if rank == 0:
    os.makedirs("outputs", exist_ok=True)
    os.makedirs("result", exist_ok=True)
    open("outputs/model.txt", "w").write("weights")
    open("result/log", "w").write("elsewhere")
"""


def told(done: subprocess.CompletedProcess[str]) -> dict[str, object]:
    """What a control script printed as its last line, as JSON."""
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.needs("mpi")
def test_an_estimator_over_mpi(azure: AzureProject) -> None:
    azure.train(TRAIN)
    (azure.folder / "numbers.txt").write_text("1 2 3")
    done = azure.control(
        """
store = ws.get_default_datastore()
store.upload_files(["numbers.txt"], target_path="data")
estimator = Estimator(
    source_directory="src", entry_script="train.py", compute_target=cluster, node_count=2,
    script_params={"--lr": 0.1, "--nesterov": "", "--data": store.path("data").as_mount()},
    distributed_training=MpiConfiguration(), pip_packages=["numpy>=1.20", "azureml-defaults"],
)
run = experiment.submit(estimator, tags={"who": "me"})
details = run.wait_for_completion(show_output=True)
model = run.register_model("weights", "outputs/model.txt", tags={"stage": "test"}, properties={"kind": "toy"})
path = model.download("copy")
run.add_properties({"fixed": "1"})
run.download_files(prefix="outputs", output_directory="down")
run.download_file("azureml-logs/70_driver_log.txt")
run.download_file("user_logs/std_log_process_01.txt", "down/")
print(json.dumps({
    "metrics": run.get_metrics(), "all": run.get_metrics(ranks="all"), "files": run.get_file_names(), "id": run.id,
    "details": details, "model": [model.id, model.tags, model.properties, open(path).read(), list(ws.models)],
    "tags": run.get_tags(), "runs": [each.id for each in experiment.get_runs(tags="who")], "properties": run.get_properties(),
    "down": open("down/outputs/model.txt").read(), "logs": [os.path.isfile(f) for f in
        ("70_driver_log.txt", "down/std_log_process_01.txt")],
}))
"""
    )
    found = told(done)
    expected = {"loss": [0.5, 0.25], "accuracy": 0.75, "sizes": 3, "point": {"x": [1, 3], "y": [2, 4]}}
    assert found["metrics"] == {**expected, "table": {"a": [1, 2], "b": 7}}
    assert found["all"]["1"]["loss"] == [1.5, 1.25]  # type: ignore[index]
    assert {"outputs/model.txt", "azureml-logs/70_driver_log.txt", "user_logs/std_log_process_01.txt"} <= set(found["files"])  # type: ignore[call-overload]
    assert found["model"] == ["weights:1", {"stage": "test"}, {"kind": "toy"}, "weights", ["weights"]]
    assert (found["tags"], found["properties"], found["down"]) == ({"who": "me"}, {"fixed": "1"}, "weights")
    assert (found["runs"], found["logs"]) == ([found["id"]], [True, True])
    details = found["details"]
    arguments = details["runDefinition"]["arguments"]  # type: ignore[index]
    assert arguments[:4] == ["--lr", "0.1", "--nesterov", "--data"]
    assert (details["status"], details["target"]) == ("Completed", "cluster")  # type: ignore[index]
    for index in (0, 1):
        assert f"lr 0.1 nesterov True nodes 2 index {index}" in done.stdout
    assert "data: 1 2 3" in done.stdout
    assert "written outside of ./outputs and ./logs, and so not among the run's files: result/;" in done.stdout
    # The run is an ordinary one, of one attempt.
    assert read_status(azure.latest).earlier == []
    assert "attempt 0" not in done.stdout
    assert azure.json("show", "latest")["over_ranks"]["loss"]["max"] == 1.25
    assert azure.json("runs")[0]["id"] == found["id"]


def test_two_submits_at_once_go_on_without_their_script(azure: AzureProject, wait_until: Callable[..., None]) -> None:
    """The script ends at once; ScriptRunConfig, `local`, a variable, and a run found again by another script."""
    azure.train("import os, time\nwhile not os.path.exists(os.environ['GO']): time.sleep(0.05)\nprint('done', os.environ['X'])")
    done = azure.control(
        f"""
environment = Environment("mine")
environment.environment_variables = {{"X": "7", "GO": {str(azure.folder / "go")!r}}}
runs = [experiment.submit(ScriptRunConfig("src", "train.py", environment=environment)) for _ in range(2)]
print(json.dumps({{"ids": [run.id for run in runs], "status": [run.get_status() for run in runs]}}))
"""
    )
    found = told(done)
    assert set(found["status"]) <= {"Preparing", "Queued", "Running"}  # type: ignore[call-overload]
    assert len(set(found["ids"])) == 2  # type: ignore[call-overload]
    (azure.folder / "go").touch()
    done = azure.control(
        f"""
runs = [Run(experiment, name) for name in {found["ids"]!r}]
for run in runs:
    run.wait_for_completion(show_output=True)
print(json.dumps({{"status": [run.get_status() for run in runs]}}))
"""
    )
    assert told(done)["status"] == ["Completed", "Completed"]
    assert done.stdout.count("done 7") == 2


FAILURES = {
    "exception": ("raise ValueError('bad batch')", "ValueError: bad batch"),
    "syntax": ("def f(:\n", "SyntaxError: invalid syntax"),
    "module": ("import no_such.thing", "pip_packages=['no_such'], or an Environment, asks for a package"),
    "exit": ("import sys; sys.exit(3)", "exit code 3"),
    "failed": ("from azureml.core import Run\nRun.get_context().fail('no data')", "no data"),
    "name": (
        "from azureml.core import Webservice\nWebservice(None, 'x')",
        "models are registered and downloaded here, not deployed",
    ),
}


def test_failing_scripts_raise_with_their_tracebacks(azure: AzureProject) -> None:
    """All at once; an exception that the control script does not catch is its own end."""
    for name, (text, _) in FAILURES.items():
        azure.train(text, f"{name}.py")
    done = azure.try_control(
        f"""
runs = {{name: experiment.submit(ScriptRunConfig("src", name + ".py")) for name in {list(FAILURES)}}}
errors = {{}}
for name, run in runs.items():
    try:
        run.wait_for_completion()
    except Exception as error:
        errors[name] = [type(error).__name__, str(error), run.get_status(), run.get_details()["error"]["error"]["message"]]
print(json.dumps(errors), flush=True)
runs["exception"].wait_for_completion(raise_on_error=False)
runs["exception"].wait_for_completion()
"""
    )
    assert done.returncode == 1
    assert "ActivityFailedException: run tests-" in done.stderr
    assert 'runs["exception"].wait_for_completion()' in done.stderr
    found = told(done)
    for name, (_, expected) in FAILURES.items():
        kind, text, status, message = found[name]  # type: ignore[misc]
        assert (kind, status) == ("ActivityFailedException", "Failed")
        assert expected in text
        assert message


CANNOT = {
    "no script": ("ScriptRunConfig('src', 'tran.py')", "no such script: .*tran.py .*did you mean train.py"),
    "no folder": ("ScriptRunConfig('scr', 'train.py')", "source_directory 'scr' is not a folder"),
    "nodes": (
        "Estimator('src', entry_script='train.py', compute_target=cluster, node_count=8, distributed_backend='mpi')",
        "node_count=8 exceeds compute target 'cluster', which has max_nodes=4",
    ),
    "local nodes": (
        "Estimator('src', entry_script='train.py', node_count=2, distributed_backend='mpi')",
        "node_count=2 exceeds compute target 'local', which is 1 node",
    ),
    "processes": (
        "ScriptRunConfig('src', 'train.py', distributed_job_config=MpiConfiguration(1000))",
        "1000 processes on 1 node exceed [0-9]+, which a machine of [0-9]+ cores takes",
    ),
    "environment": ("ScriptRunConfig('src', 'train.py', environment='AzureML-Chainer')", "is no Environment; Environment.get"),
    "count": ("Estimator('src', entry_script='train.py', node_count='2')", "node_count='2' is not a number from 1"),
    "count later": ("set_count(ScriptRunConfig('src', 'train.py'), '2')", "process_count_per_node='2' is not a number from 1"),
    "no count": ("set_count(ScriptRunConfig('src', 'train.py'), 0)", "process_count_per_node=0 is not a number from 1"),
    "seconds": (
        "ScriptRunConfig('src', 'train.py', max_run_duration_seconds='60')",
        "max_run_duration_seconds='60' is not a number of seconds above 0",
    ),
    "elsewhere": ("ScriptRunConfig('src', os.path.abspath('submit.py'))", "submit.py is not in .*src; the ranks work in a copy"),
    "framework": ("Model.Framework.KERASS", "Framework has no 'KERASS' .did you mean KERAS"),
    "config": ("Workspace.from_config('src/config.json')", "config.json is no JSON .*; mend it, or let `dtrain azureml init`"),
    "no config": ("Workspace.from_config('src/list.json')", "list.json is no JSON object, with a workspace_name"),
    "version": (
        "Estimator('src', entry_script='train.py', conda_packages=['chainer=1'])",
        r"chainer==1\.\* \((not installed|installed is .*--any-version)",
    ),
    "none among them": (
        "ScriptRunConfig('src', 'train.py', arguments=['--a', None])",
        "arguments has None after '--a'; give a text or a number",
    ),
    "none later": ("none_later(ScriptRunConfig('src', 'train.py'))", "arguments has None; give a text or a number"),
    "workers": (
        "ScriptRunConfig('src', 'train.py', compute_target='cluster', distributed_job_config=TensorflowConfiguration(5))",
        "worker_count=5 exceeds compute target 'cluster', which has max_nodes=4, and takes one a node; lower worker_count",
    ),
    "workers on nodes": (
        "on_two_nodes(ScriptRunConfig('src', 'train.py', distributed_job_config=TensorflowConfiguration(5)))",
        "worker_count=5 exceeds compute target 'cluster', which has max_nodes=4",
    ),
    "servers": (
        "ScriptRunConfig('src', 'train.py', compute_target='cluster', distributed_job_config=TensorflowConfiguration(1, 5))",
        "parameter_server_count=5 exceeds compute target 'cluster', which has max_nodes=4",
    ),
    "tag": ("ScriptRunConfig('src', 'train.py'), tag={'a': 1}", "has no argument 'tag' .did you mean tags"),
    "argument": ("Estimator('src', entry_scrip='train.py')", "has no argument 'entry_scrip'.*did you mean entry_script"),
    "vm size": (
        "Estimator('src', entry_script='train.py', vm_size='STANDARD_D2')",
        "not available without Azure: create a compute",
    ),
    "attribute": (
        "(c := ScriptRunConfig('src', 'train.py')).run_config.nodecount",
        "has no 'nodecount' .did you mean node_count",
    ),
    "dict wanted": ("Estimator('src', entry_script='train.py', script_params=['--a', 1])", "script_params=.* has to be a dict"),
    "variables": ("Estimator('src', entry_script='t.py', environment_variables=['A'])", "environment_variables=.* be a dict"),
    "none in them": ("ScriptRunConfig('src', 'train.py', environment=with_none())", "environment_variables has None for 'A'"),
    "list wanted": ("ScriptRunConfig('src', 'train.py', arguments={'--a': 1})", "arguments={'--a': 1} is dict, .* be a list"),
    "packages": ("Estimator('src', entry_script='train.py', pip_packages={'a': 1})", "pip_packages=.* has to be a list"),
    "path": ("Estimator(source_directory=1, entry_script='train.py')", "source_directory=1 is int, .* a path, as text"),
    "script path": ("Estimator('src', entry_script=1)", "entry_script=1 is int, and has to be a path"),
    "later": ("setattr(Estimator('src', entry_script='train.py'), 'node_cnt', 2)", "dtrain's Estimator has no 'node_cnt'"),
    "tags": ("ScriptRunConfig('src', 'train.py'), tags=['a']", r"tags=\['a'\] is list, and has to be a dict"),
    "swapped": ("ComputeTarget('cluster', ws)", r"ComputeTarget\(\) has workspace='cluster', and takes a Workspace"),
    "no name": ("ComputeTarget(ws, None)", r"ComputeTarget\(\) has name=None, and takes a text"),
    "experiment": ("Experiment(ws, None)", r"Experiment\(\) has name=None, and takes a text"),
    "of what": ("Run('a', run_id='b')", r"Run\(\) has experiment='a', and takes an Experiment"),
    "sizes": ("ComputeTarget.create(ws, 'c3', 'STANDARD_NC6')", "takes an AmlComputeProvisioningConfiguration"),
    "taken": (
        "ComputeTarget.create(ws, 'local', AmlCompute.provisioning_configuration())",
        "'local' is taken: it is this machine",
    ),
    "store path": ("ws.get_default_datastore().path(3)", "path=3 is int, and has to be a path"),
    "not joined": (
        "Estimator('src', entry_script='train.py', compute_target=cluster, node_count=2)",
        "say how the processes are",
    ),
}


def test_what_cannot_be_started_is_refused_by_name(azure: AzureProject) -> None:
    """All in one script, for the time; nothing is left of any of them."""
    azure.train("print('x')")
    azure.train('{"workspace_name": mine}', "config.json")
    azure.train("[]", "list.json")
    tries = "def set_count(config, count):\n    config.run_config.mpi.process_count_per_node = count\n"
    tries += "def with_none():\n    made = Environment('e')\n    made.environment_variables['A'] = None\n    return made\n"
    tries += "def none_later(config):\n    config.arguments.append(None)\n    return config\n"
    tries += "def on_two_nodes(config):\n    config.run_config.target, config.run_config.node_count = 'cluster', 2\n"
    tries += "    return config\n"
    tries += "".join(
        f"try:\n    experiment.submit({text})\nexcept Exception as error:\n    print({name!r}, type(error).__name__, error)\n"
        for name, (text, _) in CANNOT.items()
    )
    done = azure.control(tries)
    for name, (_, expected) in CANNOT.items():
        line = next(line for line in done.stdout.splitlines() if line.startswith(name))
        assert re.search(expected, line), line
    assert not list((azure.folder / "workspace" / "runs").glob("*"))


def test_what_is_so_anyway_may_be_asked_for(azure: AzureProject) -> None:
    """What is kept of a run; and docker, which is said not to be used, with all that was asked of it."""
    azure.train("print('x')")
    done = azure.control(
        """
from azureml.core.runconfig import DockerConfiguration, RunConfiguration
config = RunConfiguration()
config.history.output_collection = True
config.docker = DockerConfiguration(shm_size="8g", arguments=["--ipc=host"])
config.environment.docker.gpu_support, config.environment.docker.arguments = True, ["--net=host"]
experiment.submit(ScriptRunConfig("src", "train.py", run_config=config)).wait_for_completion()
try:
    config.history.snapshot_project = False
except Exception as error:
    print(error)
"""
    )
    assert "docker is not used (arguments, shm_size, gpu_support): the job runs in this Python environment" in done.stderr
    assert "snapshot_project=False is not available: a run's source" in done.stdout


def test_any_version_lets_another_version_pass_with_a_word(azure: AzureProject) -> None:
    azure.train("print('x')")
    text = "experiment.submit(Estimator('src', entry_script='train.py', pip_packages=['numpy==1.9.1'])).wait_for_completion()"
    done = azure.control(text, "--any-version")
    assert "the job asked for numpy==1.9.1; it runs with " in done.stderr


def test_cancel(azure: AzureProject) -> None:
    """A run is canceled, once when it runs and once at once; waiting for it then raises nothing."""
    azure.train("import time\nprint('begun', flush=True)\ntime.sleep(600)")
    done = azure.control(
        """
import time
first, second = (experiment.submit(ScriptRunConfig("src", "train.py")) for _ in range(2))
second.cancel()
while first.get_status() != "Running":
    time.sleep(0.05)
first.cancel()
for run in (first, second):
    run.wait_for_completion()
print(json.dumps({"status": [run.get_status() for run in (first, second)]}))
"""
    )
    assert told(done)["status"] == ["Canceled", "Canceled"]


def test_a_cancel_before_the_supervisor_listens_is_recorded(azure: AzureProject, wait_until: Callable[..., None]) -> None:
    """Also where the control script does not ask again how it went."""
    azure.train("import time\ntime.sleep(600)")
    azure.control("experiment.submit(ScriptRunConfig('src', 'train.py')).cancel()")
    wait_until(lambda: {run["state"] for run in azure.json("runs")} == {"canceled"})


def test_ctrl_c_stops_the_waiting_and_not_the_run(azure: AzureProject, wait_until: Callable[..., None]) -> None:
    azure.train("import os, time\nwhile not os.path.exists(os.environ['GO']): time.sleep(0.05)")
    text = f"""
environment = Environment("mine")
environment.environment_variables["GO"] = {str(azure.folder / "go")!r}
experiment.submit(ScriptRunConfig("src", "train.py", environment=environment)).wait_for_completion(show_output=True)
"""
    from tests.azureml.conftest import BEGIN

    azure.script(BEGIN + text, "submit.py")
    job = azure.start("azureml", "submit.py")
    runs = azure.folder / "workspace" / "runs"
    wait_until(lambda: bool(list(runs.glob("*/ranks/00000/process.json"))), timeout=60)
    job.send_signal(signal.SIGINT)
    _, err = job.communicate(timeout=60)
    assert job.returncode == 1
    assert "was interrupted; the run goes on" in err
    assert read_status(azure.latest).state == "running"
    (azure.folder / "go").touch()
    wait_until(lambda: read_status(azure.latest).state == "completed", timeout=60)
    wait_until(lambda: not azure.supervisors(), timeout=60)


CLUSTER_TASK = """
import json, os, sys, time
from azureml.core import Run
config = json.loads(os.environ["TF_CONFIG"])
task = config["task"]
assert sorted(config["cluster"]) == ["ps", "worker"] and config["environment"] == "cloud"
assert os.environ["AZ_BATCHAI_TASK_INDEX"] == str(task["index"])
print(task["type"], task["index"], os.environ["AZ_BATCH_MASTER_NODE"], os.environ["AZUREML_NODE_COUNT"])
import socket
address = config["cluster"][task["type"]][task["index"]].rsplit(":", 1)
listener = socket.create_server((address[0], int(address[1])))
if task["type"] == "ps":
    time.sleep(600)
if task["index"] == 0:
    open("outputs/ready", "w").write("x")
while not os.path.exists("outputs/ready"):
    time.sleep(0.05)
Run.get_context().log("index", task["index"])
"""


@pytest.mark.needs("mpi")
def test_mpi_on_hosts(azure: AzureProject) -> None:
    """A host of more slots has no more processes than a node is to have; more than its slots are refused."""
    assert azure.dtrain("compute", "add", "hosts", "--hosts", "localhost:2").returncode == 0
    azure.train("import os\nprint('rank', os.environ['OMPI_COMM_WORLD_RANK'], 'of', os.environ['OMPI_COMM_WORLD_SIZE'])")
    done = azure.control(
        """
for count in (1, 2, 3):
    src = ScriptRunConfig("src", "train.py", compute_target="hosts", distributed_job_config=MpiConfiguration(count))
    try:
        experiment.submit(src).wait_for_completion(show_output=True)
    except Exception as error:
        print(error)
"""
    )
    for line in ("rank 0 of 1", "rank 0 of 2", "rank 1 of 2", "process_count_per_node=3 exceeds the 2 of host localhost"):
        assert done.stdout.count(line) == 1


def test_a_supervisor_that_does_not_start_leaves_no_run(azure: AzureProject) -> None:
    azure.train("print('x')")
    done = azure.control(
        """
import dtrain.azureml.start as start
def lose(*_):
    start._supervisors[-1].kill()
    start._supervisors[-1].wait()
start.fill_run = lose
try:
    experiment.submit(ScriptRunConfig("src", "train.py"))
except Exception as error:
    print(type(error).__name__, error, os.listdir("workspace/runs"))
"""
    )
    assert done.stdout.splitlines()[-1].startswith("ExperimentExecutionException the supervisor of the run, ")
    assert done.stdout.splitlines()[-1].endswith(" did not start; it said: nothing []")


SBATCH = """#!/bin/sh
test -e "${0%/*}/answer" || timeout 60 sh -c 'while kill -0 "$0"; do sleep 0.1; done' $PPID  # 1, where that was killed at once
pwd >"${0%/*}/folder"
echo 7
"""
SQUEUE = """#!/bin/sh
here=${0%/*}
for each; do case $each in --format=*) format=${each#*=} ;; esac; done
echo "$format" | sed "s#%i#7#; s#%T#$(cat "$here/state")#; s#%P#debug#; s#%B#n/a#; s#%r#None#; s#%Z#$(cat "$here/folder")#"
"""
KILLED = """
import dtrain.azureml.start as start
def kill(*_):
    os.kill(os.getpid(), 9)
setattr(start, sys.argv[1], kill)
experiment.submit(ScriptRunConfig("src", "train.py"))
"""


@pytest.mark.parametrize("where", ["fill_run", "_tell"])
def test_a_control_script_that_is_killed_in_a_submit_leaves_no_run(
    azure: AzureProject, wait_until: Callable[..., None], where: str
) -> None:
    azure.train("print('x')")
    done = azure.try_control(KILLED.replace("sys.argv[1]", repr(where)))
    assert done.returncode == -signal.SIGKILL
    wait_until(lambda: not list((azure.folder / "workspace" / "runs").iterdir()), timeout=30)


UNFOLLOWED = """
import signal, time
def folder(run):
    return run.get_details()["runFolder"]
def lose(run):
    pid = json.load(open(os.path.join(folder(run), "azureml", "supervisor.json")))["pid"]
    os.kill(pid, signal.SIGKILL)
def until(run, wanted):
    while run.get_status() != wanted:
        time.sleep(0.05)
early = experiment.submit(ScriptRunConfig("src", "train.py", compute_target="queue"))
until(early, "Queued")
lose(early)
until(early, "Failed")
told = {"early": early.get_details()["error"]["error"]["message"], "elsewhere": []}
record = os.path.join(folder(early), "azureml", "supervisor.json")
values = {**json.load(open(record)), "host": "elsewhere"}
open(record, "w").write(json.dumps(values))
for ago_s in (10, 600):
    status = {"state": "queued", "size": 1, "started": time.time() - ago_s}
    open(os.path.join(folder(early), "status.json"), "w").write(json.dumps(status))
    told["elsewhere"].append(early.get_status())
open("bin/answer", "w").close()
late = experiment.submit(ScriptRunConfig("src", "train.py", compute_target="queue"))
while not os.path.exists(os.path.join(folder(late), "slurm.json")):
    time.sleep(0.05)
lose(late)
told["waits"] = late.get_status()
open("bin/state", "w").write("NODE_FAIL")
until(late, "Failed")
told["late"] = late.get_details()["error"]["error"]["message"]
print(json.dumps({**told, "log": open(os.path.join(folder(late), "azureml", "console.log")).read()}))
"""


def make_slurm(azure: AzureProject) -> None:
    """Commands of a Slurm whose sbatch answers where there is a file ``bin/answer``; its job's state is in ``bin/state``."""
    for name, text in {
        "sbatch": SBATCH,
        "squeue": SQUEUE,
        "sinfo": "#!/bin/sh\necho 'debug|3|4'\n",
    }.items():
        (azure.folder / "bin").mkdir(exist_ok=True)
        (azure.folder / "bin" / name).write_text(text)
        (azure.folder / "bin" / name).chmod(0o755)
    azure.env["PATH"] = f"{azure.folder / 'bin'}:{os.environ['PATH']}"
    (azure.folder / "bin" / "state").write_text("PENDING")


def test_a_queued_run_that_nobody_follows_any_more(azure: AzureProject) -> None:
    """Its supervisor is killed before Slurm has answered, and after: what Slurm says then is what became of it. Of one on another
    host, which may be as good as gone, it is believed for some minutes that it waits for Slurm's answer."""
    make_slurm(azure)
    assert azure.dtrain("compute", "add", "queue", "--slurm-partition", "debug").returncode == 0
    azure.train("print('x')")
    found = told(azure.control(UNFOLLOWED))
    assert (found["elsewhere"], found["waits"]) == (["Queued", "Failed"], "Queued")
    assert str(found["early"]).startswith("what submitted it to Slurm was killed, or its host ")
    assert found["late"] == "Slurm ended job 7: one of its nodes failed"
    assert str(found["log"]).endswith("dtrain: Slurm ended job 7: one of its nodes failed\n")


@pytest.mark.parametrize(("where", "nodes"), [("cluster", 2), ("hosts", 1)])
def test_parameter_servers(azure: AzureProject, where: str, nodes: int) -> None:
    """Workers and a server by TF_CONFIG, on this machine's nodes and on hosts that `dtrain compute add` named."""
    assert azure.dtrain("compute", "add", "hosts", "--hosts", "localhost:3").returncode == 0
    assert azure.json("compute", "list")["hosts"]["max_nodes"] == 1
    azure.train(CLUSTER_TASK)
    done = azure.control(
        f"""
src = ScriptRunConfig("src", "train.py", compute_target={where!r}, distributed_job_config=TensorflowConfiguration(2, 1))
run = experiment.submit(src)
run.wait_for_completion(show_output=True)
print(json.dumps({{"metrics": run.get_metrics(ranks="all"), "files": run.get_file_names()}}))
"""
    )
    found = told(done)
    assert found["metrics"] == {"0": {"index": 0}, "1": {"index": 1}}
    assert "outputs/ready" in found["files"]  # type: ignore[operator]
    master = "127.0.0.1" if where == "cluster" else "localhost"
    for task in ("ps 0", "worker 0", "worker 1"):
        assert f"{task} {master}:6000 {nodes}" in done.stdout
    assert azure.dtrain("compute", "remove", "hosts").returncode == 0
    assert "hosts" not in azure.json("compute", "list")
