"""Environments that are registered: every version is kept, whole, whoever else registers one at the same time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dtrain.azureml.environment import Environment
from dtrain.azureml.errors import UserErrorException
from dtrain.azureml.workspace import Workspace


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    monkeypatch.chdir(tmp_path)
    return Workspace.create("mine", show_output=False)


def test_an_environment_comes_back_as_it_was_registered(workspace: Workspace) -> None:
    environment = Environment("e")
    environment.python.user_managed_dependencies, environment.python.interpreter_path = True, "/opt/python"
    environment.python.conda_dependencies.add_pip_package("click")
    environment.docker.base_image = "an-image"
    environment.environment_variables = {"A": "1"}
    assert environment.register(workspace).version == "1"
    environment.environment_variables["A"] = "2"
    assert [environment.register(workspace).version for _ in range(2)] == ["2", "2"]  # the same again is no new version
    first, newest = Environment.get(workspace, "e", "1"), Environment.get(workspace, "e", label="latest")
    for each in (first, newest, newest.clone("f")):
        assert (each.python.user_managed_dependencies, each.python.interpreter_path) == (True, "/opt/python")
        assert (each.docker.base_image, [*each.python.conda_dependencies.pip_packages]) == ("an-image", ["click"])
    assert [(each.version, each.environment_variables) for each in (first, newest)] == [("1", {"A": "1"}), ("2", {"A": "2"})]
    with pytest.raises(UserErrorException, match="environment 'e' has version 1, 2, and not 3"):
        Environment.get(workspace, "e", "3")
    with pytest.raises(UserErrorException, match="label='stable' is not available"):
        Environment.get(workspace, "e", label="stable")


def test_environments_are_found_by_name(workspace: Workspace) -> None:
    Environment("e").register(workspace)
    assert (list(workspace.environments), len(Environment.list(workspace))) == (["e"], 1)
    assert workspace.environments["e"].version == "1"
    assert [*workspace.environments["AzureML-Chainer-5.1.0-GPU"].python.conda_dependencies.pip_packages] == ["chainer"]
    assert "f" not in workspace.environments
    with pytest.raises(KeyError, match="no environment 'f' is registered in workspace 'mine'"):
        workspace.environments["f"]


def test_each_of_those_who_register_at_once_has_a_version_of_its_own(workspace: Workspace) -> None:
    text = (
        "import os\nfrom dtrain.azureml.environment import Environment\nfrom dtrain.azureml.workspace import Workspace\n"
        "ws = Workspace.from_config()\nprint('ready', flush=True)\ninput()\n"
        "made = [Environment('e') for _ in range(20)]\n"
        "for number, each in enumerate(made): each.environment_variables = {'N': f'{os.getpid()} {number}'}\n"
        "print(*[each.register(ws).version for each in made])"
    )
    pipe = subprocess.PIPE
    others = [subprocess.Popen([sys.executable, "-c", text], stdin=pipe, stdout=pipe, text=True) for _ in range(3)]
    for other in others:
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
    for other in others:
        assert other.stdin is not None
        other.stdin.write("\n")
        other.stdin.flush()
    taken = [version for other in others for version in other.communicate(timeout=60)[0].split()]
    assert sorted(map(int, taken)) == list(range(1, 61))
