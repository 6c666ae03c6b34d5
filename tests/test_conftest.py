"""What tests/conftest.py does for all tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NOTE = """
import os, pathlib, pytest
@pytest.mark.parametrize("number", range(4))
def test_note(number):
    (pathlib.Path({folder!r}) / f"{kind}-{{number}}").write_text(os.environ["PYTEST_XDIST_WORKER"])
"""


def test_what_shares_hosts_is_run_by_one_of_several_processes(tmp_path: Path) -> None:
    """A project of its own with this conftest.py; each test there notes by which process it is run."""
    pytest.importorskip("xdist")
    (tmp_path / "pytest.ini").touch()
    for kind in ("cluster", "unit"):
        folder = tmp_path / "tests" / kind
        folder.mkdir(parents=True)
        (folder / f"test_{kind}.py").write_text(NOTE.format(folder=str(tmp_path), kind=kind))
    shutil.copy(HERE / "conftest.py", tmp_path / "tests")
    (tmp_path / "tests" / "testbed").symlink_to(HERE / "testbed")
    argv = [sys.executable, "-m", "pytest", "-n", "2", "-p", "no:cacheprovider", "tests"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    cluster, unit = ([(tmp_path / f"{kind}-{number}").read_text() for number in range(4)] for kind in ("cluster", "unit"))
    assert cluster == [cluster[0]] * 4
    assert set(unit) != {cluster[0]}
