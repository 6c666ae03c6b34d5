"""The order of arguments: control scripts give them by place, too, as the SDK's documents list them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dtrain.azureml.compute import AmlCompute, ComputeTarget
from dtrain.azureml.dataset import Dataset
from dtrain.azureml.datastore import DataReference, Datastore
from dtrain.azureml.environment import CondaDependencies, Environment
from dtrain.azureml.errors import UserErrorException
from dtrain.azureml.estimator import Estimator
from dtrain.azureml.experiment import Experiment
from dtrain.azureml.hyperdrive import HyperDriveConfig, PrimaryMetricGoal
from dtrain.azureml.model import Model
from dtrain.azureml.parameters import GridParameterSampling, choice, qnormal, quniform
from dtrain.azureml.policies import MedianStoppingPolicy
from dtrain.azureml.run import Run
from dtrain.azureml.runconfig import (
    DockerConfiguration,
    MpiConfiguration,
    RunConfiguration,
    ScriptRunConfig,
    TensorflowConfiguration,
)
from dtrain.azureml.workspace import Workspace

ORDER: dict[Callable[..., Any], str] = {
    AmlCompute.provisioning_configuration: "vm_size vm_priority min_nodes max_nodes",
    ComputeTarget.create: "workspace name provisioning_configuration",
    CondaDependencies.create: "pip_indexurl pip_packages conda_packages python_version pin_sdk_version",
    DataReference: "datastore data_reference_name path_on_datastore mode path_on_compute overwrite",
    Datastore.download: "self target_path prefix overwrite show_progress",
    Datastore.upload: "self src_dir target_path overwrite show_progress",
    Datastore.upload_files: "self files relative_root target_path overwrite show_progress",
    DockerConfiguration: "use_docker shared_volumes arguments shm_size",
    Environment.from_conda_specification: "name file_path",
    Environment.from_pip_requirements: "name file_path pip_version",
    Environment.get: "workspace name version label",
    Experiment.get_runs: "self type tags properties include_children",
    Experiment.submit: "self config tags",
    Model: "workspace name id tags",
    Model.download: "self target_dir exist_ok exists_ok",
    Model.get_model_path: "model_name version",
    Model.list: "workspace name tags properties run_id latest",
    Model.register: "workspace model_path model_name tags properties",
    MpiConfiguration: "process_count_per_node node_count",
    Run.child_run: "self name run_id outputs",
    Run.create_children: "self count tag_key tag_values",
    Run.download_file: "self name output_file_path",
    Run.download_files: "self prefix output_directory output_paths batch_size append_prefix timeout_seconds",
    Run.get_children: "self recursive tags properties type status",
    Run.log: "self name value description",
    Run.log_image: "self name path plot description",
    Run.register_model: "self model_name model_path tags properties",
    Run.upload_file: "self name path_or_stream datastore_name",
    Run.upload_files: "self names paths return_artifacts timeout_seconds",
    Run.wait_for_completion: "self show_output wait_post_processing raise_on_error",
    RunConfiguration: "script arguments framework communicator conda_dependencies",
    TensorflowConfiguration: "worker_count parameter_server_count",
    Workspace: "subscription_id resource_group workspace_name auth",
    Workspace.create: "name auth subscription_id resource_group location",
    Workspace.get: "name auth subscription_id resource_group",
}


@pytest.mark.parametrize("function", ORDER, ids=lambda function: function.__qualname__)
def test_arguments_by_place_are_those_of_the_sdk(function: Callable[..., Any]) -> None:
    order = ORDER[function].split()
    parameters = [name for name, each in inspect.signature(function).parameters.items() if each.kind != each.KEYWORD_ONLY]
    assert parameters[: len(order)] == order


def test_what_is_given_by_place_arrives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    workspace = Workspace.create("mine", None, "a-subscription", "a-group", "westeurope", show_output=False)
    details = workspace.get_details()
    assert [details[key] for key in ("subscription_id", "resource_group", "location")] == [
        "a-subscription",
        "a-group",
        "westeurope",
    ]
    dependencies = CondaDependencies.create(None, ["click"], ["numpy"])
    assert ([*dependencies.pip_packages], [*dependencies.conda_packages]) == (["click"], ["numpy"])
    target = ComputeTarget.create(workspace, "cluster", AmlCompute.provisioning_configuration("STANDARD_D2", "dedicated", 0, 3))
    assert (target.vm_size, target.max_nodes) == ("STANDARD_D2", 3)
    Path("weights").write_text("")
    model = Model.register(workspace, "weights", "net", {"stage": "test"}, {"kind": "toy"})
    assert (model.tags, model.properties) == ({"stage": "test"}, {"kind": "toy"})
    again = model.run.register_model("net", "outputs/weights", {"stage": "again"}, {"kind": "toy"})
    assert (again.id, again.tags, again.properties) == ("net:2", {"stage": "again"}, {"kind": "toy"})
    assert [each.id for each in Model.list(workspace, "net", None, ["kind"], None, True)] == ["net:2"]
    Path("weights").unlink()
    assert Path(again.download(None)) == Path("weights")


NEEDED: dict[str, Callable[[Workspace, Run], object]] = {
    r"Model\.list\(\) has workspace=None, and takes a Workspace": lambda ws, run: Model.list(None),
    r"Model\.register\(\) has model_path=None": lambda ws, run: Model.register(ws, None, "net"),
    r"Run\.list\(\) has experiment=None, and takes an Experiment": lambda ws, run: Run.list(None),
    r"Run\.get\(\) has run_id=None": lambda ws, run: Run.get(ws, None),
    r"Experiment\.list\(\) has workspace=None": lambda ws, run: Experiment.list(None),
    r"ComputeTarget\.list\(\) has workspace='mine', and takes a Workspace": lambda ws, run: ComputeTarget.list("mine"),
    r"ComputeTarget\.create\(\) has name=None": lambda ws, run: ComputeTarget.create(
        ws, None, AmlCompute.provisioning_configuration()
    ),
    r"Dataset\.get_all\(\) has workspace=None": lambda ws, run: Dataset.get_all(None),
    r"Dataset\.get_by_name\(\) has name=None": lambda ws, run: Dataset.get_by_name(ws, None),
    r"Environment\.get\(\) has name=None": lambda ws, run: Environment.get(ws, None),
    r"Environment\.register\(\) has workspace=None": lambda ws, run: Environment("e").register(None),
    r"Workspace\.create\(\) has name=None": lambda ws, run: Workspace.create(None),
    r"Workspace\.get_run\(\) has run_id=None": lambda ws, run: ws.get_run(None),
    r"Datastore\.upload\(\) has src_dir=None": lambda ws, run: ws.get_default_datastore().upload(None),
    r"Datastore\.download\(\) has target_path=None": lambda ws, run: ws.get_default_datastore().download(None),
    r"Run\.download_file\(\) has name=None": lambda ws, run: run.download_file(None),
    r"Run\.upload_file\(\) has path_or_stream=None": lambda ws, run: run.upload_file("x", None),
    "path=3 is int, and has to be a path": lambda ws, run: Workspace.from_config(3),
    "path_or_stream=3 is no path": lambda ws, run: run.upload_file("x", 3),
    r"Run\.upload_files\(\) has names=None": lambda ws, run: run.upload_files(None, None),
    r"Run\.register_model\(\) has model_name=None": lambda ws, run: run.register_model(None),
    r"Run\.log\(\) has name=None": lambda ws, run: run.log(None, 1),
    r"Run\.tag\(\) has key=None": lambda ws, run: run.tag(None),
    r"HyperDriveConfig\(\) has primary_metric_name=''": lambda ws, run: HyperDriveConfig(
        GridParameterSampling({"--lr": choice(1)}), "", PrimaryMetricGoal.MAXIMIZE, 1, estimator=Estimator(entry_script="t.py")
    ),
}
MISSPELT: dict[str, Callable[[Workspace, Run], object]] = {
    r"^Run\.log\(\) has no argument 'nam' \(did you mean name\?\)": lambda ws, run: run.log(nam="x", value=1),
    r"^Run\.log\(\) needs value; it has name, value": lambda ws, run: run.log("x"),
    r"^Run\.log_row\(\) needs name": lambda ws, run: run.log_row(loss=1),
    r"^Run\.child_run\(\) has no argument 'nam'": lambda ws, run: run.child_run(nam="x"),
    r"^Datastore\.upload\(\) has no argument 'src_dri' \(did you mean src_dir\?\)": lambda ws, run: (
        ws.get_default_datastore().upload(src_dri=".")
    ),
    r"^Experiment\.get_runs\(\) has no argument 'stat'": lambda ws, run: run.experiment.get_runs(stat="x"),
    r"^Model\.register\(\) has no argument 'model_pth' \(did you mean model_path\?\)": lambda ws, run: Model.register(
        ws, model_pth="w", model_name="net"
    ),
    r"^Estimator\(\) has no argument 'source_direcory' \(did you mean source_directory\?\)": lambda ws, run: Estimator(
        source_direcory=".", entry_script="t.py"
    ),
    r"^ScriptRunConfig\(\) has no argument 'source_direcory' \(did you mean source_directory\?\)": lambda ws, run: (
        ScriptRunConfig(source_direcory=".", script="t.py")
    ),
    r"^Run\.register_model\(\) has no argument 'model_pth' \(did you mean model_path\?\); it has model_name, model_path, tags": (
        lambda ws, run: run.register_model("net", model_pth="w")
    ),
    r"^MedianStoppingPolicy\(\) has no argument 'delay'": lambda ws, run: MedianStoppingPolicy(delay=1),
    r"^qnormal\(mu=0, sigma=1, q=None\): give numbers": lambda ws, run: qnormal(0, 1, None),
    r"^quniform\(min_value=2": lambda ws, run: quniform(2, 1, 0.5),
}


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Workspace, Run]]:
    """A workspace, and a run that goes on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("mine"))
        workspace = Workspace.create("mine", show_output=False)
        run = Experiment(workspace, "tests").start_logging(outputs=False)
        yield workspace, run
        run.complete()


@pytest.mark.parametrize("text", [*NEEDED, *MISSPELT])
def test_what_is_needed_and_a_misspelt_name_are_told_before_anything_is_done(text: str, mine: tuple[Workspace, Run]) -> None:
    with pytest.raises(UserErrorException if text in NEEDED else (TypeError, UserErrorException), match=text):
        (NEEDED | MISSPELT)[text](*mine)
