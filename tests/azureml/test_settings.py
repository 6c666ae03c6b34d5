"""Settings of a job: what constructors and attributes take, and what they leave alone."""

from __future__ import annotations

from dtrain.azureml.environment import Environment
from dtrain.azureml.estimator import Estimator
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
