"""Registers a local file, finds the model again by its name and tags, and downloads it."""

import os

from azureml.core.model import Model
from common import workspace

ws = workspace()
with open("table.csv", "w") as file:
    file.write("digit,count\n0,178\n")
model = Model.register(
    ws, model_path="table.csv", model_name="table", tags={"kind": "csv"}, description="How often a digit occurs."
)
print("registered", model.id)
for each in Model.list(ws, tags=[["kind", "csv"]]):
    print(each.name, each.version, each.tags, each.description)
path = Model(ws, "table").download(target_dir="downloaded", exist_ok=True)
print("downloaded to", path, os.path.getsize(path), "bytes")
print("model path", Model.get_model_path("table", _workspace=ws))
