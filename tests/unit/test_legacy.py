"""Names that NumPy and TensorFlow dropped: found, and replaced in one module's code without moving a line."""

from __future__ import annotations

import ast
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dtrain.legacy import NUMPY, OldModules, compile_old, gone_tensorflow, old_numpy, old_tensorflow


def run(text: str, *kinds: str) -> tuple[dict[str, Any], list[str]]:
    said: list[str] = []
    found: dict[str, Any] = {}
    exec(compile_old(text, "old.py", kinds or ("numpy",), said.append), found)
    return found, said


def test_every_name_of_the_table_runs() -> None:
    text = "import numpy\n" + "".join(f"x_{name} = numpy.{name}\n" for name in NUMPY)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some of them this NumPy still has
        found, _ = run(text)
    assert (found["x_float"], found["x_int"], found["x_object"]) == (float, int, object)
    assert (found["x_float_"], found["x_NINF"], found["x_Inf"]) == (np.float64, -math.inf, math.inf)
    assert found["x_asscalar"](np.array([3])) == 3


def test_only_names_of_numpy_are_replaced_and_each_is_told() -> None:
    mine = "class C:\n    float = 'mine'\nnp2 = C()\nfloat = None\nx = np2.float\n"
    found, said = run(f"import numpy as np\n{mine}\ny = (np.float,\n     np.int)\n")
    assert (found["x"], found["y"]) == ("mine", (__builtins__["float"], int))  # type: ignore[index]
    assert said == [
        "old.py, line 8: np.float is no more; it runs as float, which is what to write",
        "old.py, line 9: np.int is no more; it runs as int, which is what to write",
    ]
    assert not hasattr(np, "float")


def test_names_that_are_imported_from_numpy_too() -> None:
    found, said = run(
        "from numpy import array, float as f, Inf\nfrom numpy import (int,\n  bool)\nx = array([1], dtype=f)\ny = int(2.5)\n"
    )
    assert (found["x"].dtype, found["y"], found["Inf"]) == (np.float64, 2, math.inf)
    assert said[0] == "old.py, line 1: numpy.float is no more; it runs as float, which is what to write"


@pytest.mark.needs("sklearn")
def test_joblib_from_scikit_learn() -> None:
    found, said = run(
        "from sklearn.externals import joblib\nfrom sklearn.externals import joblib as j, array_api_compat\n"
        "from sklearn.externals.joblib import dump\nx = 1 / 1\n"
    )
    assert found["joblib"] is found["j"]
    assert found["joblib"].__name__ == "joblib"
    assert found["dump"] is found["joblib"].dump
    assert found["array_api_compat"].__name__ == "sklearn.externals.array_api_compat"
    gone = "sklearn.externals.joblib is no more; it runs as joblib, which is what to write"
    assert said == [f"old.py, line {line}: {gone}" for line in (1, 2, 3)]


def test_lines_stay_where_they_are() -> None:
    with pytest.raises(ZeroDivisionError) as failure:
        run("import numpy as np\nx = np.float(\n    1)\n\n1 / 0\n")
    assert failure.traceback[-1].lineno + 1 == 5


def test_modules_of_the_folder_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for folder, name in ((inside, "legacy_inside"), (outside, "legacy_outside")):
        folder.mkdir()
        (folder / f"{name}.py").write_text("import numpy as np\ndef f():\n    return np.float\n")
        monkeypatch.syspath_prepend(folder)
    finder = OldModules(inside, ["numpy"], lambda _: None)
    monkeypatch.setattr("sys.meta_path", [finder, *__import__("sys").meta_path])
    import legacy_inside  # type: ignore[import-not-found]
    import legacy_outside  # type: ignore[import-not-found]

    assert legacy_inside.f() is float
    with pytest.raises(AttributeError, match="float"):
        legacy_outside.f()
    assert not list(inside.rglob("*.pyc"))


@pytest.mark.needs("tensorflow")
def test_tensorflow_1_is_seen_by_its_names() -> None:
    text = "import tensorflow as tf\nx = tf.keras\ny = tf.train.Checkpoint\n{}\n"
    assert old_tensorflow(ast.parse(text.format("tf.compat.v1.Session()"))) == []
    (old,) = old_tensorflow(ast.parse(text.format("tf.train.AdamOptimizer(0.1)")))
    assert (old.line, old.name, old.instead) == (4, "tf.train.AdamOptimizer", "tf.compat.v1.train.AdamOptimizer")
    (old,) = old_tensorflow(ast.parse(text.format("with tf.Session() as s: pass")))
    assert old.name == "tf.Session"


@pytest.mark.needs("tensorflow")
def test_what_tensorflow_2_has_under_no_name_is_named() -> None:
    text = "import tensorflow as tf\nfrom tensorflow.examples.tutorials import mnist\nx = tf.contrib.layers\ny = tf.layers\n"
    assert [(old.line, old.name) for old in gone_tensorflow(ast.parse(text))] == [
        (2, "tensorflow.examples"),
        (3, "tensorflow.contrib"),
    ]
    assert not gone_tensorflow(
        ast.parse("import other as tf\ntf.contrib\nfrom .tensorflow import examples\nimport tensorflow.keras\n")
    )


def test_a_module_without_old_names_has_none() -> None:
    assert old_numpy(ast.parse("import numpy as np\nx = np.float64(1)\nnp.float = 1\n")) == []
