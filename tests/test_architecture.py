"""The house style that a machine can hold: who may import whom, and budgets for files, functions and parameters."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 50
MAX_PARAMETERS = 6

# What each part may import of the others: lazy and TYPE_CHECKING imports count. `errors`, `install` and `files` are open to all.
# A new part gets a row.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "install": set(),
    "files": set(),
    "layout": set(),
    "processes": set(),
    "roles": set(),
    "allocation": set(),
    "progress": set(),
    "hosts": set(),
    "switches": set(),
    "masking": set(),
    "binding": set(),
    "_masked_pipe": {"masking"},
    "job_options": {"roles"},
    "spec": {"job_options", "layout", "roles", "hosts", "masking", "binding"},
    "tf_config": {"roles"},
    "resources": {"binding"},
    "env": {"layout", "roles", "tf_config", "resources", "allocation", "switches"},
    "status": {"layout", "processes"},
    "snapshot": {"layout"},
    "launch": {
        *(
            "spec",
            "job_options",
            "allocation",
            "hosts",
            "layout",
            "env",
            "tf_config",
            "roles",
            "status",
            "snapshot",
            "processes",
            "progress",
            "masking",
            "binding",
            "resources",
        ),
    },
    "_after_import": set(),
    "_mpi_calls": {"progress"},
    "_tracebacks": set(),
    "_control": {"processes"},
    # tensorflow: where `import tensorflow` of an old script leads.
    "legacy": {"tensorflow"},
    # tensorflow: for what it mends in Horovod, where the script imports that; azureml: where the job was submitted by its names.
    "_rank_main": {
        *("layout", "env", "status", "processes", "progress", "masking", "binding", "resources", "switches"),
        *("_after_import", "_control", "_masked_pipe", "_mpi_calls", "_tracebacks", "tensorflow", "azureml", "legacy"),
    },
    "comm": {"env", "progress"},
    "metrics": {"layout"},
    "_shards": {"layout"},
    "_shard_passing": {"layout", "comm", "_shards"},
    "checkpoint": {"layout", "comm", "_shards", "_shard_passing"},
    "_ending": {"layout", "status", "comm"},
    "run": {"_ending", "spec", "env", "layout", "status", "snapshot", "processes", "progress", "comm", "metrics", "checkpoint"},
    "chainer": {"run", "layout", "progress", "comm", "metrics", "checkpoint"},
    "tensorflow": {"env", "run", "progress", "comm", "metrics", "checkpoint", "_after_import"},
    "registry": {"layout", "status", "checkpoint"},
    "report": {"layout", "status", "metrics"},
    # Everything but the command line; chainer: for what it mends in Chainer, where a script of that age imports it.
    "azureml": {
        *("_ending", "binding", "chainer", "comm", "env", "hosts", "job_options", "launch", "layout", "legacy", "masking"),
        *("metrics", "processes", "progress", "registry", "resources", "snapshot", "spec", "status", "switches"),
    },
    "machine": {"job_options", "layout", "launch"},
    "__main__": {"cli"},
    "cli": {
        *("spec", "job_options", "allocation", "roles", "hosts", "layout", "env", "status", "masking", "binding"),
        *("launch", "metrics", "registry", "report", "machine", "azureml", "switches"),
    },
    # The public names, loaded when first asked for.
    "__init__": {"run", "registry"},
}

# A large foreign package is known to one adapter a role, and to nobody else.
ADAPTERS: dict[str, tuple[str, ...]] = {
    "mpi4py": ("dtrain.comm.mpi",),
    "chainer": ("dtrain.chainer",),
    "chainermn": ("dtrain.chainer",),
    "cupy": ("dtrain.chainer",),
    "cupyx": ("dtrain.chainer",),
    "tensorflow": ("dtrain.tensorflow", "dtrain.comm.horovod"),
    "keras": ("dtrain.tensorflow",),
    "tf_keras": ("dtrain.tensorflow",),
    "horovod": ("dtrain.tensorflow", "dtrain.comm.horovod", "dtrain.launch.gloo_driver"),
    "obstore": ("dtrain.azureml.object_store",),
    "IPython": ("dtrain.azureml.live",),
    "ipywidgets": ("dtrain.azureml.live",),
    "tensorboard": ("dtrain.azureml.tensorboard",),
}


@dataclass(frozen=True)
class Source:
    """One parsed file; ``module`` is its dotted name, where it is one of dtrain's."""

    path: Path
    module: str
    text: str

    @classmethod
    def read(cls, path: Path) -> Source:
        parts = path.relative_to(ROOT).with_suffix("").parts
        return cls(path, ".".join(parts), path.read_text(encoding="utf-8"))

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def part(self) -> str:
        """The row of MAY_IMPORT: ``comm`` for dtrain.comm.mpi."""
        return self.module.split(".")[1]

    def imports(self) -> Iterator[tuple[int, str]]:
        """(line, dotted name) of all that is imported, wherever it stands, also by name: ``"dtrain.x:Y"`` in a table."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = self.module.split(".")[: -node.level] if node.level else []
                name = ".".join([*base, *([node.module] if node.module else [])])
                yield from ((node.lineno, f"{name}.{alias.name}") for alias in node.names)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                if re.fullmatch(r"[a-z_0-9]+(\.\w+)*:\w+", node.value) and node.value.split(":")[0].split(".")[0] == "dtrain":
                    yield node.lineno, node.value.replace(":", ".")
            elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
                yield from ((node.lineno, a.value) for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str))


def forbidden_imports(source: Source) -> list[str]:
    if source.part not in MAY_IMPORT:
        return [f"{source.module} has no row in MAY_IMPORT; say there which parts it may import"]
    allowed = MAY_IMPORT[source.part] | {source.part, "errors", "install", "files", "__version__"}
    found = []
    for line, name in source.imports():
        head, *rest = name.split(".")
        if head == "dtrain" and (not rest or rest[0] not in allowed):
            found.append(f"{source.module}:{line} imports {name}; {source.part} may import {', '.join(sorted(allowed))}")
        homes = ADAPTERS.get(head, ())
        if homes and not any(source.module == home or source.module.startswith(f"{home}.") for home in homes):
            found.append(f"{source.module}:{line} imports {name}; only {' and '.join(homes)} may")
    return found


def over_budget(source: Source) -> list[str]:
    found = []
    lines = source.text.splitlines()
    if len(lines) > MAX_FILE_LINES:
        found.append(f"{source.module} has {len(lines)} lines; a file has up to {MAX_FILE_LINES}")
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        # The exemption stands in the signature, whether that takes one line or several.
        if any("# long because " in line for line in lines[node.lineno - 1 : node.body[0].lineno]):
            continue
        where = f"{source.module}:{node.lineno} {node.name}"
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        count = len(names) - (names[:1] in (["self"], ["cls"]))
        if length > MAX_FUNCTION_LINES:
            found.append(
                f"{source.module}:{node.lineno} {node.name} has {length} lines; a function has up to {MAX_FUNCTION_LINES}"
            )
        if count > MAX_PARAMETERS:
            found.append(f"{where} has {count} parameters; a function has up to {MAX_PARAMETERS}")
    return found


def bad_manners(source: Source) -> list[str]:
    """What the library does not do: swallow everything, raise anything, print, configure logging, be called utils."""
    found = []
    console = source.part in {"cli", "_rank_main"} or source.module.rsplit(".", 1)[-1] == "console"
    if source.path.name == "utils.py":
        found.append(f"{source.module}: call the file after what it does")
    for node in ast.walk(source.tree):
        where = f"{source.module}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            found.append(f"{where} catches everything; name the exceptions")
        elif isinstance(node, ast.Raise):
            raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            if isinstance(raised, ast.Name) and raised.id in {"Exception", "BaseException"}:
                found.append(f"{where} raises {raised.id}; raise one of dtrain.errors")
        elif isinstance(node, ast.Try):
            found += [
                f"{where} returns in finally" for inner in node.finalbody for n in ast.walk(inner) if isinstance(n, ast.Return)
            ]
        elif isinstance(node, ast.Call):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if isinstance(node.func, ast.Name) and called == "print" and not console:
                found.append(f"{where} prints; the library logs or returns")
            if called == "basicConfig":
                found.append(f"{where} configures logging; that is the program's")
    return found


LIBRARY = sorted((ROOT / "dtrain").rglob("*.py"))
PROGRAMS = [p for folder in ("benchmarks", "examples") for p in sorted((ROOT / folder).rglob("*.py"))] + [ROOT / "setup.py"]


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", LIBRARY, ids=_name)
def test_library_file(path: Path) -> None:
    source = Source.read(path)
    assert forbidden_imports(source) + over_budget(source) + bad_manners(source) == []


@pytest.mark.parametrize("path", PROGRAMS, ids=_name)
def test_program_file(path: Path) -> None:
    assert over_budget(Source.read(path)) == []


def test_every_row_has_its_module() -> None:
    assert {path.relative_to(ROOT / "dtrain").parts[0].removesuffix(".py") for path in LIBRARY} == set(MAY_IMPORT)


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("dtrain.comm.mpi", "import dtrain.run"),
        ("dtrain.comm.mpi", "from dtrain import run"),
        ("dtrain.comm.mpi", "from ..launch import plan"),
        ("dtrain.comm.mpi", "def f():\n    from dtrain.layout import RunLayout"),
        ("dtrain.layout", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from dtrain.run import Run"),
        ("dtrain.cli", "TABLE = {'x': 'dtrain.chainer.trainer:Trainer'}"),
        ("dtrain.cli", "import importlib\nimportlib.import_module('dtrain.chainer')"),
        ("dtrain.run", "def f():\n    import mpi4py.MPI"),
        ("dtrain.comm.mpi_tools", "from mpi4py import MPI"),
        ("dtrain.novelty", ""),
    ],
)
def test_forbidden_import_is_seen(module: str, text: str) -> None:
    assert len(forbidden_imports(Source(Path("x.py"), module, text))) == 1


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("dtrain.comm.mpi", "from mpi4py import MPI\nfrom dtrain.env import RankEnv\nfrom dtrain.errors import RankError"),
        ("dtrain.comm.local", "from .base import Communicator\nfrom . import base"),
        ("dtrain.launch.local", "COMMAND = ['-m', 'dtrain._rank_main']\nfrom dtrain import __version__"),
    ],
)
def test_allowed_import_passes(module: str, text: str) -> None:
    assert forbidden_imports(Source(Path("x.py"), module, text)) == []


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("x = 1\n" * 400, 0),
        ("x = 1\n" * 401, 1),
        ("def f():\n" + "    x = 1\n" * 49, 0),
        ("def f():\n" + "    x = 1\n" * 50, 1),
        ("def f():  # long because of a table\n" + "    x = 1\n" * 50, 0),
        ("def f(\n    a,\n):  # long because of a table\n" + "    x = 1\n" * 50, 0),
        ("def f(a, b, c, *, d, e, g): ...", 0),
        ("def f(a, b, c, *, d, e, g, h): ...", 1),
        ("class C:\n    def f(self, a, b, c, *, d, e, g): ...", 0),
        ("@dataclass\nclass C:\n" + "".join(f"    x{n}: int\n" for n in range(9)), 0),
    ],
)
def test_budgets(text: str, problems: int) -> None:
    assert len(over_budget(Source(Path("x.py"), "dtrain.x", text))) == problems


@pytest.mark.parametrize(
    ("module", "text", "problems"),
    [
        ("dtrain.run", "try:\n    f()\nexcept:\n    pass", 1),
        ("dtrain.run", "raise Exception('x')", 1),
        ("dtrain.run", "def f():\n    try:\n        g()\n    finally:\n        return 1", 1),
        ("dtrain.run", "print('x')", 1),
        ("dtrain.cli", "print('x')", 0),
        ("dtrain.launch.console", "print('x')", 0),
        ("dtrain.run", "import logging\nlogging.basicConfig()", 1),
        ("dtrain.run", "try:\n    f()\nexcept OSError:\n    raise", 0),
    ],
)
def test_manners(module: str, text: str, problems: int) -> None:
    assert len(bad_manners(Source(Path("x.py"), module, text))) == problems


def test_imports_are_declared() -> None:
    """What the library imports outside the adapters is in setup.py's core dependencies, and all of those are used."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    core = next(n.value for n in tree.body if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "CORE")
    declared = {re.split(r"[<>=]", requirement)[0] for requirement in ast.literal_eval(core)}
    used = {name.split(".")[0] for path in LIBRARY for _, name in Source.read(path).imports()}
    assert used - set(sys.stdlib_module_names) - ADAPTERS.keys() - {"dtrain"} == declared
