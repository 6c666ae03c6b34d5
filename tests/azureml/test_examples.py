"""examples/azureml as a user runs them: each ends Completed, and its model is in the registry."""

from __future__ import annotations

import re
import shutil

import pytest

from tests.azureml.conftest import ROOT, AzureProject

# Control script: what it needs, and what is in the registry then.
EXAMPLES = {
    "chainer_one_node": (("chainer",), "chainer-digits"),
    "chainer_mpi": (("chainer", "mpi"), "chainer-mn"),
    "tensorflow_single": (("tensorflow",), "tensorflow-digits"),
    "tensorflow_horovod": (("tensorflow", "horovod", "mpi"), "horovod-digits"),
    "tensorflow_parameter_server": (("tensorflow",), "ps-digits"),
    "register_and_download": ((), "table"),
    "hyperdrive": (("chainer",), "hyperdrive-digits"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.needs("sklearn", *needs)) for name, (needs, _) in EXAMPLES.items()]
)
def test_example(azure: AzureProject, name: str) -> None:
    shutil.copytree(ROOT / "examples" / "azureml", azure.folder, dirs_exist_ok=True)
    done = azure.dtrain("azureml", f"{name}.py", timeout=110)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert [model["id"] for model in azure.json("models")] == [f"{EXAMPLES[name][1]}:1"]
    runs = azure.json("runs")
    ended = {run["state"] for run in runs}
    # Whether the sweep's policy ends one of its runs is chance: of two that go on at once one is ahead for a moment.
    assert "completed" in ended
    assert ended <= {"completed", "canceled"} if name == "hyperdrive" else ended == {"completed"}
    metrics = {rank["rank"]: rank["metrics"] for run in runs for rank in azure.json("show", run["id"])["ranks"]}
    if name == "tensorflow_single":
        assert metrics[0]["first epoch"] == 3  # the second run went on from the first one's checkpoint
    if name == "chainer_mpi":
        assert "not among the run's files: result/" in done.stdout
        assert metrics[0]["processes"] == 2
    if name == "tensorflow_horovod":
        assert metrics[0]["size"] == 2
    if name == "tensorflow_parameter_server":
        assert "environment cloud task ps 0" in done.stdout
        assert {rank: "accuracy" in values for rank, values in metrics.items()} == {0: True, 1: True, 2: False}


@pytest.mark.needs("chainer", "mpi", "sklearn")
def test_the_five_minutes_of_the_document(azure: AzureProject) -> None:
    """Its script, as it stands there."""
    (script,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "azureml.md").read_text(), re.DOTALL)
    shutil.copytree(ROOT / "examples" / "azureml" / "scripts", azure.folder / "scripts")
    azure.control(script, begin="")
    assert [model["id"] for model in azure.json("models")] == ["digits:1"]


def test_every_example_is_run() -> None:
    scripts = {path.stem for path in (ROOT / "examples" / "azureml").glob("*.py")} - {"common"}
    assert scripts == set(EXAMPLES)
