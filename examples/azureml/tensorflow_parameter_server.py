"""TensorFlow with two workers and one parameter server."""

from azureml.core import Experiment
from azureml.core.runconfig import TensorflowConfiguration
from azureml.train.dnn import TensorFlow
from common import cluster, workspace

ws = workspace()
distribution = TensorflowConfiguration()
distribution.worker_count = 2
distribution.parameter_server_count = 1
estimator = TensorFlow(
    source_directory="./scripts",
    compute_target=cluster(ws),
    entry_script="parameter_server_digits.py",
    node_count=2,
    distributed_training=distribution,
    pip_packages=["scikit-learn"],
)
run = Experiment(ws, "ps-digits").submit(estimator)
run.wait_for_completion(show_output=True)
print(run.get_metrics(ranks="all"))
print(run.register_model("ps-digits", "outputs/train").id)
