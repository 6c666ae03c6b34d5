"""The command ``dtrain``: one thin command a verb, each over one public function.

Data go to standard output, words about them to standard error.
"""

from dtrain.cli import azureml, jobs, machines, models, records
from dtrain.cli._main import main

__all__ = ["azureml", "jobs", "machines", "main", "models", "records"]
