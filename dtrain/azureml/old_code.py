"""Reads a job's source: for names that NumPy and TensorFlow have dropped since it was written, and for what it imports; and lets
scripts of that age import Chainer."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

from dtrain import switches
from dtrain.azureml.packages import installed_version
from dtrain.legacy import OldName, gone_tensorflow, old_numpy, old_tensorflow

_SHOWN = 10


def mend_chainer() -> None:
    """Let Chainer work where a script imports it without a thought of today's NumPy; nothing where it is absent, or loaded.

    Called before the script, in ranks and where one is run by itself, and when a notebook loads the extension.
    """
    if "chainer" not in sys.modules and importlib.util.find_spec("chainer") is not None:
        importlib.import_module("dtrain.chainer")


def find_old_names(source: Path, script: str) -> tuple[dict[str, str], list[str]]:
    """The variables that let a job use old names, where its script or a module of its folder does; and a sentence for each.

    Modules are followed from ``script`` by their imports. What is no Python is left to the job to complain of.
    """
    numpy: list[str] = []
    tensorflow: list[str] = []
    gone: list[str] = []
    keras: list[str] = []
    for path, tree in _modules(source, script):
        shown = path.relative_to(source).as_posix()
        numpy += [old.describe(shown) for old in old_numpy(tree)]
        tensorflow += [_tensorflow(shown, old) for old in old_tensorflow(tree)[:1]]
        gone += [
            f"{shown}, line {old.line}: {old.name} is gone from TensorFlow 2, and nothing runs in its place: {old.instead}"
            for old in gone_tensorflow(tree)
        ]
        keras += [f"{shown}, line {line}: {text}" for line, text in _old_keras(tree)]
    notes = numpy[:_SHOWN] + ([f"and {len(numpy) - _SHOWN} more such lines"] if len(numpy) > _SHOWN else [])
    return switches.legacy_switch(numpy=bool(numpy), tf1=bool(tensorflow)), notes + tensorflow + gone + keras[:_SHOWN]


def uses_horovod(source: Path, script: str) -> bool:
    """Whether a job's script, or a module of its folder, imports Horovod for TensorFlow."""
    ours = ("horovod.tensorflow", "horovod.keras")
    return any(name.startswith(ours) for _, tree in _modules(source, script) for name in _imported(tree))


def _tensorflow(file: str, old: OldName) -> str:
    return (
        f"{file}, line {old.line}: {old.name} is TensorFlow 1's; `import tensorflow` in it gives tensorflow.compat.v1, with v2 "
        "behaviour off: write `import tensorflow.compat.v1 as tf`"
    )


def _old_keras(tree: ast.Module) -> list[tuple[int, str]]:
    """Lines of a module that today's Keras stops at, and what to write there; nothing runs in their place."""
    if not any("keras" in name.split(".") or name == "tensorflow" for name in _imported(tree)):
        return []
    version = installed_version("keras") or ""
    short = any(isinstance(node, ast.List) and any(_text(each) == "acc" for each in node.elts) for node in ast.walk(tree))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "save_weights" and node.args:
            name = _text(node.args[0])
            if version.startswith("3.") and name.endswith(".h5") and not name.endswith(".weights.h5"):
                better = f"{name.removesuffix('.h5')}.weights.h5"
                found.append((node.lineno, f"save_weights({name!r}): Keras 3 takes names that end so: {better!r}"))
        elif isinstance(node, ast.Subscript) and version and not short and (name := _text(node.slice)) in ("acc", "val_acc"):
            better = name.replace("acc", "accuracy")
            found.append((node.lineno, f"{ast.unparse(node)}: of metrics=['accuracy'] Keras calls it {better!r} now; write that"))
    return sorted(found)


def _text(node: ast.AST) -> str:
    """The text that an expression is, or ends in (``os.path.join(folder, "model.h5")``); an empty one where it is none."""
    if isinstance(node, ast.Call) and node.args:
        return _text(node.args[-1])
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def _modules(source: Path, script: str) -> Iterator[tuple[Path, ast.Module]]:
    """The script and the modules of its folders that it imports, each once."""
    waiting, seen = [source / script], set()
    while waiting:
        path = waiting.pop()
        if path in seen or not path.is_file():
            continue
        seen.add(path)
        try:
            tree = ast.parse(path.read_bytes(), str(path))
        except (SyntaxError, ValueError):
            continue
        yield path, tree
        for name in _imported(tree):
            for folder in {source, path.parent}:
                below = folder.joinpath(*name.split("."))
                waiting += [below.with_suffix(".py"), below / "__init__.py"]


def _imported(tree: ast.Module) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            found |= {base, *(f"{base}.{alias.name}".strip(".") for alias in node.names)}
    return found - {""}
