"""The names: where they come from, what an unknown one is told, and that docs/azureml.md lists all of them."""

from __future__ import annotations

import ast
import importlib
import inspect
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from dtrain.azureml import names
from dtrain.azureml.errors import Named, NoSuchImport, NoSuchModule, NoSuchName, members_of
from dtrain.azureml.finder import AzureFinder
from dtrain.azureml.table import subclasses, table
from tests.azureml.conftest import AzureProject

DOCUMENT = Path(__file__).parents[2] / "docs" / "azureml.md"


def test_the_document_lists_every_name() -> None:
    """It holds the table that the code makes: see dtrain/azureml/table.py for the command."""
    assert table() in DOCUMENT.read_text()


def test_what_objects_are_given_in_their_methods_is_listed() -> None:
    """An attribute that is set by ``self.name = ...`` alone would be in no table and in no error's "it has ..."."""
    table()  # so that the classes are there
    for cls in subclasses(Named):
        tree = ast.walk(ast.parse(textwrap.dedent(inspect.getsource(cls))))
        stored = [node for node in tree if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)]
        own = {node.attr for node in stored if isinstance(node.value, ast.Name) and node.value.id == "self"}
        assert {name for name in own if not name.startswith("_")} <= set(members_of(cls)), cls


@pytest.mark.parametrize(
    "name", ["Run.experiment", "PythonSection.interpreter_path", "DockerSection.base_image", "Framework.KERAS"]
)
def test_classes_that_no_module_names_are_listed(name: str) -> None:
    assert f"| `{name}` |" in table()


@pytest.fixture
def finder(monkeypatch: pytest.MonkeyPatch) -> None:
    """dtrain's azureml in this process, for one test."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "azureml"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [AzureFinder(), *sys.meta_path])
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "azureml"]:
        del sys.modules[name]


@pytest.mark.usefixtures("finder")
def test_every_name_that_is_listed_is_there() -> None:
    for module, known in names.MODULES.items():
        imported = importlib.import_module(module)
        for name in known:
            assert getattr(imported, name) is not None
        assert sorted(known) == imported.__all__


@pytest.mark.usefixtures("finder")
def test_a_name_that_we_have_not_says_what_to_use() -> None:
    with pytest.raises(NoSuchImport, match="Webservice is not available without Azure: models are registered"):
        from azureml.core import Webservice  # noqa: F401
    with pytest.raises(NoSuchImport, match=r"has no 'Workspce' \(did you mean Workspace\?\)"):
        from azureml.core import Workspce  # noqa: F401
    with pytest.raises(NoSuchModule, match="hyperdrive is not available without Azure: submit one run for each setting"):
        from azureml.train.hyperdrive import HyperDriveConfig  # noqa: F401
    with pytest.raises(NoSuchModule, match=r"azureml\.pipeline is not available .*: submit the steps"):
        import azureml.pipeline.steps
    with pytest.raises(NoSuchModule, match=r"azureml\.core\.webservice is not available .*: models are registered"):
        from azureml.core import webservice  # noqa: F401
    with pytest.raises(NoSuchModule, match=r"no module 'azureml\.cor' \(did you mean azureml\.core\?\)"):
        import azureml.cor  # noqa: F401
    from azureml.core import Model, Run, Workspace

    with pytest.raises(NoSuchName, match=r"Model\.deploy is not available without Azure: models are registered"):
        Model.deploy  # noqa: B018
    with pytest.raises(NoSuchName, match="Workspace has no 'from_confg'"):
        Workspace.from_confg  # noqa: B018
    assert not hasattr(Run, "log_the_loss")


@pytest.mark.usefixtures("finder")
def test_a_module_can_be_asked_whether_it_has_a_name() -> None:
    """As pickle asks every module that is loaded, for the home of a function that does not know its own."""
    import azureml.core
    import azureml.train.dnn

    assert not hasattr(azureml.core, "Image")
    assert getattr(azureml.core, "Workspce", None) is None
    with pytest.raises(AttributeError, match="Image is not available without Azure: models are registered"):
        azureml.core.Image  # noqa: B018
    assert pickle.loads(pickle.dumps(np.add)) is np.add


def in_python(text: str, *path: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    root = str(Path(__file__).parents[2])
    environ = {"PYTHONPATH": ":".join(map(str, (*path, root))), "PATH": "/usr/bin:/bin"}
    return subprocess.run([sys.executable, "-c", text], env=environ, cwd=cwd, capture_output=True, text=True, check=False)


def test_the_real_one_stays_unless_forced(tmp_path: Path) -> None:
    real = tmp_path / "azureml" / "core"
    real.mkdir(parents=True)
    (real / "__init__.py").write_text("REAL = True")
    text = "from dtrain.azureml import install\nprint(install({}))\nimport azureml.core\nprint(azureml.core.__file__)"
    done = in_python(text.format(""), tmp_path, cwd=tmp_path)
    assert done.stdout.split() == ["False", str(real / "__init__.py")]
    assert "the real azureml.core is installed" in done.stderr
    done = in_python(text.format("force=True").replace("__file__", "__version__"), tmp_path, cwd=tmp_path)
    assert done.stdout.split()[0] == "True"
    assert "+dtrain" in done.stdout


def test_a_python_that_is_started_has_what_its_starter_would_have(tmp_path: Path) -> None:
    """dtrain's; its own real one where it has that, unless forced; and none where the switch was taken from it."""
    real = tmp_path / "azureml" / "core"
    real.mkdir(parents=True)
    (real / "__init__.py").write_text("VERSION = 'real'")
    text = f"""
import os, subprocess, sys
from dtrain.azureml import install
install()
def told():
    argv = [sys.executable, "-c", "import azureml.core; print(azureml.core.VERSION)"]
    done = subprocess.run(argv, capture_output=True, text=True)
    print(done.stdout.strip() or done.stderr.splitlines()[-1])
told()
os.environ["PYTHONPATH"] += os.pathsep + {str(tmp_path)!r}
told()
os.environ.pop("PYTHONPATH")
told()
"""
    switched_off = text.replace("told()\nos", 'os.environ["DTRAIN_AZUREML"] = ""\ntold()\nos', 1)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    ours, own, none = in_python(text, cwd=elsewhere).stdout.splitlines()
    assert "+dtrain" in ours
    assert (own, none) == ("real", "ModuleNotFoundError: No module named 'azureml'")
    forced = text.replace("install()", "install(force=True)")
    assert in_python(forced, cwd=elsewhere).stdout.count("+dtrain") == 2
    assert in_python(switched_off, cwd=elsewhere).stdout.splitlines()[:2] == [none, "real"]


def test_nothing_is_there_without_dtrain_azureml(tmp_path: Path) -> None:
    """Neither by importing dtrain nor by a folder in site-packages; and a notebook's extension brings it."""
    done = in_python("import dtrain\nimport azureml", cwd=tmp_path)
    assert "No module named 'azureml'" in done.stderr
    text = "import dtrain.azureml as e\ne.load_ipython_extension(None)\nfrom azureml.core import Run\nprint(Run.__name__)"
    assert in_python(text, cwd=tmp_path).stdout == "Run\n"


def test_dtrain_run_and_the_other_ways_to_start(azure: AzureProject) -> None:
    azure.script("from azureml.core import Run\nrun = Run.get_context()\nrun.log('x', 1)\nprint(run.id)")
    done = azure.dtrain("run", "--azureml", "train.py")
    assert azure.latest.id in done.stdout
    assert azure.json("show", "latest")["ranks"][0]["metrics"] == {"x": 1}
    done = azure.dtrain("run", "train.py")
    assert "No module named 'azureml'" in done.stderr
    argv = [sys.executable, "-m", "dtrain.azureml", "-m", "train"]
    alone = subprocess.run(argv, cwd=azure.folder, env=azure.environ(), capture_output=True, text=True, check=False)
    assert alone.stdout.startswith("OfflineRun"), alone.stderr
    assert azure.json("show", "latest")["ranks"][0]["metrics"] == {"x": 1}
    assert azure.json("show", "latest")["state"] == "completed"
    other = subprocess.run(
        [sys.executable, "-m", "dtrain.azureml", "trian.py"], cwd=azure.folder, capture_output=True, text=True, check=False
    )
    for done in (azure.dtrain("azureml", "trian.py"), other):
        assert done.returncode == 127
        assert done.stderr.startswith("dtrain: no such script: trian.py")
        assert "did you mean train.py?" in done.stderr
