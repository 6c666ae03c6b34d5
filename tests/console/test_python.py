"""Ranks that another Python runs than the one that starts them: ``--python``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import ROOT, Project, another_python

TELLS = """
import sys
import dtrain, only_there
run = dtrain.init()
print(run.comm.allgather_obj(run.rank), sys.executable, only_there.__file__)
"""


@pytest.fixture
def other(tmp_path: Path) -> Path:
    return another_python(tmp_path / "other")


@pytest.mark.needs("mpi")
@pytest.mark.parametrize("ranks", ["1", "2"])
def test_ranks_run_by_another_python(project: Project, other: Path, ranks: str) -> None:
    # By its relative path, and started from the folder that it is relative to.
    done = project.dtrain("run", "-n", ranks, "--python", "other/bin/python", project.script(TELLS))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"{list(range(int(ranks)))} {other} {other.parents[1]}/lib/") == int(ranks)
    assert project.json("show", "latest")["spec"]["python"] == str(other)
    fails = project.dtrain("run", "-n", ranks, project.script(TELLS))
    assert "ModuleNotFoundError: No module named 'only_there'" in fails.stderr


def test_a_python_that_cannot_run_ranks_is_refused(project: Project) -> None:
    script = project.script("")
    done = project.dtrain("run", "--python", "absent/python", script)
    assert (done.returncode, "--python absent/python is not a program" in done.stderr) == (127, True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", project.folder / "bare"], check=True)
    done = project.dtrain("run", "--python", "bare/bin/python", script)
    assert done.returncode == 127
    assert f"{project.folder}/bare/bin/python cannot run ranks: ModuleNotFoundError: No module named" in done.stderr
    assert f"-m pip install {ROOT}\n" in done.stderr  # where this dtrain came from
    assert not (project.folder / "workspace" / "runs").exists()
    asked = project.dtrain("doctor", "--python", "bare/bin/python", "--json")
    checks = {check["name"]: check["level"] for check in json.loads(asked.stdout)[0]["checks"]}
    assert (asked.returncode, checks["ranks' python"]) == (1, "problem")
