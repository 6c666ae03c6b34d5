"""Settings of a job: what constructors and attributes take, and what they leave alone."""

from __future__ import annotations

import importlib.metadata
import operator
from collections.abc import Callable
from pathlib import Path

import pytest

from dtrain.azureml.compute import ComputeTarget
from dtrain.azureml.environment import CondaDependencies, Environment
from dtrain.azureml.errors import NoSuchName, UserErrorException
from dtrain.azureml.estimator import Estimator, TensorFlow
from dtrain.azureml.experiment import Experiment
from dtrain.azureml.runconfig import MpiConfiguration, RunConfiguration, ScriptRunConfig
from dtrain.azureml.workspace import Workspace


def test_a_second_job_of_the_same_settings_has_nothing_of_the_first() -> None:
    environment, mpi, config = Environment("e"), MpiConfiguration(), RunConfiguration()
    first = Estimator(
        ".",
        entry_script="t.py",
        environment_definition=environment,
        environment_variables={"A": "1"},
        user_managed=True,
        process_count_per_node=2,
        distributed_training=mpi,
    )
    second = Estimator(".", entry_script="t.py", environment_definition=environment, distributed_training=mpi)
    assert [each.run_config.mpi.process_count_per_node for each in (first, second)] == [2, 1]
    assert [each.run_config.environment.environment_variables for each in (first, second)] == [{"A": "1"}, {}]
    assert [each.run_config.environment.python.user_managed_dependencies for each in (first, second)] == [True, False]
    spread = ScriptRunConfig(
        ".",
        "t.py",
        run_config=config,
        compute_target="cluster",
        environment=environment,
        distributed_job_config=MpiConfiguration(2, 3),
        max_run_duration_seconds=60,
    ).run_config
    alone = ScriptRunConfig(".", "t.py", run_config=config).run_config
    assert [(each.target, each.communicator, each.node_count) for each in (spread, alone)] == [
        ("cluster", "OpenMpi", 3),
        ("local", "None", 1),
    ]
    assert [(each.environment.name, each.max_run_duration_seconds) for each in (spread, alone)] == [("e", 60), ("default", None)]
    assert alone is config  # so what is set later counts


WRONG: dict[str, Callable[[], object]] = {
    r"MpiConfiguration\(\) has no argument 'proces_count_per_node' \(did you mean process_count_per_node\?\)": lambda: (
        MpiConfiguration(proces_count_per_node=2)  # type: ignore[call-arg]
    ),
    r"Environment\(\) has no argument 'nam' \(did you mean name\?\)": lambda: Environment(nam="x"),  # type: ignore[call-arg]
    r"ComputeTarget\(\) has no argument 'workspac' \(did you mean workspace\?\)": lambda: ComputeTarget(workspac=1, name="x"),
    r"RunConfiguration has no 'framwork' \(did you mean framework\?\)": lambda: setattr(RunConfiguration(), "framwork", "x"),
    "ScriptRunConfig has no 'node_count' itself; what is meant is run_config.node_count": lambda: setattr(
        ScriptRunConfig(".", "t.py"), "node_count", 2
    ),
    "ScriptRunConfig has no 'compute_target' itself; what is meant is run_config.target": lambda: (
        ScriptRunConfig(".", "t.py").compute_target
    ),
    "Estimator has no 'process_count_per_node' itself; what is meant is run_config.mpi.process_count": lambda: setattr(
        Estimator(".", entry_script="t.py"), "process_count_per_node", 2
    ),
    "Environment has no 'pip_packages' itself; what is meant is python.conda_dependencies.add_pip": lambda: setattr(
        Environment("e"), "pip_packages", ["x"]
    ),
    r"RunConfiguration\(\) has mpi=3, and takes a MpiConfiguration there": lambda: setattr(RunConfiguration(), "mpi", 3),
    r"ScriptRunConfig\(\) has run_config='x', and takes a RunConfig": lambda: ScriptRunConfig(".", "t.py", run_config="x"),
    r"data_references=\['x'\] is list, and has to be a dict": lambda: setattr(RunConfiguration(), "data_references", ["x"]),
}


@pytest.mark.parametrize("text", WRONG)
def test_a_misspelt_argument_and_an_attribute_of_another_object_are_told_the_right_one(text: str) -> None:
    with pytest.raises((TypeError, NoSuchName, UserErrorException), match=text):
        WRONG[text]()


def test_where_a_name_is_said_to_be_it_is() -> None:
    """Each place that ``_elsewhere`` tells of is an attribute, a method or an argument."""
    for made in (RunConfiguration(), ScriptRunConfig(".", "t.py"), Environment("e")):
        for place in made._elsewhere.values():
            if " " not in place and "=" not in place:
                assert operator.attrgetter(place.removesuffix("()"))(made) is not made


def test_text_is_taken_apart_also_where_it_is_set_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("t.py").write_text("import sys; assert sys.argv[1:] == ['--lr', '0.1']")
    config = ScriptRunConfig(".", "t.py")
    config.arguments = "--lr 0.1"  # type: ignore[assignment]
    run = Experiment(Workspace.create("mine", show_output=False), "tests").submit(config)
    assert run.wait_for_completion()["runDefinition"]["arguments"] == ["--lr", "0.1"]


def test_one_text_is_a_list_of_one() -> None:
    made = Estimator(".", entry_script="t.py", pip_packages="numpy", conda_packages="click")
    assert (list(made.conda_dependencies.pip_packages), list(made.conda_dependencies.conda_packages)) == (["numpy"], ["click"])
    created = CondaDependencies.create(pip_packages="numpy", conda_packages="click")
    assert (list(created.pip_packages), list(created.conda_packages)) == (["numpy"], ["click"])


@pytest.mark.needs("tensorflow")
def test_a_framework_under_the_name_of_its_build_is_told_with_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    """tensorflow-cpu, as a rule."""
    version = importlib.metadata.version(importlib.metadata.packages_distributions()["tensorflow"][0])
    assert TensorFlow.get_supported_versions() == [version]
    TensorFlow(".", entry_script="t.py", framework_version="1.13")
    assert f"framework_version='1.13' was asked for; the job runs with tensorflow {version}" in capsys.readouterr().err
