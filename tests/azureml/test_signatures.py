"""The order of arguments: control scripts give them by place, too, as the SDK's documents list them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dtrain.azureml.compute import AmlCompute, ComputeTarget
from dtrain.azureml.datastore import DataReference, Datastore
from dtrain.azureml.environment import CondaDependencies, Environment
from dtrain.azureml.experiment import Experiment
from dtrain.azureml.model import Model
from dtrain.azureml.run import Run
from dtrain.azureml.runconfig import DockerConfiguration, MpiConfiguration, RunConfiguration, TensorflowConfiguration
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
