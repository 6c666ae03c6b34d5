"""Runs by the SDK's names, with their files, metrics and records, in control scripts and in jobs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from dtrain.azureml.records import AzureLayout
from dtrain.azureml.streaming import wait
from dtrain.files import atomic_write
from dtrain.layout import Workspace
from dtrain.processes import ProcessRecord
from dtrain.status import RunStatus, write_record
from tests.azureml.conftest import AzureProject
from tests.azureml.test_submit import told
from tests.console.conftest import another_python

BY_HAND = """
run = experiment.start_logging(snapshot_directory=".")
run.log("x", float("nan"))
run.log_list("l", [1, 2.5])
class Plot:
    def savefig(self, path): open(path, "wb").write(b"png")
run.log_image("a plot", plot=Plot())
run.upload_file("notes/one.txt", "notes.txt")
run.upload_files("outputs/two.txt", "notes.txt")
for wrong in (lambda: run.add_properties("x"), lambda: run.set_tags(["a"])):
    try:
        wrong()
    except Exception as error:
        print(error)
run.upload_file("outputs/metrics/report.json", "notes.txt")
run.upload_file("outputs/uploads/.attempt-1/a", "notes.txt")
children = run.child_runs(2)
children[0].log("y", 1)
children[0].complete()
children[1].fail("no good")
grandchild = children[1].child_run()
grandchild.complete()
failed = [child.id for child in run.get_children(recursive=True, status="Failed")]
for wrong in (f"../runs/{run.id}", run._layout.root.as_posix(), "latest"):
    try:
        Run(experiment, wrong)
    except Exception as error:
        print(error)
told = {"before": run.get_status(), "metrics": run.get_metrics(), "files": run.get_file_names()}
model = run.register_model("early", "notes/one.txt")
run.complete()
with experiment.start_logging() as other:
    other.log("z", 1)
    other.log_row("empty")
print(json.dumps({
    **told, "after": run.get_status(), "children": [[c.get_status(), c.parent.id == run.id] for c in run.get_children()],
    "runs": len(list(experiment.get_runs())), "number": [run.number, other.number], "model": [model.id, model.run.id == run.id],
    "failed": failed == [children[1].id],
    "restored": sorted(os.listdir(run.restore_snapshot(path="restored"))), "other": other.get_status(),
}))
"""


def test_runs_of_the_script_itself_and_their_children(azure: AzureProject) -> None:
    (azure.folder / "notes.txt").write_text("note")
    done = azure.control(BY_HAND)
    found = told(done)
    assert str(found["metrics"]) == "{'x': nan, 'l': [1, 2.5], 'a plot': 'a_plot_0.png'}"
    own = ["outputs/metrics/report.json", "outputs/two.txt", "outputs/uploads/.attempt-1/a"]
    assert found["files"] == ["a_plot_0.png", "notes/one.txt", *own]
    assert (found["failed"], done.stdout.count("no run '")) == (True, 3)
    assert done.stdout.count(" has to be a dict; write ") == 2
    assert "log_row('empty') has no columns; give them by name" in done.stderr
    assert (found["before"], found["after"], found["other"]) == ("Running", "Completed", "Completed")
    assert found["children"] == [["Failed", True], ["Completed", True]]
    assert (found["runs"], found["number"], found["model"]) == (2, [1, 5], ["early:1", True])
    assert found["restored"] == [".azureml", "notes.txt", "submit.py"]
    assert {run["state"] for run in azure.json("runs")} == {"completed", "failed"}


def test_a_run_of_the_script_itself_keeps_what_is_written_to_outputs_and_logs(azure: AzureProject) -> None:
    """As notebooks of the SDK write there, without making the folder: of each run what was written while it ran."""
    (azure.folder / "notes.txt").write_text("note")
    done = azure.control(
        """
files = []
for number in range(3):
    with experiment.start_logging() as run:
        open("outputs/model.txt", "w").write(str(number))
        open(f"logs/{number}.txt", "w").write("log")
        run.upload_file("outputs/same.txt", "notes.txt")
        open("outputs/same.txt", "w").write("changed")
        run.take_snapshot("submit.py")
        run.take_snapshot("./")
    run.download_file("outputs/model.txt", "back.txt")
    run.download_file("outputs/same.txt", "same.txt")
    files.append([run.get_file_names(), open("back.txt").read(), open("same.txt").read()])
model = run.register_model("last", "outputs/model.txt")
run.restore_snapshot(path="restored")
with experiment.start_logging(outputs="result") as other:
    open("result/a.txt", "w").write("a")
with experiment.start_logging(outputs=False) as none:
    open("outputs/b.txt", "w").write("b")
try:
    run.take_snapshot("nowhere")
except Exception as error:
    refused = str(error)
print(json.dumps({"files": files, "other": other.get_file_names(), "none": none.get_file_names(), "model": model.id,
    "restored": sorted(os.listdir("restored")), "refused": refused}))
"""
    )
    found = told(done)
    names = ["outputs/model.txt", "outputs/same.txt"]
    assert found["files"] == [[[f"logs/{number}.txt", *names], str(number), "note"] for number in range(3)]
    assert (found["other"], found["none"], found["model"]) == (["result/a.txt"], [], "last:1")
    assert {"submit.py", "notes.txt"} <= set(found["restored"])
    assert "there is no file or folder 'nowhere' to keep" in str(found["refused"])


def test_a_run_definition_has_its_keys_also_in_the_older_spelling(azure: AzureProject) -> None:
    azure.train("print('x')")
    done = azure.control(
        """
definition = experiment.submit(ScriptRunConfig("src", "train.py", arguments=["--a", 1])).get_details()["runDefinition"]
try:
    definition["Argumnts"]
except KeyError as error:
    print(error)
print(json.dumps([definition["Arguments"], definition["NodeCount"], definition["arguments"], "Arguments" in definition]))
"""
    )
    assert "'Argumnts' is not in the run definition (did you mean arguments?); it has script, " in done.stdout
    assert json.loads(done.stdout.splitlines()[-1]) == [["--a", "1"], 1, ["--a", "1"], False]


METRICS = """
from azureml.core import ScriptRun
parent = experiment.start_logging()
parent.log("a", 1)
job = parent.submit_child(ScriptRunConfig("src", "train.py"))
job.wait_for_completion(show_output=True)
child = job.child_run()
child.log("a", 3)
child.log("b", 4)
child.complete()
parent.child_run().complete()
parent.complete()
names = {parent.id: "parent", job.id: "job", child.id: "child"}
def named(metrics):
    return {names[key]: value for key, value in metrics.items()}
def count(**filters):
    return len(list(Run.list(experiment, **filters)))
print(json.dumps({
    "all": named(parent.get_metrics(recursive=True)), "b": named(parent.get_metrics("b", recursive=True)),
    "job": named(job.get_metrics(recursive=True, run_type=ScriptRun.RUN_TYPE)),
    "other": job.get_metrics(run_type="azureml.other"),
    "runs": [count(), count(include_children=True), count(include_children=True, status="Failed"), count(type="azureml.other")],
    "experiments": [each.name for each in Experiment.list(ws)], "archived": Experiment.list(ws, view_type="ArchivedOnly"),
}))
"""


def test_metrics_of_runs_below_and_lists_of_runs(azure: AzureProject) -> None:
    azure.train("from azureml.core import Run\nrun = Run.get_context()\nrun.log('a', 2)\nprint('has', run.get_metrics())")
    done = azure.control(METRICS)
    assert "has {'a': 2}" in done.stdout
    found = told(done)
    assert found["all"] == {"parent": {"a": 1}, "job": {"a": 2}, "child": {"a": 3, "b": 4}}
    assert (found["b"], found["job"], found["other"]) == ({"child": {"b": 4}}, {"job": {"a": 2}, "child": {"a": 3, "b": 4}}, {})
    assert (found["runs"], found["experiments"], found["archived"]) == ([1, 4, 0, 0], ["tests"], [])


def test_runs_that_are_left_open(azure: AzureProject) -> None:
    """By a control script and by a rank of a job: they ended with their processes, and that is what is told."""
    azure.train("from azureml.core import Run\nRun.get_context().child_run().log('x', 1)")
    azure.control(
        """
experiment.start_logging().log("x", 1)
open("outputs/kept.txt", "w").close()
experiment.submit(ScriptRunConfig("src", "train.py")).wait_for_completion()
"""
    )
    done = azure.control(
        """
for run in experiment.get_runs(include_children=True):
    details = run.get_details()
    print(details["status"], details["endTimeUtc"] is not None, details.get("error", {}).get("error", {}).get("message", ""))
"""
    )
    child, job, own = done.stdout.splitlines()[-3:]
    assert len(list((azure.folder / "workspace" / "runs").glob("*/outputs/kept.txt"))) == 1
    assert job == "Completed True "
    for line in (child, own):
        assert line.startswith("Failed True ")
        assert line.endswith(": its process ended without complete()")


JOB = """
import os, sys
from azureml.core import Model, Run
run = Run.get_context()
ws = run.experiment.workspace
print("downloaded", open(sys.argv[2] + "/a/b.txt").read(), os.environ["AZUREML_DATAREFERENCE_mine"] == sys.argv[2])
print("mounted", os.listdir(os.environ["AZUREML_DATAREFERENCE_other"]))
print("old model", open(Model.get_model_path("old")).read())
os.makedirs("outputs/net")
open("outputs/net/w", "w").write("weights")
run.upload_file("extra.txt", "train.py")
model = run.register_model(model_name="new", model_path="outputs/net")
run.tag("model", model.id)
run.add_properties({"p": "1"})
"""


def test_in_a_job(azure: AzureProject) -> None:
    """A copy of a datastore's folder, a model of the workspace, and one that the job registers while it runs; its records."""
    azure.train(JOB)
    done = azure.control(
        """
from azureml.core.runconfig import RunConfiguration
os.makedirs("data/a")
open("data/a/b.txt", "w").write("data")
store = ws.get_default_datastore()
store.upload("data", "deep/er")
Model.register(ws, "data/a/b.txt", "old")
reference = store.path("deep/er", data_reference_name="mine").as_download()
config = RunConfiguration(framework="python")
config.data_references["mine"] = reference
config.data_references["other"] = store.path("deep").to_config()
parent = experiment.start_logging()
run = parent.submit_child(ScriptRunConfig("src", "train.py", arguments=["--data", str(reference)], run_config=config))
run.wait_for_completion(show_output=True)
parent.complete()
count = store.download("back", prefix="deep")
from azureml.widgets import RunDetails
RunDetails(run).show()
print(json.dumps({
    "tags": run.get_tags(), "properties": run.properties, "models": sorted(ws.models), "files": run.get_file_names(),
    "count": count, "back": os.listdir("back/deep/er"), "children": [child.id == run.id for child in parent.get_children()],
    "logs": len(run.get_all_logs("logs-of-it")), "url": run.get_portal_url(), "folder": run.get_details()["runFolder"],
}))
"""
    )
    found = told(done)
    assert "downloaded data True" in done.stdout
    assert "mounted ['er']" in done.stdout
    assert "old model data" in done.stdout
    assert (found["tags"], found["properties"], found["models"]) == ({"model": "new:1"}, {"p": "1"}, ["new", "old"])
    assert {"extra.txt", "outputs/net/w"} <= set(found["files"])  # type: ignore[call-overload]
    assert (found["count"], found["back"], found["children"], found["logs"]) == (1, ["a"], [True], 2)
    assert found["url"] == f"file://{found['folder']}"
    assert azure.json("models", "new")[0]["run_state"] == "running"


MANY = """
import os
from azureml.core import Run
def count():
    return len(os.listdir("/proc/self/fd"))
Run.get_context().log("loss", 0)
before = count()
for number in range(1, 50):
    Run.get_context().log("loss", number)
print("opened", count() - before, Run.get_context().get_metrics()["loss"] == list(range(50)))
"""


def test_a_run_that_is_asked_for_anew_for_each_metric(azure: AzureProject) -> None:
    """One file is open, and steps count on; so do runs of the control script's own close theirs when they are gone."""
    azure.train(MANY)
    done = azure.control(
        """
run = experiment.submit(ScriptRunConfig("src", "train.py"))
run.wait_for_completion(show_output=True)
def log_in_child():
    child = run.child_run()
    child.log("x", 1)
    child.complete()
log_in_child()
before = len(os.listdir("/proc/self/fd"))
for _ in range(5):
    log_in_child()
print(json.dumps({"id": run.id, "opened": len(os.listdir("/proc/self/fd")) - before}))
"""
    )
    assert "opened 0 True" in done.stdout
    found = told(done)
    assert found["opened"] == 0
    assert [row["step"] for row in azure.json("metrics", str(found["id"]), "--by-rank")] == list(range(50))


def test_an_offline_run_records_and_tells_how_its_script_ended(azure: AzureProject) -> None:
    azure.script(
        "from azureml.core.run import Run, _OfflineRun\nrun = Run.get_context()\nassert isinstance(run, _OfflineRun)\n"
        "try:\n    run.experiment.workspace\nexcept AttributeError as error:\n    print(error)\n"
        "for n in range(3): run.log('loss', n)\nprint(run.get_metrics(), run.get_status())\nrun.complete()\nraise SystemExit(0)"
    )
    argv = [sys.executable, "-m", "dtrain.azureml", "train.py"]
    done = subprocess.run(argv, cwd=azure.folder, env=azure.environ(), capture_output=True, text=True, check=False)
    assert "{'loss': [0, 1, 2]} Running" in done.stdout, done.stderr
    assert "_OfflineRun.experiment is not available without Azure" in done.stdout
    azure.script("from azureml.core.run import Run\nRun.get_context().log('x', 1)\nraise ValueError('bad')")
    done = subprocess.run(argv, cwd=azure.folder, env=azure.environ(), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert [run["state"] for run in azure.json("runs")][1] == "failed"
    azure.script("from azureml.core.run import Run\nRun.get_context(allow_offline=False)")
    done = subprocess.run(argv, cwd=azure.folder, env=azure.environ(), capture_output=True, text=True, check=False)
    assert "RunEnvironmentException: this process is no rank of a job" in done.stderr


def test_a_config_that_was_lost_is_written_again(azure: AzureProject) -> None:
    again = azure.dtrain("azureml", "init", "--name", "mine")
    assert (again.returncode, "from_config() opens it" in again.stderr) == (2, True)
    (azure.folder / ".azureml" / "config.json").unlink()
    assert azure.dtrain("azureml", "init", "--name", "mine").returncode == 0
    assert (azure.folder / ".azureml" / "config.json").is_file()


def test_workspaces_and_environments(azure: AzureProject) -> None:
    """A config.json of Azure's own, from a folder below; environments of files, and a curated one."""
    below = azure.folder / "other" / "deep"
    below.mkdir(parents=True)
    config = {"subscription_id": "s-1", "resource_group": "group", "workspace_name": "azures"}
    (azure.folder / "other" / "config.json").write_text(json.dumps(config))
    (below / "conda.yml").write_text(
        "name: e\ndependencies:\n- python=3\n- pip:\n  - numpy>=1.2  # arrays\n- click\nchannels:\n- x\n"
    )
    (below / "requirements.txt").write_text("# none\nnumpy\nno-such-thing>2\n")
    (below / "submit.py").write_text(
        """
import json
from azureml.core import Environment, Workspace
from dtrain.azureml.packages import find_lacks
ws = Workspace.from_config()
conda = Environment.from_conda_specification("c", "conda.yml").python.conda_dependencies
pip = Environment.from_pip_requirements("p", "requirements.txt")
pip.register(ws)
again = Environment.get(ws, "p")
curated = Environment.get(ws, "AzureML-Chainer-5.1.0-GPU")
print(json.dumps({
    "ws": [ws.name, ws.subscription_id, ws.resource_group], "folder": ws.get_details()["workspace_folder"],
    "conda": [list(conda.conda_packages), list(conda.pip_packages)], "pip": list(again.python.conda_dependencies.pip_packages),
    "lacks": [lack.wanted for lack in find_lacks(["no-such-thing>2", "numpy", "azureml-sdk"], ["python=3", "cudatoolkit=9"])],
    "curated": list(curated.python.conda_dependencies.pip_packages), "environments": list(ws.environments),
}))
"""
    )
    argv = [sys.executable, "-m", "dtrain.azureml", "submit.py"]
    done = subprocess.run(argv, cwd=below, env=azure.environ(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = told(done)
    assert (found["ws"], found["folder"]) == (["azures", "s-1", "group"], str(azure.folder / "other" / "workspace"))
    assert (found["conda"], found["pip"]) == ([["python=3", "click"], ["numpy>=1.2"]], ["numpy", "no-such-thing>2"])
    assert (found["lacks"], found["curated"], found["environments"]) == (["no-such-thing>2"], ["chainer"], ["p"])


def test_a_job_that_is_let_fail_by_its_control_script(azure: AzureProject) -> None:
    """One that has completed and one that runs, which is ended; complete() says nothing of a job that is not true."""
    azure.train("print('done')")
    azure.train("import time\ntime.sleep(600)", "waits.py")
    done = azure.control(
        """
done = experiment.submit(ScriptRunConfig("src", "train.py"))
done.wait_for_completion()
done.complete()
before = done.get_status()
done.fail("the wrong data")
waits = experiment.submit(ScriptRunConfig("src", "waits.py"))
try:
    waits.complete()
except Exception as error:
    refused = str(error)
waits.fail(error_code="E42")
at_once = [waits.get_status(), waits.get_details()["status"], waits.get_details()["error"]["error"]]
waits.wait_for_completion(raise_on_error=False)
waits.cancel()
mine = experiment.start_logging()
mine.complete()
mine.fail("looked again", error_code="E43")
mine.complete()
with experiment.start_logging() as inner:
    inner.fail("inside")
print(json.dumps({
    "at once": at_once, "mine": [mine.get_status(), mine.get_details()["error"]["error"]], "inner": inner.status,
    "before": before, "after": done.get_status(), "message": done.get_details()["error"]["error"]["message"],
    "waits": waits.get_status(), "refused": refused,
}))
"""
    )
    found = told(done)
    assert (found["before"], found["after"], found["waits"]) == ("Completed", "Failed", "Failed")
    assert found["message"] == "the wrong data"
    assert found["at once"] == ["Failed", "Failed", {"code": "E42", "message": "E42"}]
    assert (found["mine"], found["inner"]) == (["Failed", {"code": "E43", "message": "looked again"}], "Failed")
    assert len(re.findall(r"is Failed already; (cancel|complete)\(\) changes nothing", done.stderr)) == 2
    assert "cancel() ends it" in str(found["refused"])
    assert {run["state"] for run in azure.json("runs")} == {"failed"}


CHARTS = """
run = experiment.start_logging()
matrix = {"schema_type": "confusion_matrix", "schema_version": "1.0.0", "data": {"class_labels": ["a"], "matrix": [[3]]}}
run.log_confusion_matrix("confusion", matrix)
run.log_predictions("predictions", json.dumps(matrix))
run.log_residuals("residuals", matrix)
run.log_accuracy_table("accuracy", matrix)
try:
    run.log_residuals("bad", {"data": 1})
except Exception as error:
    bad = str(error)
run.tag("plain")
run.complete()
populated = run.get_metrics("confusion", populate=True)
run.download_file("confusion_0.json", "confusion.json")
print(json.dumps({
    "metrics": run.get_metrics(), "populated": populated == {"confusion": matrix},
    "same": json.load(open("confusion.json")) == matrix, "bad": bad, "tags": run.get_tags(),
    "with tag": len(list(experiment.get_runs(tags="plain"))),
}))
"""


def test_charts_and_tags_without_a_value(azure: AzureProject) -> None:
    found = told(azure.control(CHARTS))
    assert found["metrics"] == {name: f"{name}_0.json" for name in ("confusion", "predictions", "residuals", "accuracy")}
    assert (found["same"], found["populated"], found["tags"], found["with tag"]) == (True, True, {"plain": None}, 1)
    assert "of data, schema_type, schema_version" in str(found["bad"])
    assert azure.json("show", "latest")["tags"] == {"plain": ""}


def test_ways_to_log_in_are_taken_and_not_used(azure: AzureProject) -> None:
    done = azure.control(
        "from azureml.core.authentication import ServicePrincipalAuthentication\n"
        "auth = ServicePrincipalAuthentication('tenant', service_principal_id='me', service_principal_password='hush')\n"
        "print(Workspace.from_config(auth=auth).name)\n"
        "try:\n    Workspace.from_config(auth='key')\nexcept Exception as error:\n    print(error)\n"
    )
    assert done.stdout.splitlines()[-2:] == [
        "mine",
        "auth=str(...) has no meaning here: there is no account to log in to; leave it out",
    ]
    assert "ServicePrincipalAuthentication is not used: there is no account to log in to" in done.stderr
    assert "hush" not in done.stderr


RESUMED = """
import os, sys
before = sys.argv[sys.argv.index("--resume-from") + 1] if "--resume-from" in sys.argv else None
assert os.environ.get("AZUREML_DATAREFERENCE_MODEL_LOCATION") == before
count = int(open(os.path.join(before, "count")).read()) if before else 0
open("outputs/count", "w").write(str(count + 1))
"""


def test_resume_from_a_run_and_from_a_datastore(azure: AzureProject) -> None:
    azure.train(RESUMED)
    done = azure.control(
        """
from azureml.data.datapath import DataPath
store = ws.get_default_datastore()
def count_after(resume_from=None):
    run = experiment.submit(Estimator("src", entry_script="train.py", resume_from=resume_from))
    run.wait_for_completion(show_output=True)
    run.download_file("outputs/count", "count/")
    return run, int(open("count/count").read())
first, one = count_after()
_, of_outputs = count_after(first._get_outputs_datapath())
second, of_run = count_after(first)
_, three = count_after(second)
store.upload("count", "kept")
reference = store.path("kept")
_, of_path = count_after(DataPath(store, "kept"))
_, of_reference = count_after(DataPath.create_from_data_reference(reference.as_download()))
print(json.dumps([one, of_outputs, of_run, three, of_path, of_reference]))
"""
    )
    assert json.loads(done.stdout.splitlines()[-1]) == [1, 2, 2, 3, 4, 4]


def test_a_job_is_in_the_workspace_of_its_control_script(azure: AzureProject) -> None:
    """Also where its folder holds a config.json of Azure's own, beside which there lies a copy of the sources alone."""
    config = {"subscription_id": "s-1", "resource_group": "group", "workspace_name": "mine"}
    azure.train(
        "from azureml.core import Model, Run, Workspace\n"
        "ws, of_run = Workspace.from_config(), Run.get_context().experiment.workspace\n"
        "print(ws.get_details() == of_run.get_details())\nModel.register(ws, 'train.py', 'from-the-job')\n"
        "print(of_run.name, of_run.subscription_id, Workspace('s', 'g', 'mine').get_details()['workspace_folder'])"
    )
    (azure.folder / "src" / "config.json").write_text(json.dumps(config))
    done = azure.control(
        """
from azureml.core import Experiment, ScriptRunConfig, Workspace
ws = Workspace.from_config("src/config.json")
Experiment(ws, "tests").submit(ScriptRunConfig("src", "train.py")).wait_for_completion(show_output=True)
print(list(ws.models))
""",
        begin="",
    )
    folder = azure.folder / "src" / "workspace"
    assert ":0] True\n" in done.stdout
    assert f"mine s-1 {folder}" in done.stdout
    assert "['from-the-job']" in done.stdout


def test_arguments_as_text_a_script_by_its_whole_path_and_a_runs_name(azure: AzureProject) -> None:
    azure.train("import sys\nprint(sys.argv[1:])")
    done = azure.control(
        """
run = experiment.submit(ScriptRunConfig("src", os.path.abspath("src/train.py"), arguments="--name 'a b' --flag"))
run.wait_for_completion(show_output=True)
run.display_name = "the first"
print(Run(experiment, run.id).display_name)
"""
    )
    assert "['--name', 'a b', '--flag']" in done.stdout
    assert done.stdout.endswith("the first\n")


def test_a_run_at_a_glance_on_a_terminal(azure: AzureProject) -> None:
    """The cause of a failure, the log of the rank that failed, and metrics that cannot be put together are all told."""
    azure.train(
        "from azureml.core import Run\nrun = Run.get_context()\nfor n in range(3): run.log('loss', n)\n"
        "print('\\x1b[31mred\\x1b[0m', '10%\\r20%')\nraise ValueError('bad batch')"
    )
    done = azure.control(
        """
from azureml.widgets import RunDetails
run = experiment.submit(ScriptRunConfig("src", "train.py"))
run.wait_for_completion(raise_on_error=False)
RunDetails(run).show()
run.log_row("loss", x=1)
RunDetails(run).show()
"""
    )
    lines = done.stdout.splitlines()
    assert lines[-1].endswith("ValueError: bad batch")
    assert "  loss: 2 (last of 3)" in lines
    assert "  | 20%" in lines
    assert len([line for line in lines if line.startswith("  rank 0 on ")]) == 2
    assert len([line for line in lines if "was logged as numbers and as rows; use two names" in line]) == 1


def test_a_run_of_dtrain_run_is_seen_as_others(azure: AzureProject) -> None:
    """One that no control script submitted, by another Python and with a variable; and asked for in another experiment."""
    python = another_python(azure.folder / "venv")
    script = azure.script("print('x')")
    made = azure.dtrain("run", "--python", str(python), "--env", "A=1", "--experiment", "plain", script)
    assert made.returncode == 0, made.stderr
    done = azure.control(
        f"""
run = Run(Experiment(ws, "plain"), {azure.latest.id!r})
asked = run.wait_for_completion()["runDefinition"]["environment"]
try:
    Run(experiment, run.id)
except Exception as error:
    refused = f"{{type(error).__name__}}: {{error}}"
print(json.dumps([asked["python"]["interpreterPath"], asked["environmentVariables"], run.number, refused]))
"""
    )
    *found, refused = told(done)
    assert found == [str(python), {"A": "1"}, 1]
    assert refused.startswith(f"UserErrorException: run {azure.latest.id!r} is of experiment 'plain', and not of 'tests'")


def test_who_waits_is_shown_what_another_host_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], wait_until: Callable[..., None]
) -> None:
    """A file replaced by a longer copy stands for one of a network file system: only who opens it sees what came."""
    run = Workspace(tmp_path).create_run("train")
    run.make_folders(1)
    status = RunStatus(state="running", size=1, started=1.0, supervisor=ProcessRecord(host="node2", pid=1, started=1.0))
    for path in (run.spec, run.status):
        write_record(path, status)
    console = AzureLayout(run).console
    console.parent.mkdir(exist_ok=True)
    waits = threading.Thread(target=wait, args=(run,), kwargs={"show_output": True, "raise_on_error": True}, daemon=True)
    waits.start()
    shown = ""

    def shows(word: str) -> bool:
        nonlocal shown
        shown += capsys.readouterr().out
        return f"\n{word}\n" in shown

    atomic_write(console, b"first\n")
    wait_until(lambda: shows("first"))
    atomic_write(console, b"first\nsecond\n")
    wait_until(lambda: shows("second"))
    write_record(run.status, RunStatus(state="completed", size=1, started=1.0, ended=2.0))
    waits.join(20)
    assert shows("Status: Completed")


def test_a_snapshot_is_what_was_submitted(azure: AzureProject) -> None:
    """Without what the job wrote, with folders called as the run's own, and by its id alone."""
    azure.train(
        "import os\nos.mkdir('result')\nopen('result/x', 'w').close()\nos.remove('gone.txt')\nopen('outputs/y', 'w').close()"
    )
    for name in ("gone.txt", "pkg/logs/form.py", "outputs/old.txt"):
        path = azure.folder / "src" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    done = azure.control(
        """
run = experiment.submit(ScriptRunConfig("src", "train.py"))
run.wait_for_completion()
folder = run.restore_snapshot(run.get_snapshot_id())
try:
    run.restore_snapshot("another", "elsewhere")
except Exception as error:
    refused = str(error)
files = sorted(os.path.relpath(os.path.join(parent, name), folder) for parent, _, names in os.walk(folder) for name in names)
print(json.dumps([files, os.path.relpath(folder), run.id, refused]))
"""
    )
    files, folder, run_id, refused = told(done)
    assert files == ["pkg/logs/form.py", "train.py"]
    assert folder == f"{run_id}-code"
    assert refused == f"snapshot_id='another': run {run_id} has one snapshot, and its id is the run's"
