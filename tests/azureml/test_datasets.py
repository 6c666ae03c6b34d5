"""``Dataset.File``: folders of a datastore that jobs are given by name."""

from __future__ import annotations

from tests.azureml.conftest import AzureProject
from tests.azureml.test_submit import told

TRAIN = """
import os, sys
from azureml.core import Run
run = Run.get_context()
mounted, copied, single = sys.argv[2::2]
assert run.input_datasets["numbers"] == mounted and run.input_datasets["copy"] == copied
run.log("read", " ".join(open(path).read() for path in (mounted + "/deep/b.txt", copied + "/a.txt", single + "/a.txt")))
open(os.path.join(copied, "a.txt"), "w").write("changed")
"""


def test_a_job_reads_registered_folders(azure: AzureProject) -> None:
    (azure.folder / "local" / "deep").mkdir(parents=True)
    (azure.folder / "local" / "a.txt").write_text("1")
    (azure.folder / "local" / "deep" / "b.txt").write_text("2")
    azure.train(TRAIN)
    done = azure.control(
        """
from azureml.core import Dataset
store = ws.get_default_datastore()
uploaded = Dataset.File.upload_directory("local", (store, "numbers"), show_progress=False)
dataset = Dataset.File.from_files(path=[(store, "numbers/**")])
first = dataset.register(workspace=ws, name="my numbers", description="two", create_new_version=True)
same = uploaded.register(ws, "my numbers")
deep = Dataset.File.from_files(store.path("numbers/deep")).register(ws, "my numbers", create_new_version=True)
found = Dataset.get_by_name(ws, "my numbers", version=1)
params = {
    "--mounted": found.as_named_input("numbers").as_mount(),
    "--copied": found.as_named_input("copy").as_download(),
    "--single": dataset.as_mount(),
}
arguments = [each for pair in params.items() for each in pair]
read = []
for config in (Estimator("src", entry_script="train.py", script_params=params), ScriptRunConfig("src", "train.py", arguments)):
    run = experiment.submit(config)
    run.wait_for_completion()
    read.append(run.get_metrics()["read"])
print(json.dumps({
    "read": read, "paths": [dataset.to_path(), deep.to_path()], "files": sorted(dataset.download("down")),
    "versions": [first.version, same.version, deep.version, found.description, ws.datasets["my numbers"].id],
    "unchanged": open("down/a.txt").read(),
}))
"""
    )
    found = told(done)
    assert found["read"] == ["2 1 1", "2 1 1"]
    assert found["paths"] == [["/a.txt", "/deep/b.txt"], ["/b.txt"]]
    assert found["files"] == ["down/a.txt", "down/deep/b.txt"]
    assert found["versions"] == [1, 1, 2, "two", "my numbers:2"]
    assert found["unchanged"] == "1"


def test_what_no_dataset_can_be_says_what_to_do(azure: AzureProject) -> None:
    azure.train("")
    done = azure.control(
        """
from azureml.core.dataset import Dataset
store = ws.get_default_datastore()
open("a.csv", "w").write("a")
store.upload_files(["a.csv"])
os.makedirs("b/deep")
for name in ("b/b.csv", "b/deep/c.csv"): open(name, "w").close()
store.upload("b", "b")
dataset = Dataset.File.from_files((store, "a.csv"))
dataset.register(ws, "one")
def refused(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
print(json.dumps([
    refused(lambda: Dataset.File.from_files(path=["https://example.com/a.gz"])),
    refused(lambda: Dataset.File.from_files((store, "b/?.csv"))),
    refused(lambda: Dataset.File.from_files((store, "absent"))),
    refused(lambda: Dataset.Tabular.from_delimited_files(path=(store, "a.csv"))),
    refused(lambda: Dataset.get_by_name(ws, "on")),
    refused(lambda: Dataset.File.from_files(store).register(ws, "one")),
    refused(lambda: experiment.submit(ScriptRunConfig("src", "train.py", [dataset.as_named_input("x")]))),
    refused(lambda: Estimator("src", entry_script="train.py", inputs=[dataset.as_named_input("x")])),
    [Dataset.File.from_files((store, path)).to_path() for path in ("b/**/*.csv", "b/deep/*.csv", "b/**")], dataset.to_path(),
]))
"""
    )
    *found, of_patterns, paths = told(done)
    assert of_patterns == [["/b.csv", "/deep/c.csv"], ["/c.csv"], ["/b.csv", "/deep/c.csv"]]
    assert paths == ["/a.csv"]
    for text, words in zip(
        found,
        (
            "those of web addresses have to be downloaded first",
            "path 'b/?.csv' leaves 'b/deep/c.csv' of its folder out",
            "datastore 'workspaceblobstore' has no file in 'absent'",
            "Dataset.Tabular is not available without Azure: give the job the file by Dataset.File",
            "no dataset 'on' (did you mean one?)",
            "create_new_version=True registers this one, too",
            "is no path yet: say whether by as_mount() or by as_download()",
            "give references: datastore.path('...').as_mount(), or a dataset's",
        ),
        strict=True,
    ):
        assert words in text, text
