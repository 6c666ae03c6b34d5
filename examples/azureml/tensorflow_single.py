"""TensorFlow on this machine, by a ScriptRunConfig with an environment; a second run resumes from the first one's checkpoint."""

from azureml.core import Environment, Experiment, ScriptRunConfig
from azureml.core.conda_dependencies import CondaDependencies
from common import workspace

ws = workspace()
environment = Environment("digits")
environment.python.conda_dependencies = CondaDependencies.create(pip_packages=["tensorflow", "scikit-learn", "azureml-defaults"])
environment.environment_variables = {"TF_CPP_MIN_LOG_LEVEL": "2"}
experiment = Experiment(ws, "tensorflow-digits")


def configuration(**options):
    return ScriptRunConfig(
        source_directory="./scripts",
        script="tensorflow_digits.py",
        arguments=["--epochs", 2],
        compute_target="local",
        environment=environment,
        **options,
    )


first = experiment.submit(configuration())
first.wait_for_completion(show_output=True)
second = experiment.submit(configuration(resume_from=first))
second.wait_for_completion(show_output=True)
print(second.get_metrics())
model = second.register_model("tensorflow-digits", "outputs/model", model_framework="TensorFlow")
print(model.id)
