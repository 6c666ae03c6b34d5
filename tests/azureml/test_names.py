"""The names: where they come from, what an unknown one is told, and that docs/azureml.md lists all of them."""

from __future__ import annotations

import ast
import copy
import importlib
import inspect
import pickle
import re
import subprocess
import sys
import textwrap
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dtrain.azureml import names
from dtrain.azureml.errors import Named, NoSuchImport, NoSuchModule, NoSuchName, UserErrorException, members_of
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
    with pytest.raises(NoSuchImport, match=r"has no 'Workspce' \(did you mean Workspace\?\)"):
        from azureml.core import Workspce  # noqa: F401
    with pytest.raises(NoSuchModule, match=r"no module 'azureml\.cor' \(did you mean azureml\.core\?\)"):
        import azureml.cor  # noqa: F401
    for module, meant in (("azureml.pipelines", "azureml.pipeline"), ("azureml.hyperdrive", "azureml.train.hyperdrive")):
        with pytest.raises(NoSuchModule, match=re.escape(f"no module '{module}' (did you mean {meant}?)")):
            importlib.import_module(module)
    with pytest.raises(NoSuchImport, match=r"has no 'Keyvalt' \(did you mean Keyvault\?\)"):
        from azureml.core import Keyvalt  # noqa: F401
    from azureml.core import Model, Run, Workspace

    with pytest.raises(NoSuchName, match=r"Model\.deploy is not available without Azure: models are registered"):
        Model.deploy  # noqa: B018
    with pytest.raises(NoSuchName, match="Workspace has no 'from_confg'"):
        Workspace.from_confg  # noqa: B018
    assert not hasattr(Run, "log_the_loss")


def subclass_of(base: Any) -> None:
    class Mine(base):
        pass


def enter(manager: Any) -> None:
    with manager:
        pass


USES: dict[str, Callable[[Any], object]] = {
    "call": lambda name: name(1),
    "attribute": lambda name: name.attach,
    "set": lambda name: setattr(name, "attach", 1),
    "subclass": subclass_of,
    "instance": lambda name: isinstance(1, name),
    "instances": lambda name: isinstance(1, (int.__class__, name)),
    "subclasses": lambda name: issubclass(int, name),
    "truth": lambda name: not name,
    "iteration": list,
    "items": lambda name: name["x"],
    "length": len,
    "with": enter,
    "in": lambda name: 1 in name,
    "sum": lambda name: name + 1,
    "product": lambda name: 2 * name,
    "order": lambda name: sorted([name, 1]),
    "number": float,
}


@pytest.mark.usefixtures("finder")
@pytest.mark.parametrize("use", USES)
def test_what_only_azure_has_can_be_imported_and_not_used(use: str) -> None:
    """A name, a name of a module, and a module: scripts import much that they need on other paths."""
    import azureml.pipeline.steps
    from azureml.core import Webservice, Workspace, webservice
    from azureml.train.automl import AutoMLConfig
    from azureml.train.hyperdrive import BayesianParameterSampling as Bayesian

    assert Workspace.__name__ == "Workspace"
    assert repr(Webservice) == "<azureml.core.Webservice: not available without Azure>"
    assert typing.get_args(typing.Optional[Webservice])[0] is Webservice  # noqa: UP045  # as in a signature
    for name, full, reason in (
        (Webservice, "azureml.core.Webservice", "models are registered"),
        (webservice, "azureml.core.webservice", "models are registered"),
        (AutoMLConfig, "azureml.train.automl.AutoMLConfig", "name the settings that are to be tried"),
        (Bayesian, "azureml.train.hyperdrive.BayesianParameterSampling", "use RandomParameterSampling"),
        (azureml.pipeline, "azureml.pipeline", "submit the steps"),
        (azureml.pipeline.steps, "azureml.pipeline.steps", "submit the steps"),
    ):
        with pytest.raises(
            (UserErrorException, NoSuchName), match=f"^{re.escape(full)} is not available without Azure: {reason}"
        ):
            USES[use](name)


ASKED = {
    "try": "try:\n    from azureml.core import Webservice\nexcept ImportError:\n    Webservice = 'none'\nprint(Webservice)",
    "tuple": "try:\n    import azureml.automl\nexcept (KeyError, ModuleNotFoundError):\n    print('none')",
    "bare": "try: import azureml.automl.core\nexcept: print('none')",
    "suppress": "import contextlib\nwith contextlib.suppress(ImportError):\n    import azureml.automl\nprint('none')",
    "module": "try:\n    import mine\nexcept Exception as error:\n    print('none')",
    "by name": "import importlib\ntry:\n    importlib.import_module('azureml.automl')\nexcept ImportError:\n    print('none')",
    "find": "from importlib.util import find_spec\nprint('found' if find_spec('azureml.automl') is not None else 'none')",
    "find a name": "from importlib.util import find_spec\nprint(str(find_spec('azureml.core.Webservice')).lower())",
    "find an unknown one": "from importlib.util import find_spec\nprint(str(find_spec('azureml.core.webservise')).lower())",
    "guarded star": "try:\n    from azureml.core import *\nexcept ImportError:\n    1 / 0\nprint('Image' in dir() or 'none')",
    "call": "def load():\n    import azureml.automl\ntry:\n    load()\nexcept ImportError:\n    print('none')",
    "class": "class A:\n    try:\n        from azureml.core import Image\n    except ImportError:\n        print('none')",
    "a name": "WRONG = (ImportError, OSError)\ntry:\n    import azureml.automl\nexcept WRONG:\n    print('none')",
    "text": "try:\n    exec('import azureml.automl')\nexcept ImportError:\n    print('none')",
}
if sys.version_info >= (3, 11):
    ASKED["group"] = "try:\n    import azureml.automl\nexcept* ImportError:\n    print('none')"
KEPT = {
    "another failure": "try:\n    import azureml.automl\nexcept KeyError:\n    pass\nprint('kept')",
    "a name": "WRONG = KeyError\ntry:\n    import azureml.automl\nexcept WRONG:\n    pass\nprint('kept')",
    "call": "def use():\n    import azureml.automl\n    print('kept')\ntry:\n    use()\nexcept Exception:\n    pass",
    "defined": "try:\n    def use():\n        import azureml.automl\nexcept ImportError:\n    pass\nuse()\nprint('kept')",
    "handler": "try:\n    1 / 0\nexcept Exception:\n    import azureml.automl\nprint('kept')",
    "one line": "x = 1; import azureml.automl; print('kept')",
    "else": "try:\n    pass\nexcept ImportError:\n    pass\nelse:\n    import azureml.automl\nprint('kept')",
    "module": "import mine\nprint('kept')",
    "private": "from azureml._restclient.models import Run\nimport azureml.contrib.interpret.explain\nprint('kept')",
    "names": "from azureml.core.authentication import TokenAuthentication\nfrom azureml.core import Keyvault\nprint('kept')",
    "star": "from azureml.train.hyperdrive import *\nGridParameterSampling, BayesianParameterSampling\nprint('kept')",
    "lines": "from azureml.core import (\n    Workspace,\n    Webservice,\n)\nprint('kept')",
}


@pytest.mark.parametrize(
    ("text", "shown"), [*((text, "none") for text in ASKED.values()), *((text, "kept") for text in KEPT.values())]
)
def test_a_script_that_catches_the_failure_of_an_import_asks_whether_it_is_there(tmp_path: Path, text: str, shown: str) -> None:
    (tmp_path / "mine.py").write_text("from azureml.train.automl import AutoMLConfig\n")
    (tmp_path / "submit.py").write_text(text)
    done = in_python("import runpy, dtrain.azureml as e\ne.install()\nrunpy.run_path('submit.py')", tmp_path, cwd=tmp_path)
    assert (done.stdout, done.stderr) == (f"{shown}\n", "")


@pytest.mark.usefixtures("finder")
def test_what_only_azure_has_can_be_copied_pickled_and_in_an_annotation() -> None:
    from azureml.core import Webservice

    def deploy(service: Webservice | None = None, other: int | Webservice = 1) -> None: ...

    hints = typing.get_type_hints(deploy, localns={"Webservice": Webservice})
    assert [typing.get_args(hints[name]) for name in ("service", "other")] == [(Webservice, type(None)), (int, Webservice)]
    for kept in (copy.copy(Webservice), copy.deepcopy({"a": Webservice})["a"], pickle.loads(pickle.dumps(Webservice))):
        assert kept is Webservice
    sent = pickle.dumps(Webservice)
    del sys.modules["azureml.core.Webservice"]
    with pytest.raises(UserErrorException, match=r"^azureml\.core\.Webservice is not available without Azure"):
        pickle.loads(sent)()


AT_ONCE = {
    "from azureml.train.automl import *": "name the settings that are to be tried.*: import [*] gives no names of it",
    "import azureml.mlflow": "log with Run.get_context",  # which works by being imported: there is no later moment
    "from azureml.core import Webservices": "has no 'Webservices'",
}


@pytest.mark.parametrize("text", AT_ONCE)
def test_an_import_that_would_bring_nothing_or_do_something_fails(tmp_path: Path, text: str) -> None:
    (tmp_path / "submit.py").write_text(text)
    done = in_python("import runpy, dtrain.azureml as e\ne.install()\nrunpy.run_path('submit.py')", cwd=tmp_path)
    assert re.search(f"^dtrain.azureml.errors.NoSuch(Import|Module): .*{AT_ONCE[text]}", done.stderr, re.MULTILINE), done.stderr


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
