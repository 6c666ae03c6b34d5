"""The command line as a user has it: real processes in a folder of their own, and a look at what they leave behind."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import psutil
import pytest

from dtrain.layout import RunLayout, Workspace

ROOT = Path(__file__).parents[2]


@dataclass
class Project:
    """A user's folder with scripts in it."""

    folder: Path
    env: dict[str, str] = field(default_factory=dict)
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def script(self, text: str, name: str = "train.py") -> str:
        (self.folder / name).write_text(text)
        return name

    def environ(self) -> dict[str, str]:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), **self.env}

    def argv(self, *args: str) -> list[str]:
        return [sys.executable, "-m", "dtrain.cli", *args]

    def dtrain(self, *args: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        return self.run(self.argv(*args), timeout=timeout)

    def run(self, argv: list[str], timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """Run any command in the folder, to its end."""
        return subprocess.run(
            argv, cwd=self.folder, env=self.environ(), capture_output=True, text=True, timeout=timeout, check=False
        )

    def start(self, *args: str) -> subprocess.Popen[str]:
        argv = self.argv(*args)
        pipe = subprocess.PIPE
        job = subprocess.Popen(argv, cwd=self.folder, env=self.environ(), stdout=pipe, stderr=pipe, text=True)
        for stream in (job.stdout, job.stderr):
            assert stream is not None
            fcntl.fcntl(stream, fcntl.F_SETPIPE_SZ, 2**20)  # read in the end only: what TensorFlow says of a lost peer is long
        self.started.append(job)
        return job

    def json(self, *args: str) -> Any:
        done = self.dtrain(*args, "--json")
        assert done.returncode == 0, done.stderr
        return orjson.loads(done.stdout)

    @property
    def latest(self) -> RunLayout:
        return Workspace(self.folder / "workspace").find_run("latest")

    def processes(self) -> list[psutil.Process]:
        """Processes that any run of this project started and that are still there."""
        found = []
        for process in psutil.process_iter():
            try:
                environment = process.environ()
            except psutil.Error:
                continue
            if environment.get("DTRAIN_RUN_DIR", "").startswith(str(self.folder)) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        return found

    def left_behind(self) -> list[object]:
        """What is still there of this project's runs, when the test is over."""
        return list(self.processes())


def another_python(folder: Path) -> Path:
    """Make another Python with what this one has, and one module more, ``only_there``; returns its path."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    site = folder / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    (site / "this.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    (site / "only_there.py").write_text("")
    return folder / "bin" / "python"


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    """A project folder; when the test ends, no process of any of its runs may be left."""
    yield from watched(Project(tmp_path))


def watched(project: Project) -> Iterator[Project]:
    yield project
    for job in project.started:  # of a test that failed half way
        if job.poll() is None:
            job.kill()
    left = project.left_behind()
    for process in project.processes():
        with contextlib.suppress(psutil.NoSuchProcess):  # it went with another one
            process.kill()
    assert not left, f"left behind: {left}"


@pytest.fixture
def wait_until() -> Callable[..., None]:
    """Waits for a condition, and fails when it does not come true in time."""

    def wait(condition: Callable[[], bool], timeout: float = 20) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, "did not happen in time"
            time.sleep(0.05)

    return wait
