"""Old code on a new stack: names that NumPy, scikit-learn and TensorFlow have dropped, in the user's own modules only.

The script, and the modules it imports from its own folder, are changed as they are compiled: ``np.float`` becomes ``float``, and
``import tensorflow as tf`` TensorFlow 1's names. No file is written, no line moves, and nothing else sees it: NumPy and
TensorFlow themselves stay as they are.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import runpy
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_NUMPY = "__import__('numpy')"
_BUILTIN = "__import__('builtins').{name}"
# What takes the place of a name of NumPy's, where the installed one has it no longer. {np} is what the module calls NumPy.
NUMPY: Mapping[str, str] = {
    **{name: _BUILTIN.format(name=name) for name in ("bool", "int", "float", "complex", "object", "str")},
    "long": _BUILTIN.format(name="int"),
    "unicode": _BUILTIN.format(name="str"),
    "float_": "{np}.float64",
    "complex_": "{np}.complex128",
    "cfloat": "{np}.complex128",
    "singlecomplex": "{np}.complex64",
    "longfloat": "{np}.longdouble",
    "unicode_": "{np}.str_",
    "string_": "{np}.bytes_",
    **dict.fromkeys(("Inf", "Infinity", "PINF", "infty"), "{np}.inf"),
    "NINF": "(-{np}.inf)",
    **dict.fromkeys(("NaN", "NAN"), "{np}.nan"),
    "PZERO": "0.0",
    "NZERO": "(-0.0)",
    "alltrue": "{np}.all",
    "sometrue": "{np}.any",
    "product": "{np}.prod",
    "cumproduct": "{np}.cumprod",
    "round_": "{np}.round",
    "row_stack": "{np}.vstack",
    "trapz": "{np}.trapezoid",
    "in1d": "{np}.isin",
    "mat": "{np}.asmatrix",
    "asfarray": "(lambda a: {np}.asarray(a, dtype='float64'))",
    "asscalar": "(lambda a: {np}.asarray(a).item())",
    "msort": "(lambda a: {np}.sort(a, axis=0))",
}
_SHOWN = {text: text.removeprefix("__import__('builtins').") for text in NUMPY.values()}

# Names of TensorFlow 1 that TensorFlow 2 has not at its top, or below tf.train.
_TENSORFLOW_1 = frozenset(
    {
        "ConfigProto",
        "GPUOptions",
        "InteractiveSession",
        "Print",
        "Session",
        "app",
        "assign",
        "contrib",
        "flags",
        "get_variable",
        "gfile",
        "global_variables",
        "global_variables_initializer",
        "initialize_all_variables",
        "layers",
        "local_variables_initializer",
        "log",
        "logging",
        "placeholder",
        "placeholder_with_default",
        "random_normal",
        "random_uniform",
        "read_file",
        "reset_default_graph",
        "set_random_seed",
        "sparse_placeholder",
        "to_float",
        "to_int32",
        "to_int64",
        "trainable_variables",
        "truncated_normal",
        "variable_scope",
    }
)
_TENSORFLOW_1_TRAIN = frozenset(
    {
        "MonitoredTrainingSession",
        "MonitoredSession",
        "Saver",
        "Server",
        "SingularMonitoredSession",
        "StopAtStepHook",
        "Supervisor",
        "SyncReplicasOptimizer",
        "create_global_step",
        "get_global_step",
        "get_or_create_global_step",
        "replica_device_setter",
    }
)

# What TensorFlow 2 has under no name, and where some of it is.
_GONE = {
    "contrib": "some of it is in tf.keras and tf.compat.v1.layers",
    "examples": "data sets are in tf.keras.datasets, as mnist.load_data()",
}


@dataclass(frozen=True)
class OldName:
    """One use of a name that is gone: where, and what runs in its place (for a person to read)."""

    line: int
    name: str
    instead: str

    def describe(self, file: str) -> str:
        return f"{file}, line {self.line}: {self.name} is no more; it runs as {self.instead}, which is what to write"


def _aliases(tree: ast.AST, package: str) -> set[str]:
    """What a module calls a package that it imports."""
    imports = (node for node in ast.walk(tree) if isinstance(node, ast.Import))
    return {alias.asname or alias.name for node in imports for alias in node.names if alias.name == package}


def _numpy_uses(tree: ast.AST) -> Iterator[tuple[ast.Attribute, str, str]]:
    """(node, NumPy's alias, template of what takes its place) for names that the installed NumPy has not."""
    aliases = _aliases(tree, "numpy")
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and isinstance(node.value, ast.Name)):
            continue
        if node.value.id in aliases and node.attr in NUMPY and not _numpy_has(node.attr):
            yield node, node.value.id, NUMPY[node.attr]


def _numpy_imports(tree: ast.AST) -> Iterator[tuple[ast.ImportFrom, ast.alias]]:
    """What ``from numpy import`` asks for, and the installed NumPy has not."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "numpy" and not node.level:
            yield from ((node, alias) for alias in node.names if alias.name in NUMPY and not _numpy_has(alias.name))


def _numpy_has(name: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return hasattr(importlib.import_module("numpy"), name)


def _joblib_imports(tree: ast.AST) -> Iterator[ast.ImportFrom]:
    """Imports of joblib from scikit-learn, of which it is no part since 0.23."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or node.level:
            continue
        whole = node.module == "sklearn.externals" and any(alias.name == "joblib" for alias in node.names)
        if (whole or node.module == "sklearn.externals.joblib") and _has_no_joblib():
            yield node


def _has_no_joblib() -> bool:
    try:
        release = importlib.metadata.version("scikit-learn").split(".")
    except importlib.metadata.PackageNotFoundError:
        return False
    return (int(release[0]), int(release[1])) >= (0, 23)


def old_numpy(tree: ast.AST) -> list[OldName]:
    """The names in a module that the installed NumPy has no longer; and scikit-learn's joblib, which the same scripts use."""
    found = [
        OldName(node.lineno, f"{alias}.{node.attr}", _SHOWN[template].format(np=alias))
        for node, alias, template in _numpy_uses(tree)
    ]
    for where, asked in _numpy_imports(tree):
        found.append(OldName(where.lineno, f"numpy.{asked.name}", _SHOWN[NUMPY[asked.name]].format(np="numpy")))
    found += [OldName(node.lineno, "sklearn.externals.joblib", "joblib") for node in _joblib_imports(tree)]
    return sorted(found, key=lambda old: old.line)


def old_tensorflow(tree: ast.AST) -> list[OldName]:
    """The names in a module that only TensorFlow 1 has; none where TensorFlow 1 is installed, or none is."""
    aliases = _aliases(tree, "tensorflow")
    found = []
    for node in ast.walk(tree) if aliases and _is_tensorflow_2() else ():
        if not isinstance(node, ast.Attribute):
            continue
        owner = node.value
        if isinstance(owner, ast.Name) and owner.id in aliases and node.attr in _TENSORFLOW_1:
            found.append(OldName(node.lineno, f"{owner.id}.{node.attr}", f"{owner.id}.compat.v1.{node.attr}"))
        below_train = isinstance(owner, ast.Attribute) and owner.attr == "train" and getattr(owner.value, "id", None) in aliases
        if below_train and (node.attr in _TENSORFLOW_1_TRAIN or node.attr.endswith("Optimizer")):
            name = ast.unparse(owner).removesuffix(".train")
            found.append(OldName(node.lineno, f"{name}.train.{node.attr}", f"{name}.compat.v1.train.{node.attr}"))
    return sorted(found, key=lambda old: old.line)


def gone_tensorflow(tree: ast.AST) -> list[OldName]:
    """What a module uses of TensorFlow 1's that TensorFlow 2 has under no name; ``instead`` says where some of it is."""
    aliases = _aliases(tree, "tensorflow")
    found: dict[str, OldName] = {}
    for node in ast.walk(tree) if _is_tensorflow_2() else ():
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
            names = [f"tensorflow.{node.attr}"]
        else:
            continue
        for top, part in (name.split(".")[:2] for name in names if "." in name):
            if top == "tensorflow" and part in _GONE:
                found.setdefault(part, OldName(node.lineno, f"{top}.{part}", _GONE[part]))
    return sorted(found.values(), key=lambda old: old.line)


def _is_tensorflow_2() -> bool:
    for name in ("tensorflow", "tensorflow-cpu", "tensorflow-gpu"):
        try:
            return not importlib.metadata.version(name).startswith("1.")
        except importlib.metadata.PackageNotFoundError:
            continue
    return False


class _Numpy(ast.NodeTransformer):
    def __init__(self, tree: ast.AST) -> None:
        self._instead = {id(node): template.format(np=alias) for node, alias, template in _numpy_uses(tree)}

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        if id(node) not in self._instead:
            return self.generic_visit(node)
        return _at(node, ast.parse(self._instead[id(node)], mode="eval").body)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> list[ast.AST]:
        if any(_joblib_imports(node)):
            return self._joblib(node)
        gone = [alias for _, alias in _numpy_imports(node)]
        kept = [alias for alias in node.names if alias not in gone]
        texts = [f"{a.asname or a.name} = {NUMPY[a.name].format(np=_NUMPY)}" for a in gone]
        made: list[ast.AST] = [_at(node, ast.parse(text).body[0]) for text in texts]
        return [*made, *([ast.copy_location(ast.ImportFrom(node.module, kept, node.level), node)] if kept else [])]

    def _joblib(self, node: ast.ImportFrom) -> list[ast.AST]:
        if node.module == "sklearn.externals.joblib":
            return [ast.copy_location(ast.ImportFrom("joblib", node.names, 0), node)]
        own = [alias for alias in node.names if alias.name == "joblib"]
        kept = [alias for alias in node.names if alias.name != "joblib"]
        made: list[ast.AST] = [ast.copy_location(ast.Import(own), node)]
        return [*made, *([ast.copy_location(ast.ImportFrom(node.module, kept, 0), node)] if kept else [])]


def _at(node: ast.AST, new: ast.AST) -> ast.AST:
    """``new``, in the place of ``node``."""
    for part in ast.walk(new):
        ast.copy_location(part, node)
    return new


class _Tensorflow1(ast.NodeTransformer):
    _home = "dtrain.tensorflow.version_1"

    def visit_Import(self, node: ast.Import) -> list[ast.stmt]:
        made: list[ast.stmt] = []
        for alias in node.names:
            if alias.name == "tensorflow":
                name = ast.alias(name="tf", asname=alias.asname or "tensorflow")
                made.append(ast.ImportFrom(module=self._home, names=[name], level=0))
            else:
                made.append(ast.Import(names=[alias]))
        return [ast.copy_location(each, node) for each in made]

    def visit_ImportFrom(self, node: ast.ImportFrom) -> list[ast.stmt]:
        if node.module != "tensorflow" or node.level:
            return [node]
        first = ast.ImportFrom(module=self._home, names=[ast.alias(name="tf", asname="_dtrain_tensorflow_1")], level=0)
        second = ast.ImportFrom(module="tensorflow.compat.v1", names=node.names, level=0)
        return [ast.copy_location(each, node) for each in (first, second)]


def compile_old(source: bytes | str, path: str, kinds: Sequence[str], say: Callable[[str], object]) -> types.CodeType:
    """The code of a module of the user's; ``kinds``: of ``numpy``, ``tf1``. Says every name that another takes the place of.

    Raises SyntaxError as ``compile`` does.
    """
    tree: ast.AST = ast.parse(source, path)
    shown = os.path.basename(path)
    if "numpy" in kinds:
        for old in old_numpy(tree):
            say(old.describe(shown))
        tree = _Numpy(tree).visit(tree)
    if "tf1" in kinds and (_aliases(tree, "tensorflow") or "tensorflow" in _from_modules(tree)):
        say(f"{shown}: import tensorflow gives TensorFlow 1's names (tensorflow.compat.v1), with v2 behaviour off")
        tree = _Tensorflow1().visit(tree)
    code: types.CodeType = compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True)  # type: ignore[call-overload]
    return code


def _from_modules(tree: ast.AST) -> set[str]:
    return {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level}


class OldModules(importlib.abc.MetaPathFinder):
    """Compiles the modules below a folder by :func:`compile_old`."""

    def __init__(self, folder: Path, kinds: Sequence[str], say: Callable[[str], object]) -> None:
        self.folder, self.kinds, self.say = folder.resolve(), kinds, say

    def install(self) -> None:
        sys.meta_path.insert(0, self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or not isinstance(spec.loader, importlib.machinery.SourceFileLoader) or spec.origin is None:
            return None
        origin = Path(spec.origin).resolve()
        if not origin.is_relative_to(self.folder) or "site-packages" in origin.parts:
            return None
        spec.loader = _OldLoader(fullname, spec.origin, self)
        return spec

    def run_path(self, path: str) -> None:
        """Run a script as ``__main__``, as ``runpy.run_path`` does."""
        module = types.ModuleType("__main__")
        module.__dict__.update(__file__=path, __cached__=None, __builtins__=__builtins__)
        sys.modules["__main__"] = module
        exec(compile_old(Path(path).read_bytes(), path, self.kinds, self.say), module.__dict__)


class _OldLoader(importlib.machinery.SourceFileLoader):
    def __init__(self, fullname: str, path: str, finder: OldModules) -> None:
        super().__init__(fullname, path)
        self._finder = finder

    def get_code(self, fullname: str) -> Any:
        # Not by SourceFileLoader's own, which would keep what it compiled beside the source.
        return compile_old(self.get_data(self.path), self.path, self._finder.kinds, self._finder.say)


def runner(kinds: Sequence[str], folder: Path, *, rank: int) -> Callable[[str], object]:
    """What runs a script as ``__main__``: as Python does, or with old names for it and the modules of ``folder``, from now on.

    Rank 0 says on standard error which names those are.
    """
    if not kinds:
        return functools.partial(runpy.run_path, run_name="__main__")
    old = OldModules(folder, kinds, lambda text: None if rank else sys.stderr.write(f"dtrain: {text}\n"))
    old.install()
    return old.run_path
