"""Scripts of that SDK's age, on today's NumPy and TensorFlow: submitted as they are."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from dtrain.azureml.old_code import find_old_names
from tests.azureml.conftest import AzureProject

HELPER = "import numpy\ndef kind():\n    return numpy.float\n"
TF1 = """
import numpy as np
import tensorflow as tf
import helper
tf.app.flags.DEFINE_integer("steps", 3, "steps")
def main(_):
    x = tf.placeholder(tf.float32, [None])
    with tf.variable_scope("a"):
        w = tf.get_variable("w", [1], initializer=tf.zeros_initializer())
    step = tf.train.GradientDescentOptimizer(0.1).minimize(tf.reduce_mean(tf.square(x - w)))
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        for _ in range(tf.app.flags.FLAGS.steps):
            session.run(step, {x: np.ones(2, dtype=np.float)})
        print("w", session.run(w), helper.kind())
        tf.train.Saver().save(session, "outputs/model.ckpt")
if __name__ == "__main__":
    tf.app.run()
"""


def test_a_script_with_names_that_numpy_dropped(azure: AzureProject) -> None:
    azure.train("import numpy as np\nimport helper\nprint('kinds', np.int(2.5), helper.kind())\n")
    azure.train(HELPER, "helper.py")
    done = azure.control("experiment.submit(ScriptRunConfig('src', 'train.py')).wait_for_completion(show_output=True)")
    assert "kinds 2 <class 'float'>" in done.stdout
    assert "dtrain: train.py, line 3: np.int is no more; it runs as int, which is what to write" in done.stderr
    assert "dtrain: helper.py, line 3: numpy.float is no more" in done.stderr
    # Not so by itself under `dtrain run`, which is told to.
    assert azure.dtrain("run", "src/train.py").returncode == 1
    assert azure.dtrain("run", "--legacy-numpy", "src/train.py").returncode == 0
    assert "np.int is no more" in azure.dtrain("run", "--azureml", "src/train.py").stdout


def test_a_script_run_by_itself_has_what_its_job_would_have(azure: AzureProject) -> None:
    azure.train(HELPER, "helper.py")
    azure.train("import numpy as np\nimport helper\nprint('kinds', np.int(2.5), helper.kind())\n1 / 0\n")
    done = azure.dtrain("azureml", "src/train.py")
    assert "kinds 2 <class 'float'>" in done.stdout
    assert "dtrain: train.py, line 3: np.int is no more; it runs as int, which is what to write" in done.stderr
    assert done.stderr.count("File ") == 1  # of the traceback: none of dtrain's


@pytest.mark.needs("chainer")
def test_a_chainer_script_run_by_itself(azure: AzureProject) -> None:
    """On NumPy 2 the import alone raised."""
    azure.train("import chainer\nimport numpy as np\nprint('rounded', chainer.functions.fix(np.array([1.5])).array)")
    done = azure.dtrain("azureml", "src/train.py")
    assert (done.returncode, done.stdout.split()) == (0, ["rounded", "[1.]"]), done.stderr


@pytest.mark.needs("sklearn")
def test_a_script_that_has_joblib_from_scikit_learn(azure: AzureProject) -> None:
    azure.train(
        "from sklearn.externals import joblib\njoblib.dump([1], 'outputs/model.pkl')\nprint(joblib.load('outputs/model.pkl'))"
    )
    done = azure.control("experiment.submit(ScriptRunConfig('src', 'train.py')).wait_for_completion(show_output=True)")
    assert "[1]" in done.stdout
    assert "train.py, line 1: sklearn.externals.joblib is no more; it runs as joblib, which is what to write" in done.stderr


@pytest.mark.needs("tensorflow")
def test_a_script_of_tensorflow_1(azure: AzureProject) -> None:
    azure.train(TF1)
    azure.train(HELPER, "helper.py")
    done = azure.control(
        "from azureml.train.dnn import TensorFlow\n"
        "config = TensorFlow('src', entry_script='train.py', script_params={'--steps': 1}, compute_target=cluster)\n"
        "run = experiment.submit(config)\n"
        "run.wait_for_completion(show_output=True)\nprint(run.register_model('old', 'outputs').id)"
    )
    assert "w [0.2] <class 'float'>" in done.stdout
    assert "old:1" in done.stdout
    assert "is TensorFlow 1's; `import tensorflow` in it gives tensorflow.compat.v1" in done.stderr


@pytest.mark.needs("tensorflow")
def test_what_has_no_successor_is_named_when_it_is_submitted(azure: AzureProject) -> None:
    azure.train("if False:\n    from tensorflow.examples.tutorials.mnist import input_data\n")
    done = azure.control("experiment.submit(ScriptRunConfig('src', 'train.py')).wait_for_completion()")
    assert (
        "train.py, line 2: tensorflow.examples is gone from TensorFlow 2, and nothing runs in its place: data sets" in done.stderr
    )


KERAS = """
import os
from keras.callbacks import Callback
class Log(Callback):
    def on_epoch_end(self, epoch, log):
        print(log['val_acc'])
def save(model):
    model.save_weights(os.path.join('outputs', 'model.h5'))
    model.save_weights('outputs/model.weights.h5')
"""


@pytest.mark.needs("tensorflow")
def test_a_script_of_an_older_keras_is_told_the_lines_that_would_stop_it(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(KERAS)
    three = importlib.metadata.version("keras").startswith("3.")
    save = ["train.py, line 8: save_weights('model.h5'): Keras 3 takes names that end so: 'model.weights.h5'"] if three else []
    acc = "train.py, line 6: log['val_acc']: of metrics=['accuracy'] Keras calls it 'val_accuracy' now; write that"
    assert find_old_names(tmp_path, "train.py") == ({}, [acc, *save])
    (tmp_path / "train.py").write_text(KERAS + "def fit(model):\n    model.compile(metrics=['acc'])\n")
    assert find_old_names(tmp_path, "train.py") == ({}, save)
