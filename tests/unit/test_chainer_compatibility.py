"""The import hook that makes Chainer 7.8.1 right on today's NumPy, seen from fresh processes."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from dtrain import install
from dtrain.errors import MissingDependency

ROOT = Path(__file__).resolve().parents[2]

needs_chainer = pytest.mark.needs("chainer")


def run_python(script: str, *, folder: Path, flags: tuple[str, ...] = (), expect: int = 0, timeout_s: float = 60) -> str:
    """Run a script from a file, so that processes it starts can import it; return what it printed."""
    path = folder / "script.py"
    path.write_text(textwrap.dedent(script))
    environ = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, *flags, str(path)]
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


@needs_chainer
def test_every_replacement_applies_and_numpy_gets_no_name(tmp_path: Path) -> None:
    """Every adapted module imports, without a warning and without numpy growing; Chainer and MPI are not imported early."""
    out = run_python(
        """
        import importlib, sys
        import numpy
        names = set(dir(numpy))
        import dtrain.chainer
        from dtrain.chainer import compatibility
        assert not {"chainer", "chainermn", "mpi4py", "cupy"} & set(sys.modules), "not lazy"
        for name in (*compatibility.REPLACEMENTS, *compatibility.REDIRECTED):
            if name == "chainermn.communicators._memory_utility":
                continue  # imports MPI, and starts it
            importlib.import_module(name)
        # A part of NumPy 1 that is imported becomes a name: numpy.typing is one.
        grown = {name for name in set(dir(numpy)) ^ names if f"numpy.{name}" not in sys.modules}
        assert not grown, grown
        assert "pkg_resources" not in sys.modules
        assert sum(type(finder) is compatibility._Finder for finder in sys.meta_path) == 1
        compatibility.install()
        assert sum(type(finder) is compatibility._Finder for finder in sys.meta_path) == 1
        print("all imported")
        """,
        folder=tmp_path,
        flags=("-W", "error"),
    )
    assert "all imported" in out


@needs_chainer
def test_replacements_keep_lines_and_compile() -> None:
    """Those of modules that start MPI too: as often as said, on the same lines, and still Python."""
    import dtrain.chainer
    from dtrain.chainer import compatibility

    assert dtrain.chainer.compatibility is compatibility
    for name, replacements in compatibility.REPLACEMENTS.items():
        assert all(each.old.count("\n") == each.new.count("\n") for each in replacements), name
        top = importlib.util.find_spec(name.partition(".")[0])
        assert top is not None
        assert top.submodule_search_locations is not None
        path = Path(top.submodule_search_locations[0]).joinpath(*name.split(".")[1:]).with_suffix(".py")
        assert compatibility._Loader(name, str(path)).get_code(name) is not None


@needs_chainer
@pytest.mark.parametrize(
    "script",
    [
        pytest.param(
            """
            summary = chainer.reporter.Summary()
            for value in (999.95, 1000.05, 1000.0):
                summary.add(np.float32(value))
            mean, deviation = summary.make_statistics()
            assert abs(mean - 1000) < 1e-4 and abs(deviation - 0.0408) < 1e-3, (mean, deviation)
            """,
            id="sums in float64",
        ),
        pytest.param(
            """
            y = F.pad_sequence([np.ones(1, np.uint8), np.ones(2, np.uint8)], padding=-1)
            assert y.array.tolist() == [[1, 255], [1, 1]], y.array
            """,
            id="padding that does not fit",
        ),
        pytest.param(
            """
            x = np.arange(16, dtype="f").reshape(1, 1, 4, 4)
            assert F.resize_images(x, (2, 2)).array.tolist() == [[[[0, 3], [12, 15]]]]
            assert F.as_strided(x, (2, 2), (4, 1), 0).array.tolist() == [[0, 1], [4, 5]]
            assert F.fix(np.array([-1.5, 1.5], "f")).array.tolist() == [-1, 1]
            """,
            id="names that NumPy took away",
        ),
        pytest.param(
            """
            p = np.array([[0.25, 0.75], [0.5, 0.5]], "f")
            drawn = chainer.distributions.Categorical(p=p)
            assert drawn.log_prob(np.array([1, 0])).array.tolist() == np.log(p[[0, 1], [1, 0]]).tolist()
            """,
            id="meshgrid",
        ),
        pytest.param(
            """
            w = np.arange(12, dtype="f").reshape(3, 2, 2)
            def fill(array): array[...] = w
            def bias(array): array[...] = 1
            link = chainer.links.Maxout(2, 3, 2, initialW=fill, initial_bias=bias)
            assert link.linear.W.array.tolist() == w.reshape(6, 2).tolist() and link.linear.b.array.tolist() == [1] * 6
            """,
            id="maxout",
        ),
        pytest.param(
            """
            assert "device: CPU" in chainer.Variable(np.ones(2, "f")).debug_print()
            """,
            id="device of an array",
        ),
        pytest.param(
            """
            import chainer.testing
            import unittest
            skipped = chainer.testing.with_requires("numpy<1.0")(unittest.TestCase)
            assert getattr(skipped, "__unittest_skip__", False)
            chainer.testing.with_requires("numpy>=1.0", "six")
            """,
            id="pkg_resources",
        ),
    ],
)
def test_results(script: str, tmp_path: Path) -> None:
    head = "import dtrain.chainer\nimport chainer, chainer.functions as F\nimport numpy as np\n"
    run_python(head + textwrap.dedent(script), folder=tmp_path)


MULTIPROCESS = """
import multiprocessing

def main():
    import dtrain.chainer  # only here, so that no child comes by it in importing this script
    import chainer, numpy
    multiprocessing.set_start_method(METHOD)
    data = chainer.datasets.TupleDataset(numpy.arange(20, dtype="f").reshape(10, 2), numpy.arange(10))
    iterator = chainer.iterators.MultiprocessIterator(data, 3, repeat=False, shuffle=False, n_processes=2, shared_mem=1000)
    print("got", [int(t) for batch in iterator for _, t in batch])
    iterator.finalize()

if __name__ == "__main__":
    main()
"""


@needs_chainer
@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
def test_multiprocess_iterator(method: str, tmp_path: Path) -> None:
    """Workers of every start method load what the hook adapts."""
    out = run_python(MULTIPROCESS.replace("METHOD", repr(method)), folder=tmp_path)
    assert f"got {list(range(10))}" in out


@needs_chainer
def test_grandchildren_have_the_hook_too(tmp_path: Path) -> None:
    out = run_python(
        """
        import multiprocessing, sys

        def last():
            import chainer.functions
            print("grandchild", "dtrain.chainer" in sys.modules)

        def first():
            process = multiprocessing.get_context("spawn").Process(target=last)
            process.start()
            process.join()

        if __name__ == "__main__":
            import dtrain.chainer
            process = multiprocessing.get_context("spawn").Process(target=first)
            process.start()
            process.join()
        """,
        folder=tmp_path,
    )
    assert "grandchild True" in out


@needs_chainer
def test_chainer_first_is_refused_with_what_to_do(tmp_path: Path) -> None:
    out = run_python(
        """
        import types, sys
        sys.modules["chainer.reporter"] = types.ModuleType("chainer.reporter")  # NumPy 2 would not let us import it first
        import dtrain.chainer
        """,
        folder=tmp_path,
        expect=1,
    )
    assert "ImportError: Chainer was imported before dtrain.chainer (chainer.reporter" in out
    assert "put `import dtrain.chainer` above" in out


@needs_chainer
def test_another_chainer_is_refused(tmp_path: Path) -> None:
    """A copy of Chainer with one adapted line changed does not import, and says which line and what to install."""
    spec = importlib.util.find_spec("chainer")
    assert spec is not None
    assert spec.origin is not None
    shutil.copytree(Path(spec.origin).parent, tmp_path / "chainer", ignore=shutil.ignore_patterns("__pycache__"))
    reporter = tmp_path / "chainer" / "reporter.py"
    reporter.write_text(reporter.read_text().replace("value = value.as_grad_stopped()", "value = value.as_grad_stopped( )"))
    out = run_python("import dtrain.chainer\nimport chainer\n", folder=tmp_path, expect=1)
    assert f"ImportError: {reporter} is not Chainer 7.8.1's" in out
    assert "occurs 0 times, not 1" in out
    assert "pip install --no-build-isolation chainer==7.8.1" in out


def test_without_chainer_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The module is loaded by its path: its package would install the hook."""
    path = ROOT / "dtrain" / "chainer" / "compatibility.py"
    spec = importlib.util.spec_from_file_location("compatibility_alone", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "modules", {name: kept for name, kept in sys.modules.items() if not name.startswith("chainer")})
    before = list(sys.meta_path)
    with pytest.raises(MissingDependency, match=re.escape(install.CHAINER)):
        module.install()
    assert sys.meta_path == before


@needs_chainer
def test_one_rank_needs_no_mpi(tmp_path: Path) -> None:
    """With mpi4py hidden: communicator, optimizer, batch normalization, scattering, and a message to oneself."""
    run_python(
        """
        import sys
        sys.modules["mpi4py"] = None
        import dtrain.chainer
        from dtrain.comm.local import LocalCommunicator
        import chainer, chainermn, numpy as np
        comm = dtrain.chainer.create_communicator(LocalCommunicator())
        model = chainer.Sequential(chainer.links.Linear(None, 2), chainermn.links.MultiNodeBatchNormalization(2, comm))
        optimizer = chainermn.create_multi_node_optimizer(chainer.optimizers.SGD(), comm).setup(model)
        optimizer.update(lambda x: chainer.functions.sum(model(x) ** 3), np.random.rand(4, 3).astype("f"))
        assert optimizer.t == 1
        assert len(chainermn.scatter_dataset([1, 2, 3], comm)) == 3
        assert chainermn.scatter_index(3, comm) == (0, 3)
        comm.send_obj("hello", 0)
        assert comm.recv_obj(0) == "hello"
        assert [y.tolist() for y in comm.alltoall([np.ones(2)])] == [[1, 1]]
        assert comm.split(0, 0).size == 1
        """,
        folder=tmp_path,
    )
