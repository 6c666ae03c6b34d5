"""ChainerMN on two nodes of one process each, over MPI."""

from azureml.core import Experiment
from azureml.core.runconfig import MpiConfiguration
from azureml.train.dnn import Chainer
from common import cluster, workspace

ws = workspace()
estimator = Chainer(
    source_directory="./scripts",
    compute_target=cluster(ws),
    script_params={"--epochs": 5, "--communicator": "naive"},
    entry_script="chainermn_digits.py",
    node_count=2,
    distributed_training=MpiConfiguration(),
    pip_packages=["scikit-learn"],
)
run = Experiment(ws, name="chainer-mn").submit(estimator)
run.wait_for_completion(show_output=True)
print(run.get_metrics())
model = run.register_model("chainer-mn", model_path="outputs/model.npz", tags={"ranks": 2})
print(model.id)
