"""TensorFlow over Horovod, on two nodes of one process each."""

from azureml.core import Experiment
from azureml.core.runconfig import MpiConfiguration
from azureml.train.dnn import TensorFlow
from common import cluster, workspace

ws = workspace()
estimator = TensorFlow(
    source_directory="./scripts",
    compute_target=cluster(ws),
    script_params={"--steps": 40},
    entry_script="horovod_digits.py",
    node_count=2,
    process_count_per_node=1,
    distributed_training=MpiConfiguration(),
    pip_packages=["scikit-learn"],
)
run = Experiment(ws, "horovod-digits").submit(estimator)
run.wait_for_completion(show_output=True)
print(run.get_metrics())
print(run.register_model("horovod-digits", "outputs/weights.npy").id)
