"""Processes that a rank starts are of its run: they import the SDK's names, and record where the rank does."""

from __future__ import annotations

import pytest

from dtrain.metrics import read_rows
from tests.azureml.conftest import AzureProject

CHILD = """
import sys
from azureml.core import Run
run = Run.get_context()
run.log("loss", float(sys.argv[1]))
run.tag("child", run.id)
"""
TRAIN = """
import concurrent.futures, multiprocessing, os, pathlib, subprocess, sys
sys.path.append(pathlib.Path("lib"))
from azureml.core import Run
def of_the_pool(number):
    run = Run.get_context()
    run.log(f"square {number}", number * number)
    return run.id
def train():
    run = Run.get_context()
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.map(of_the_pool, [2, 3]) == [run.id] * 2
    run.log("loss", 4.0)
    subprocess.run([sys.executable, "child.py", "3.0"], check=True)
    run.log("loss", 2.0)
    assert os.system(f"{sys.executable} child.py 1.0") == 0
    with multiprocessing.get_context("fork").Pool(1) as pool:
        pool.apply(run.log, ("loss", 0.5))
    run.log("loss", 0.0)
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda number: run.log("thread", number), range(200)))
if __name__ == "__main__":
    train()
"""


@pytest.mark.parametrize("how", ["submitted", "dtrain run"])
def test_processes_of_a_rank_are_of_its_run(azure: AzureProject, how: str) -> None:
    azure.train(TRAIN)
    azure.train(CHILD, "child.py")
    if how == "submitted":
        azure.control("experiment.submit(ScriptRunConfig('src', 'train.py')).wait_for_completion(show_output=True)")
    else:
        done = azure.dtrain("run", "--azureml", "src/train.py")
        assert done.returncode == 0, done.stdout + done.stderr
    (rank,) = azure.json("show", "latest")["ranks"]
    assert [rank["metrics"][name] for name in ("square 2", "square 3", "loss")] == [4, 9, 0.0]
    rows = read_rows(azure.latest.metrics_file(0))
    losses = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    assert losses == [(0, 4.0), (1, 3.0), (2, 2.0), (3, 1.0), (4, 0.5), (5, 0.0)]
    assert [row["step"] for row in rows if "thread" in row] == [*range(200)]
    assert azure.json("show", "latest")["tags"] == {"child": azure.latest.id}
