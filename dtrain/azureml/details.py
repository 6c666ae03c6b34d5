"""What a run tells of how it was submitted and how it goes, put together from its records."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

from dtrain.azureml import files, records, state
from dtrain.azureml.datastore import VARIABLE
from dtrain.azureml.environment import Environment
from dtrain.azureml.errors import UserErrorException
from dtrain.errors import did_you_mean
from dtrain.files import read_json
from dtrain.layout import RunLayout


class _Definition(dict[str, Any]):
    """A run definition, whose keys older versions of the SDK wrote with a capital: ``["Arguments"]`` is ``["arguments"]``."""

    def __missing__(self, key: str) -> Any:
        known = {name[:1].upper() + name[1:]: name for name in self}
        if key not in known:
            raise KeyError(f"{key!r} is not in the run definition{did_you_mean(key, self)}; it has {', '.join(self)}")
        return self[known[key]]


def details_of(run: RunLayout) -> dict[str, Any]:
    """What was submitted, its state and times, and where its logs are; with the SDK's keys."""
    status, submitted = state.status_of(run), records.read_submitted(run)
    if python := read_json(run.spec).get("python"):  # of an environment that was made after the submit, say
        submitted.definition["environment"]["python"]["interpreterPath"] = python
    details: dict[str, Any] = {
        "runId": run.id,
        "target": submitted.target,
        "status": state.told_status(run),
        "startTimeUtc": _utc(status.started),
        "endTimeUtc": None if status.ended is None else _utc(status.ended),
        "properties": {"ContentSnapshotId": run.id, **records.properties(run)},
        "inputDatasets": [],
        "outputDatasets": [],
        "runDefinition": _Definition(submitted.definition),
        "logFiles": {name: str(path) for name, path in files.log_files(run).items()},
        "runFolder": str(run.root),
        "warnings": [{"message": event["text"]} for event in records.events(run, "warning")],
    }
    asked, codes = records.events(run, "fail"), records.events(run, "error_code")
    if asked or status.state == "failed":
        message = status.cause if status.state == "failed" else asked[0]["text"]
        details["error"] = {"error": {"code": codes[0]["text"] if codes else "UserError", "message": message}}
    return details


def environment_of(run: RunLayout) -> Environment:
    """The environment that a job was submitted with. Raises UserErrorException for a run that is no job."""
    asked = records.read_submitted(run).definition.get("environment")
    if asked is None:
        raise UserErrorException(f"run {run.id} is of this process, and has no environment of its own")
    return Environment._of(asked["name"], {**asked["python"], "environment_variables": asked["environmentVariables"]})


def inputs_of(run: RunLayout) -> dict[str, str]:
    """The paths that a job was given of datasets and datastores, by their names."""
    prefix = VARIABLE.removeprefix("$")
    variables: dict[str, str] = read_json(run.spec).get("environment") or {}
    return {name.removeprefix(prefix): path for name, path in variables.items() if name.startswith(prefix)}


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
