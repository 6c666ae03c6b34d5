"""Settings of a job: what constructors and attributes take, and what they leave alone."""

from __future__ import annotations

import importlib.metadata

import pytest

from dtrain.azureml.environment import CondaDependencies, Environment
from dtrain.azureml.estimator import Estimator, TensorFlow
from dtrain.azureml.runconfig import MpiConfiguration, RunConfiguration, ScriptRunConfig


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
