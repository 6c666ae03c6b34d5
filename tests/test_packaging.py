"""The wheel and the source archive as a user gets them, and how little `import dtrain` and `dtrain --help` load."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = ("mpi4py", "chainer", "chainermn", "cupy", "tensorflow", "keras", "horovod", "sklearn")

pytestmark = pytest.mark.timeout(300)


def _run(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command that has to succeed, outside the sources and without their PYTHONPATH."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy: an earlier build's leavings in build/ would otherwise get into the wheel, and this build's would stay."""
    copy = tmp_path_factory.mktemp("sources")
    shutil.copytree(ROOT / "dtrain", copy / "dtrain", ignore=shutil.ignore_patterns("__pycache__"))
    # Neighbours that must not be taken for packages.
    shutil.copytree(ROOT / "tests", copy / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "examples", copy / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # Without isolation: the environment of the tests holds setuptools, and no package index is asked.
    _run(sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", folder, sources, cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def empty_venv(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a fresh environment with dtrain's wheel and its core dependencies, and nothing else."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=True)
    constraints = ROOT / "constraints" / "keras3.txt"
    _run(folder / "bin" / "python", "-m", "pip", "install", "--only-binary", ":all:", "-c", constraints, wheel, cwd=folder)
    return folder / "bin"


def test_wheel_holds_only_dtrain(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"dtrain"}
    assert len(tops) == 2
    modules = {name for name in names if name.startswith("dtrain/")}
    assert modules == {
        str(p.relative_to(ROOT)) for p in (ROOT / "dtrain").rglob("*") if p.suffix == ".py" or p.name == "py.typed"
    }
    assert any(name.endswith("/LICENSE") for name in names)


def test_sdist_is_complete_and_builds(sources: Path, tmp_path: Path) -> None:
    code = f"from setuptools import build_meta; print(build_meta.build_sdist({str(tmp_path)!r}))"
    archive = tmp_path / _run(sys.executable, "-c", code, cwd=sources).splitlines()[-1]
    with tarfile.open(archive) as tar:
        inside = {name.partition("/")[2] for name in tar.getnames()}
        tar.extractall(tmp_path)
    assert {"README.md", "LICENSE", "setup.py", "pyproject.toml", "dtrain/py.typed", "dtrain/__init__.py"} <= inside
    unpacked = archive.with_name(archive.name.removesuffix(".tar.gz"))
    _run(sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", tmp_path, unpacked, cwd=tmp_path)


def test_installs_alone(empty_venv: Path, tmp_path: Path) -> None:
    """With the core dependencies only: the package, its version, its console command and its module form."""
    code = "import dtrain, importlib.metadata as m; assert m.version('dtrain') == dtrain.__version__; print(dtrain.__file__)"
    assert str(empty_venv.parent) in _run(empty_venv / "python", "-c", code, cwd=tmp_path)
    assert "Usage: dtrain" in _run(empty_venv / "dtrain", "--help", cwd=tmp_path)
    installed = _run(empty_venv / "python", "-m", "pip", "list", "--format=freeze", cwd=tmp_path).lower()
    assert not [name for name in HEAVY if f"\n{name}==" in f"\n{installed}"]


@pytest.mark.parametrize(
    "code",
    [
        "import dtrain",
        "import dtrain.cli",
        "import sys; sys.argv = ['dtrain', '--help']\nfrom dtrain.cli import main\ntry: main()\nexcept SystemExit: pass",
        "import dtrain; dtrain.init",
        "import dtrain.registry, dtrain.metrics, dtrain.checkpoint, dtrain.comm",
    ],
)
def test_loads_no_framework(code: str) -> None:
    """Here, where the frameworks are installed and could be loaded."""
    program = f"{code}\nimport sys\nprint('loaded:', *[name for name in {HEAVY!r} if name in sys.modules])"
    assert _run(sys.executable, "-c", program, cwd=ROOT).splitlines()[-1] == "loaded:"


def test_what_every_start_waits_for(tmp_path: Path) -> None:
    """A job's start and end wait for what is imported in between; NumPy alone takes 80 ms, and psutil 10 in every rank."""
    (tmp_path / "train.py").write_text("import sys\nprint('in the rank:', *{'psutil', 'numpy', 'tempfile'} & set(sys.modules))")
    job = (
        "import sys; sys.argv = ['dtrain', 'run', 'train.py']\nfrom dtrain.cli import main\ntry: main()\nexcept SystemExit: pass"
    )
    program = f"{job}\nprint('in the command:', *{{'numpy', 'pathspec', 'concurrent.futures', 'rich'}} & set(sys.modules))"
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environ, capture_output=True, text=True, check=True)
    assert [line.partition("] ")[2] or line for line in done.stdout.splitlines()] == ["in the rank:", "in the command:"]
