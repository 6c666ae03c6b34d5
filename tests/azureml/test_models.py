"""Models by the SDK's names: registered, found, changed, and downloaded, by one process and by ranks at once."""

from __future__ import annotations

import pytest

from tests.azureml.conftest import AzureProject
from tests.azureml.test_submit import told


def test_models(azure: AzureProject) -> None:
    done = azure.control(
        """
os.makedirs("net/layers")
open("net/layers/1.txt", "w").write("one")
open("net/2.txt", "w").write("two")
for number in (1, 2, 3):
    options = {"properties": {"p": "q"}, "model_framework": Model.Framework.CUSTOM}
    Model.register(ws, "net", "net", tags={"number": number}, **options)
Model.register(ws, "submit.py", "script")
path = Model(ws, "net", version=2).download("copies")
Model(ws, id="net:3").delete()
found = Model(ws, "net")
found.add_tags({"stage": "production"})
try:
    Model(ws, "nets")
except Exception as error:
    absent = f"{type(error).__name__}: {error}"
try:
    found.download("copies")
except Exception as error:
    taken = str(error)
try:
    found.download("/proc/nope")
except Exception as error:
    print(type(error).__name__, error)
print(json.dumps({
    "path": path, "files": sorted(os.listdir(path)), "id": found.id, "tags": found.tags, "framework": found.model_framework,
    "list": [m.id for m in Model.list(ws, "net")], "tagged": [m.id for m in Model.list(ws, tags=[["number", "1"]])],
    "latest": sorted(ws.models), "absent": absent, "taken": taken, "path again": Model.get_model_path("net", 1, _workspace=ws),
}))
"""
    )
    assert "UserErrorException model net:2 cannot be written to '/proc/nope': " in done.stdout
    found = told(done)
    assert (found["path"], found["files"], found["path again"]) == ("copies/net", ["2.txt", "layers"], "azureml-models/net/1/net")
    assert (found["id"], found["tags"], found["framework"]) == ("net:2", {"number": "2", "stage": "production"}, "Custom")
    assert (found["list"], found["tagged"], found["latest"]) == (["net:2", "net:1"], ["net:1"], ["net", "script"])
    assert str(found["absent"]).startswith("ModelNotFoundException: ModelNotFound: no model 'nets'")
    assert "is there already; exist_ok=True replaces it" in str(found["taken"])
    assert [model["id"] for model in azure.json("models", "net")] == ["net:1", "net:2"]


CHANGED = """
open("weights", "w").write("w")
model = Model.register(ws, "weights", "net", tags={"a": "1", "b": "2"}, properties={"p": "1"}, description="first")
same = Model(ws, "net")
model.add_properties({"q": "2", "p": "1"})
model.remove_tags(["a", "absent"])
kept = Model(ws, "net")
told = {"tags": kept.tags, "properties": kept.properties, "before": kept.description,
        "fits": len(Model.list(ws, properties=[["q", "2"]]))}
model.update(tags={"c": 3}, description="second")
for attempt in (lambda: model.add_properties({"q": "3", "r": "4"}), lambda: model.update(sample_input_dataset="x"),
                lambda: Model.deserialize(ws, {**model.serialize(), "id": "net:7"})):
    try:
        attempt()
    except Exception as error:
        print(type(error).__name__, error)
again = Model.deserialize(ws, json.loads(json.dumps(model.serialize())))
print(json.dumps({**told, "serialized": model.serialize(), "same": again.id}))
"""


def test_tags_properties_and_description_of_a_model_change(azure: AzureProject) -> None:
    done = azure.control(CHANGED)
    found = told(done)
    assert (found["tags"], found["properties"], found["before"]) == ({"b": "2"}, {"p": "1", "q": "2"}, "first")
    assert (found["fits"], found["same"]) == (1, "net:1")
    serialized = found["serialized"]
    assert isinstance(serialized, dict)
    expected = {"id": "net:1", "name": "net", "version": 1, "description": "second", "tags": {"c": "3"}}
    assert expected.items() <= serialized.items()
    assert serialized["properties"] == {"p": "1", "q": "2"}
    fixed, sample, absent = done.stdout.splitlines()[-4:-1]
    assert fixed.startswith("UserErrorException property 'q' of model net:1 is '2' and cannot be changed")
    assert sample.startswith("UserErrorException Model.update(sample_input_dataset='x') is not available without Azure")
    assert absent.startswith("ModelNotFoundException ModelNotFound: no model 'net' of version 7")
    assert absent.endswith("; it has net:1")


TOGETHER = """
import os
from azureml.core import Model, Run
run = Run.get_context()
ws = run.experiment.workspace
for number in range(5):
    found = [Model.get_model_path("net"), Model(ws, "net").download("copies", exist_ok=True), Model.get_model_path("one")]
    print("read", sum(len(open(os.path.join(path, name)).read()) for path in found[:2] for name in os.listdir(path)))
    assert open(found[2]).read() == "1"
    run.log_image("a plot", path="train.py")
    run.log_residuals("residuals", {"schema_type": "residuals", "schema_version": "1", "data": {}})
try:
    run.upload_file("one.txt", "train.py")
    print("uploaded")
except Exception as error:
    print("taken", error)
"""


@pytest.mark.needs("mpi")
def test_ranks_download_and_log_files_at_once(azure: AzureProject) -> None:
    """A model to one folder, which all read: none finds what another one is replacing. Of a file's name one rank is the first."""
    azure.train(TOGETHER)
    done = azure.control(
        """
os.makedirs("net")
for number in range(100):
    open(f"net/{number}", "w").write("7")
Model.register(ws, "net", "net")
Model.register(ws, "net/1", "one", tags={"a": 1})
open("net/1", "w").write("1")
Model.register(ws, "net/1", "one")
src = ScriptRunConfig("src", "train.py", compute_target=cluster, distributed_job_config=MpiConfiguration(2, 2))
run = experiment.submit(src)
run.wait_for_completion(show_output=True)
print(sorted(name for values in run.get_metrics(ranks="all").values() for name in values["a plot"] + values["residuals"]))
paths = [Model(ws, "one", version=1).download("here"), Model(ws, "one").download("here", exist_ok=True)]
print(paths, open(paths[0]).read(), os.listdir("here"))
"""
    )
    assert done.stdout.count("read 200\n") == 4 * 5
    ends = [f"{of}_{number}" for of in ("", "_rank1", "_rank2", "_rank3") for number in range(5)]
    files = [f"{name}{end}{suffix}" for name, suffix in (("a_plot", ".py"), ("residuals", ".json")) for end in ends]
    assert done.stdout.splitlines()[-2] == str(sorted(files))
    assert (done.stdout.count("uploaded\n"), done.stdout.count("taken run tests-")) == (1, 3)
    assert done.stdout.splitlines()[-1] == "['here/1', 'here/1'] 1 ['1']"
