"""Hyperparameters of the Chainer example, tried two runs at once; the best run's model is registered."""

from azureml.core import Experiment
from azureml.train.dnn import Chainer
from azureml.train.hyperdrive import (
    BanditPolicy,
    HyperDriveConfig,
    PrimaryMetricGoal,
    RandomParameterSampling,
    choice,
)
from common import cluster, workspace

ws = workspace()
estimator = Chainer(
    source_directory="./scripts",
    script_params={"--output_dir": "./outputs"},
    compute_target=cluster(ws),
    entry_script="chainer_digits.py",
)
config = HyperDriveConfig(
    estimator=estimator,
    hyperparameter_sampling=RandomParameterSampling({"--batchsize": choice(32, 64, 128), "--epochs": choice(2, 4)}),
    policy=BanditPolicy(evaluation_interval=1, slack_factor=0.9, delay_evaluation=2),
    primary_metric_name="Accuracy",
    primary_metric_goal=PrimaryMetricGoal.MAXIMIZE,
    max_total_runs=4,
    max_concurrent_runs=2,
)
run = Experiment(ws, "hyperdrive").submit(config)
run.wait_for_completion(show_output=True)
for child in run.get_children_sorted_by_primary_metric():
    print(child)
best = run.get_best_run_by_primary_metric()
print("best:", best.get_details()["runDefinition"]["arguments"])
print(best.register_model("hyperdrive-digits", model_path="outputs/model.npz").id)
