"""Chainer and ChainerMN 7.8.1, last released in 2022, on the NumPy, Python and CuPy of today.

:func:`install`, which ``import dtrain.chainer`` calls, puts one finder before Python's own. For the modules in ``REPLACEMENTS``
it changes a few expressions of the source text before it is compiled; nothing is written to disk, no name is added to
``numpy``, and no line moves, so tracebacks stay right. Every replacement says how often its old text occurs, so that another
Chainer fails loudly instead of running half changed.

For the functions in ``REDIRECTED`` the finder puts a wrapper in place that hands the call to :mod:`dtrain.chainer.multi_node`
when it is given one of our communicators, so that ChainerMN scripts get our parts by ChainerMN's names.
"""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import inspect
import multiprocessing
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from dtrain.errors import MissingDependency
from dtrain.install import CHAINER, CHAINER_VERSION


class Replacement(NamedTuple):
    old: str
    new: str
    times: int = 1


# CuPy 14 took float16 out of carray.cuh.
_FLOAT16_HEADER = "#if __has_include(<cupy/float16.cuh>)\n#include <cupy/float16.cuh>\n#endif\n"
_PKG_RESOURCES = Replacement("import pkg_resources\n", "from dtrain.chainer.compatibility import requirements as pkg_resources\n")

REPLACEMENTS: dict[str, tuple[Replacement, ...]] = {
    # Names that NumPy took away (float in 1.24, sctypes in 2.0) or is about to (fix, deprecated in 2.5).
    "chainer.functions.array.as_strided": (
        Replacement("np.sctypes['int']", "(np.int8, np.int16, np.int32, np.int64)"),
        Replacement("np.sctypes['float']", "(np.float16, np.float32, np.float64, np.longdouble)"),
    ),
    "chainer.functions.array.resize_images": (Replacement("dtype=numpy.float)", "dtype=float)", 6),),
    "chainer.functions.math.fix": (Replacement("xp.fix(x)", "xp.trunc(x)"),),
    # Assigning to an array's shape is deprecated in NumPy 2.5; the initializer fills a view instead.
    "chainer.links.activation.maxout": (
        Replacement(
            "array.shape = (out_size, pool_size, in_size)\n                initialW_orig(array)\n"
            "                array.shape = (linear_out_size, in_size)\n",
            "initialW_orig(array.reshape(out_size, pool_size, in_size))\n\n\n",
        ),
        Replacement(
            "array.shape = (out_size, pool_size)\n                initial_bias_orig(array)\n"
            "                array.shape = linear_out_size,\n",
            "initial_bias_orig(array.reshape(out_size, pool_size))\n\n\n",
        ),
    ),
    # numpy.meshgrid returns a tuple since NumPy 2.0, and the next line assigns to an element.
    "chainer.distributions.categorical": (
        Replacement("        mg = numpy.meshgrid(", "        mg = _meshgrid("),
        Replacement("import numpy\n", "import numpy; _meshgrid = lambda *a, **k: list(numpy.meshgrid(*a, **k))\n"),
    ),
    # array(copy=False) means "never copy, or raise" since NumPy 2.0 and CuPy 14.
    "chainermn.communicators._memory_utility": (
        Replacement("v = xp.array(v, copy=False, dtype=transfer_dtype)", "v = xp.asarray(v, dtype=transfer_dtype)"),
        Replacement(
            "r'''\n#include <cupy/carray.cuh>\n",
            f"'#include <cupy/carray.cuh>\\n' {_FLOAT16_HEADER!r} r'''\n\n",
            2,
        ),
    ),
    "chainer.training.updaters.multiprocess_parallel_updater": (
        Replacement("        '_memcpy_gather',\n", f"        '_memcpy_gather', preamble={_FLOAT16_HEADER!r},\n"),
        Replacement("        '_memcpy_scatter',\n", f"        '_memcpy_scatter', preamble={_FLOAT16_HEADER!r},\n"),
    ),
    # NEP 50 (NumPy 2): a Python int that does not fit an unsigned array raises instead of wrapping round.
    "chainer.functions.array.pad_sequence": (
        Replacement("y[i, l:] = self.padding", "y[i, l:] = numpy.asarray(self.padding).astype(y.dtype)"),
    ),
    # NEP 50, the silent one: the running sums became float32, and the deviation of values near 1000 +- 0.05 nan.
    "chainer.reporter": (
        Replacement(
            "            value = value.as_grad_stopped()\n\n",
            "            value = value.as_grad_stopped()\n"
            "        value = value.astype('float64') if getattr(value, 'dtype', None) in ('float16', 'float32') else value\n",
        ),
    ),
    # NumPy 2 arrays have a .device, 'cpu'.
    "chainer.variable": (
        Replacement(
            "device = getattr(array, 'device', 'CPU')",
            "device = 'CPU' if isinstance(array, numpy.ndarray) else getattr(array, 'device', 'CPU')",
        ),
    ),
    # `cudnn` is not bound when CuPy has no cuDNN (CuPy 14 has none), and is used all the same.
    "chainer.backends.cuda": (
        Replacement("_cupy_major = 0  # type: bool", "_cupy_major = 0; cudnn = None; _cudnn_disabled_by_user = True"),
        Replacement(
            "        use_tensor_core = cudnn.is_tensor_core_available(dtype)",
            "        use_tensor_core = cudnn is not None and cudnn.is_tensor_core_available(dtype)",
        ),
    ),
    # numpy.distutils is not in Python 3.12, pkg_resources not in setuptools 81. They served warnings about macOS's
    # Accelerate and about every CuPy newer than 7.
    "chainer._environment_check": (
        Replacement("import numpy.distutils.system_info\nimport pkg_resources\n", "\n\n"),
        Replacement("    _check_osx_numpy_backend()\n    _check_optional_dependencies()\n", "\n\n"),
    ),
    "chainer.testing.helper": (_PKG_RESOURCES,),
    "chainer.testing.doctest_helper": (_PKG_RESOURCES,),
    # int() of an array of one dimension is an error in NumPy 2.5; and float32 counts exactly to 16 million only.
    "chainermn.iterators.multi_node_iterator": (
        Replacement("self.dataset_size = int(_size)", "self.dataset_size = int(_size[0])"),
        Replacement("numpy.ones((1, )).astype(numpy.float32)", "numpy.ones((1, )).astype(numpy.int64)", 2),
        Replacement("order.astype(numpy.float32)", "order.astype(numpy.int64)"),
        Replacement("return ctrl_msg.astype(numpy.float32)", "return ctrl_msg.astype(numpy.float64)"),
    ),
    # The class says that integers are ignored; it skipped Python's and failed on NumPy's.
    "chainermn.extensions.allreduce_persistent": (
        Replacement("if hasattr(param, 'dtype'):", "if getattr(getattr(param, 'dtype', None), 'kind', None) == 'f':"),
    ),
    # to_device("native") needs ChainerX, which no wheel has.
    "chainermn.extensions.observation_aggregator": (
        Replacement('value.to_device("native")', "value = cuda.to_cpu(value.array)"),
        Replacement("from chainer import Variable\n", "from chainer import Variable; from chainer.backends import cuda\n"),
    ),
}

REDIRECTED: dict[str, tuple[str, ...]] = {
    "chainermn.optimizers": ("create_multi_node_optimizer",),
    "chainermn.extensions.multi_node_evaluator": ("create_multi_node_evaluator",),
    "chainermn.extensions.checkpoint": ("create_multi_node_checkpointer",),
    "chainermn.datasets.scatter": ("scatter_dataset",),
    "chainermn.functions.batch_normalization": ("get_communication_backend",),
}
"""ChainerMN's module: functions whose namesakes in :mod:`dtrain.chainer.multi_node` serve our communicators."""


def install() -> None:
    """Make the Chainer that is imported from now on work here, and in the processes started by :mod:`multiprocessing`.

    A second call does nothing. Raises MissingDependency, with the commands that install it, where there is no Chainer, and
    ImportError where modules of Chainer were imported before.
    """
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    early = sorted(name for name in {*REPLACEMENTS, *REDIRECTED} if name in sys.modules)
    if early:
        raise ImportError(
            f"Chainer was imported before dtrain.chainer ({early[0]} and {len(early) - 1} more of the modules that it adapts); "
            "put `import dtrain.chainer` above the first import of chainer or chainermn"
        )
    if importlib.util.find_spec("chainer") is None:
        raise MissingDependency(
            f"dtrain.chainer needs Chainer {CHAINER_VERSION}, which is not installed; install it with:\n  {CHAINER}"
        )
    sys.meta_path.insert(0, _Finder())
    _reach_children()


class _Finder:
    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in REPLACEMENTS and name not in REDIRECTED:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None:
            if not isinstance(spec.loader, importlib.machinery.SourceFileLoader):
                raise ImportError(f"dtrain.chainer adapts Chainer's source, but {name} comes from {spec.origin}; {_reinstall()}")
            spec.loader = _Loader(name, spec.loader.path)
        return spec


class _Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname: str) -> types.CodeType:
        # Not the inherited one, which reads and writes .pyc files: those hold the text as it is on disk.
        text = importlib.util.decode_source(self.get_data(self.path))
        for old, new, times in REPLACEMENTS.get(self.name, ()):
            found = text.count(old)
            if found != times:
                reason = f"{self.path} is not Chainer {CHAINER_VERSION}'s: {old!r} occurs {found} times, not {times}"
                raise ImportError(f"{reason}; {_reinstall()}")
            text = text.replace(old, new)
        code: types.CodeType = compile(text, self.path, "exec", dont_inherit=True)
        return code

    def exec_module(self, module: types.ModuleType) -> None:
        super().exec_module(module)
        for name in REDIRECTED.get(self.name, ()):
            if not hasattr(module, name):
                raise ImportError(f"{self.path} is not ChainerMN {CHAINER_VERSION}'s: it has no {name}; {_reinstall()}")
            setattr(module, name, _redirected(getattr(module, name)))


def _redirected(original: Callable[..., Any]) -> Callable[..., Any]:
    """``original``, unless its communicator names a module of parts of its own (``parts_module``): then its namesake there."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def chosen(*args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(*args, **kwargs).arguments
        communicator = arguments.get("communicator", arguments.get("comm"))
        parts = getattr(communicator, "parts_module", None)
        function = original if parts is None else getattr(importlib.import_module(parts), original.__name__)
        return function(*args, **kwargs)

    return chosen


def _reinstall() -> str:
    return f"dtrain.chainer works with Chainer {CHAINER_VERSION} only; install it with:\n  {CHAINER}"


class _InstalledInChildren:
    """Unpickled by a process that spawn or forkserver started, it imports this module there, and with it the package."""

    def __reduce__(self) -> tuple[type[_InstalledInChildren], tuple[()]]:
        return _InstalledInChildren, ()


def _reach_children() -> None:
    """Have every process that :mod:`multiprocessing` starts install the hook before it unpickles what it is to run.

    Without it the workers of a ``MultiprocessIterator`` fail to import Chainer, and their pool starts new ones for ever. A
    process object carries its parent's ``_config``, ahead of its target and arguments, to the child, and the child's children.
    """
    config: dict[str, Any] = multiprocessing.current_process()._config  # type: ignore[attr-defined]
    config["dtrain.chainer"] = _InstalledInChildren()


class _ResolutionError(Exception):
    pass


class _WorkingSet:
    def require(self, *requirements: str) -> None:
        from packaging.requirements import Requirement  # only chainer.testing comes here, and pytest depends on it

        for text in requirements:
            wanted = Requirement(text)
            try:
                version = importlib.metadata.version(wanted.name)
            except importlib.metadata.PackageNotFoundError as error:
                raise _ResolutionError(text) from error
            if not wanted.specifier.contains(version, prereleases=True):
                raise _ResolutionError(text)


requirements = types.SimpleNamespace(WorkingSet=_WorkingSet, ResolutionError=_ResolutionError)
"""What ``chainer.testing`` uses of pkg_resources."""
