"""What control scripts in the style of the SDK's public samples do beside submitting: environments, targets, what they print."""

from __future__ import annotations

import pytest

from tests.azureml.conftest import AzureProject
from tests.azureml.test_submit import told

ENVIRONMENT = """
from azureml.core.conda_dependencies import CondaDependencies
from azureml.core.runconfig import RunConfiguration
config = RunConfiguration()
config.auto_prepare_environment = True
config.environment.python.conda_dependencies = CondaDependencies.create(conda_packages=["numpy"], pip_packages=["click", "rich"])
config.environment.environment_variables = {"MESSAGE": "hello"}
text = config.environment.python.conda_dependencies.serialize_to_string()
path = config.environment.python.conda_dependencies.save_to_file(".", "env.yml")
again = Environment.from_conda_specification("again", path).python.conda_dependencies
run = experiment.submit(ScriptRunConfig("src", script="train.py", run_config=config))
run.wait_for_completion()
asked = run.get_environment()
def refused(call, *values):
    try:
        call(*values)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
print(json.dumps({
    "text": text, "again": [*again.conda_packages, *again.pip_packages], "variables": asked.environment_variables,
    "asked": [*asked.python.conda_dependencies.conda_packages, *asked.python.conda_dependencies.pip_packages],
    "no": [refused(setattr, config, "auto_prepare_environment", False), refused(experiment.start_logging().get_environment),
        refused(lambda: AmlCompute.provisioning_configuration("STANDARD_NC6", max_nodes="4")),
        refused(Workspace.from_config, "elsewhere.json")],
}))
"""


def test_environments_are_written_and_told(azure: AzureProject) -> None:
    azure.train("import os\nassert os.environ['MESSAGE'] == 'hello'")
    found = told(azure.control(ENVIRONMENT))
    assert found["text"] == "dependencies:\n- numpy\n- pip:\n  - click\n  - rich\n"
    assert found["again"] == found["asked"] == ["numpy", "click", "rich"]
    assert found["variables"] == {"MESSAGE": "hello"}
    preparing, own, nodes, config = (str(each) for each in found["no"])  # type: ignore[attr-defined]
    assert "auto_prepare_environment=False is not there" in preparing
    assert "has no environment of its own" in own
    assert nodes == "ComputeTargetException: max_nodes='4' is not a whole number of nodes"
    assert "there is no file or folder" in config


def test_a_registered_environment_comes_back_as_it_was(azure: AzureProject) -> None:
    """With the Python that it names, too: else what it has would be looked for in another one, and installed."""
    done = azure.control(
        """
mine = Environment("mine")
mine.python.user_managed_dependencies = True
mine.python.interpreter_path = sys.executable
mine.docker.base_image = "image:1"
mine.environment_variables = {"A": "b"}
def told(each):
    return [each.python.user_managed_dependencies, each.python.interpreter_path == sys.executable, each.docker.base_image,
        each.environment_variables, each.version]
versions = [mine.register(ws).version, mine.register(ws).version]
again, other = Environment.get(ws, "mine", version="1"), mine.clone("other")
mine.environment_variables["A"] = "c"
print(json.dumps([told(again), told(other), versions, mine.register(ws).version]))
"""
    )
    was = [True, True, "image:1", {"A": "b"}]
    assert told(done) == [[*was, "1"], [*was, None], ["1", "1"], "2"]


def test_a_target_that_was_named_by_hosts_stays_that_when_a_script_creates_it(azure: AzureProject) -> None:
    done = azure.dtrain("compute", "add", "cluster", "--hosts", "localhost:2")
    assert done.returncode == 0, done.stderr
    done = azure.control("print(json.dumps([cluster.max_nodes, cluster.vm_size]))")  # it is created where the script begins
    assert told(done) == [1, "hosts"]
    assert (
        "compute target cluster is hosts localhost:2, and stays so; `dtrain compute remove cluster` takes it away" in done.stdout
    )


@pytest.mark.needs("sklearn")
def test_an_estimator_of_scikit_learn(azure: AzureProject) -> None:
    azure.train(
        "import sys\nfrom sklearn.svm import SVC\nfrom azureml.core.run import Run\n"
        "run = Run.get_context()\nrun.log('args', ' '.join(sys.argv[1:]))\nopen('outputs/model.txt', 'w').write('model')"
    )
    done = azure.control(
        """
from azureml.train.sklearn import SKLearn
estimator = SKLearn("src", entry_script="train.py", script_params={"--penalty": 1.0}, compute_target=cluster,
    _enable_optimized_mode=False)
run = experiment.submit(estimator)
run.wait_for_completion()
model = run.register_model("svc", "outputs/model.txt")
try:
    SKLearn("src", entry_script="train.py", distributed_training=MpiConfiguration())
except Exception as error:
    refused = str(error)
print(json.dumps([run.get_metrics(), model.url.rpartition("/workspace/")[2], refused]))
"""
    )
    assert told(done) == [
        {"args": "--penalty 1.0"},
        "registry/models/svc/1.json",
        "SKLearn is of one process; use Estimator for a script that joins several by MPI",
    ]


def test_a_run_goes_on_from_another_ones_outputs_by_a_reference(azure: AzureProject) -> None:
    """By ``create_data_reference``, as text in the arguments; and as a copy, which leaves the first run's files alone."""
    azure.train(
        "import os, sys\nfolder = sys.argv[1] if len(sys.argv) > 1 else None\n"
        "count = int(open(folder + '/count').read()) if folder else 0\nopen('outputs/count', 'w').write(str(count + 1))\n"
        "if folder: open(folder + '/mine', 'w').write('')"
    )
    done = azure.control(
        """
from azureml.data.datapath import DataPathComputeBinding
def after(run, mode):
    place = run._get_outputs_datapath()
    reference = place.create_data_reference(datapath_compute_binding=DataPathComputeBinding(mode=mode))
    config = ScriptRunConfig("src", script="train.py", arguments=[str(reference)])
    config.run_config.data_references = {reference.data_reference_name: reference.to_config()}
    return submitted(config)
def submitted(config):
    run = experiment.submit(config)
    run.wait_for_completion()
    return run
first = submitted(ScriptRunConfig("src", script="train.py"))
second = after(first, "download")
files = first.get_file_names()
third = after(second, "mount")
third.download_file("outputs/count", "count")
print(json.dumps([open("count").read(), "outputs/mine" in files, "outputs/mine" in second.get_file_names()]))
"""
    )
    assert told(done) == ["3", False, True]
