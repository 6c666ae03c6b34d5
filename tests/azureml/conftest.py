"""A user's folder with control scripts in it, run as a user runs them: in processes of their own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from dtrain.layout import Workspace
from dtrain.status import read_status
from tests.console.conftest import ROOT, Project, wait_until, watched

__all__ = ["ROOT", "wait_until"]

BEGIN = """
import json, os, sys
from azureml.core import Experiment, ScriptRunConfig, Workspace, Run, Model, Environment
from azureml.core.compute import AmlCompute, ComputeTarget
from azureml.core.runconfig import MpiConfiguration, TensorflowConfiguration
from azureml.train.estimator import Estimator
ws = Workspace.from_config()
cluster = ComputeTarget.create(ws, "cluster", AmlCompute.provisioning_configuration("STANDARD_NC6", max_nodes=4))
experiment = Experiment(ws, "tests")
"""


class AzureProject(Project):
    def control(self, text: str, *args: str, begin: str = BEGIN, timeout: float = 100) -> subprocess.CompletedProcess[str]:
        """Run a control script to its end, which is to be a good one."""
        done = self.try_control(text, *args, begin=begin, timeout=timeout)
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    def try_control(self, text: str, *args: str, begin: str = BEGIN, timeout: float = 100) -> subprocess.CompletedProcess[str]:
        self.script(begin + text, "submit.py")
        return self.dtrain("azureml", *args, "submit.py", timeout=timeout)

    def train(self, text: str, name: str = "train.py") -> None:
        (self.folder / "src").mkdir(exist_ok=True)
        (self.folder / "src" / name).write_text(text)

    def supervisors(self) -> list[psutil.Process]:
        """Of the project's jobs, those that still run: they outlive their control scripts by design."""
        runs = Workspace(self.folder / "workspace").list_runs()
        records = [read_status(run).supervisor for run in runs if run.status.exists()]
        return [process for record in records if record is not None and (process := record.find()) is not None]


@pytest.fixture
def azure(tmp_path: Path) -> Iterator[AzureProject]:
    """A project with a workspace; when the test ends its jobs have ended, or are about to, and no process of theirs is left."""
    project = AzureProject(tmp_path)
    done = project.dtrain("azureml", "init", "--name", "mine")
    assert done.returncode == 0, done.stderr
    for step in watched(project):
        yield step  # type: ignore[misc]
        _, left = psutil.wait_procs(project.supervisors(), timeout=30)
        for process in left:
            process.terminate()
        psutil.wait_procs(left, timeout=30)
    assert not left, f"jobs of the test go on, supervised by {left}"


PYTHON = sys.executable
