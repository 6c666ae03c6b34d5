"""Chainer on one node, by the Chainer estimator; its model is registered."""

from azureml.core import Experiment
from azureml.train.dnn import Chainer
from common import cluster, workspace

ws = workspace()
estimator = Chainer(
    source_directory="./scripts",
    script_params={"--epochs": 5, "--batchsize": 64, "--output_dir": "./outputs"},
    compute_target=cluster(ws),
    entry_script="chainer_digits.py",
    pip_packages=["numpy", "scikit-learn"],
)
run = Experiment(workspace=ws, name="chainer-digits").submit(estimator)
print(run)
run.wait_for_completion(show_output=True)
print(run.get_metrics())
model = run.register_model(model_name="chainer-digits", model_path="outputs/model.npz")
print(model.name, model.id, model.version, sep="\t")
