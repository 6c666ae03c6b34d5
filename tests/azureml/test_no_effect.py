"""An option that has no effect here is said, or refused; none is passed over in silence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dtrain.azureml.compute import AmlCompute, ComputeTarget
from dtrain.azureml.datastore import DataReferenceConfiguration
from dtrain.azureml.environment import CondaDependencies, Environment
from dtrain.azureml.errors import UserErrorException
from dtrain.azureml.estimator import Estimator
from dtrain.azureml.experiment import Experiment
from dtrain.azureml.run import Run
from dtrain.azureml.stores import FolderStore, list_files
from dtrain.azureml.workspace import Workspace


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """In a folder that holds a requirements file."""
    monkeypatch.chdir(tmp_path)
    Path("requirements.txt").write_text("numpy")
    return Workspace.create("mine", show_output=False)


SAID: dict[str, Callable[[Workspace], Any]] = {
    "path_on_compute='data' is not used": lambda ws: ws.get_default_datastore().path("x").as_download("data"),
    "path_on_compute='/data' is not used": lambda ws: DataReferenceConfiguration(
        "workspaceblobstore", "download", "x", "/data"
    )._reference(ws, "x"),
    "channel 'conda-forge' is not used": lambda ws: CondaDependencies().add_channel("conda-forge"),
    "pip_version='20.1' is not used": lambda ws: Environment.from_pip_requirements("e", "requirements.txt", "20.1"),
    "Workspace.create(tags={'team': 'x'}) is not kept": lambda ws: Workspace.create("mine", exist_ok=True, tags={"team": "x"}),
    "Workspace.create(sku='enterprise') is not kept": lambda ws: Workspace.create("mine", exist_ok=True, sku="enterprise"),
    "pip_packages=['numpy'] is not used: environment_definition=": lambda ws: Estimator(
        ".", entry_script="t.py", environment_definition=Environment("e"), pip_packages=["numpy"]
    ),
}


@pytest.mark.parametrize("text", SAID)
def test_what_has_no_effect_is_said(workspace: Workspace, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    SAID[text](workspace)
    assert f"dtrain: {text}" in capsys.readouterr().err


def test_what_is_asked_for_is_what_is_told(workspace: Workspace) -> None:
    """Of a compute target; and a list of artifacts, which there is none of, is refused."""
    asked = AmlCompute.provisioning_configuration("STANDARD_NC6", vm_priority="lowpriority", max_nodes=2)
    status = ComputeTarget.create(workspace, "cluster", asked).get_status()
    assert status.serialize()["vmPriority"] == "LowPriority"
    assert status.serialize()["nodeStateCounts"] == status.node_state_counts
    assert (status.node_state_counts["idleNodeCount"], status.errors) == (2, None)
    run = Experiment(workspace, "tests").start_logging()
    with pytest.raises(UserErrorException, match="return_artifacts=True is not available"):
        run.upload_files(["a"], ["requirements.txt"], return_artifacts=True)
    run.complete()


@pytest.mark.parametrize(("end", "state"), [("complete", "Completed"), ("fail", "Failed"), ("cancel", "Canceled")])
def test_what_is_logged_to_a_run_that_is_over_is_said(
    workspace: Workspace, capsys: pytest.CaptureFixture[str], end: str, state: str
) -> None:
    """Once, and recorded; also by another object of the same run."""
    experiment = Experiment(workspace, "tests")
    run = experiment.start_logging()
    run.log("before", 1)
    getattr(run, end)()
    assert capsys.readouterr().err == ""
    run.log("after", 2)
    run.log("after", 3)
    again = Run(experiment, run.id)
    again.log_row("row", x=1)
    said = f"dtrain: run {run.id} is {state} already; what is logged to it now is recorded all the same\n"
    assert capsys.readouterr().err == 2 * said
    assert run.get_metrics() == {"before": 1, "after": [2, 3], "row": {"x": 1}}


def test_a_place_that_is_not_there_is_said(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    """A mount of a path without files, which may be meant for the job to write to; a path to resume from, which cannot be."""
    Path("train.py").write_text("import sys; assert len(sys.argv) == 3")
    experiment = Experiment(workspace, "tests")
    mount = workspace.get_default_datastore().path("tpyo").as_mount()
    experiment.submit(Estimator(".", entry_script="train.py", script_params={"--data": mount})).wait_for_completion()
    said = "dtrain: datastore 'workspaceblobstore' has no 'tpyo': the job is given a new, empty folder of that name"
    assert said in capsys.readouterr().err
    with pytest.raises(UserErrorException, match="resume_from='nowhere': there is no file or folder"):
        experiment.submit(Estimator(".", entry_script="train.py", resume_from="nowhere"))
    assert len(list(experiment.get_runs())) == 1


def test_links_that_lead_nowhere_are_no_files_of_a_store(tmp_path: Path) -> None:
    """A job may leave one in a folder that is mounted."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("nowhere")
    assert list(list_files(tmp_path)) == FolderStore(tmp_path).names() == ["file"]
