"""Notebooks, in a real Jupyter kernel: jobs are submitted, shown while they run, waited for, interrupted."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.azureml.conftest import ROOT, AzureProject

pytestmark = pytest.mark.needs("jupyter")

BEGIN = """
from azureml.core import Experiment, ScriptRunConfig, Workspace
from azureml.widgets import RunDetails
experiment = Experiment(Workspace.from_config(), "nb")
def all_shown():
    import threading
    for thread in threading.enumerate():
        if thread.name.startswith("show "):
            thread.join(60)
"""
LIVE = """
import os, time
from azureml.core import Run
run = Run.get_context()
for loss in (4, 2, 1):
    run.log("loss", loss)
run.log_row("point", x=1, y=float("nan"))
print("\\x1b[32m<begun>\\x1b[0m")
while not os.path.exists({go!r}):
    time.sleep(0.05)
print("went")
open("outputs/model.txt", "w").write("weights")
"""


def run_notebook(azure: AzureProject, *cells: str) -> list[Any]:
    """What was shown after each cell, from the third: the outputs of all cells, and the widgets."""
    return execute(azure, "%load_ext dtrain.azureml", BEGIN, *cells)[2:]


def execute(azure: AzureProject, *cells: str) -> list[Any]:
    """The same of a whole notebook."""
    azure.script(json.dumps(cells), "cells.json")
    azure.env = {"IPYTHONDIR": str(azure.folder / ".ipython"), "JUPYTER_RUNTIME_DIR": str(azure.folder / ".jupyter")}
    argv = [sys.executable, str(Path(__file__).with_name("notebook.py")), "cells.json"]
    done = subprocess.run(argv, cwd=azure.folder, env=azure.environ(), capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    after: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return after


def text_of(outputs: list[Any]) -> str:
    """What is printed and displayed in a cell; of errors name and message."""
    parts = [output.get("text") or output.get("data") or f"{output['ename']}: {output['evalue']}" for output in outputs]
    return "".join(part if isinstance(part, str) else json.dumps(part) for part in parts)


def widget_text(shown: Any) -> str:
    return "".join(str(widget["value"]) for widget in shown["widgets"] if "value" in widget)


@pytest.mark.parametrize("with_widgets", [True, False], ids=["widgets", "display"])
def test_a_job_is_shown_while_it_runs_and_its_model_registered(azure: AzureProject, with_widgets: bool) -> None:
    """The kernel stays free: other cells are executed while the run is shown, in the cell that asked for it."""
    azure.train(LIVE.format(go=str(azure.folder / "go")))
    after = run_notebook(
        azure,
        "" if with_widgets else "import sys\nsys.modules['ipywidgets'] = None",
        "run = experiment.submit(ScriptRunConfig('src', 'train.py'))\nRunDetails(run).show()",
        "# until: &lt;begun&gt;\nrun.get_status()",
        "open('go', 'w').close()\nrun.wait_for_completion(show_output=True)['status']",
        "all_shown()\nprint(run.get_metrics())\nrun.register_model('net', 'outputs/model.txt').id",
    )
    while_it_ran, ended = (widget_text(after[index]) if with_widgets else text_of(after[index]["outputs"][3]) for index in (2, 4))
    assert "Running" in while_it_ran
    assert "Completed" in ended
    assert "went" in ended
    assert "went" not in while_it_ran
    for page in (while_it_ran, ended):
        assert ">loss<" in page
        assert "polyline points" in page
        assert ">point.y<" in page
    outputs = after[-1]["outputs"]
    assert "Status: Completed" in text_of(outputs[5])
    assert "{'loss': [4, 2, 1], 'point': {'x': 1, 'y': nan}}" in text_of(outputs[6])
    assert "'net:1'" in text_of(outputs[6])


@pytest.mark.needs("mpi")
def test_every_ranks_log_can_be_chosen(azure: AzureProject) -> None:
    azure.train(
        "import os\nrank = os.environ['OMPI_COMM_WORLD_RANK']\nprint('this is rank', rank)\nassert rank == '0', 'one is bad'"
    )
    after = run_notebook(
        azure,
        "from azureml.core.runconfig import MpiConfiguration\n"
        "config = ScriptRunConfig('src', 'train.py', distributed_job_config=MpiConfiguration(2))\n"
        "run = experiment.submit(config)\nrun.wait_for_completion(raise_on_error=False)",
        "import ipywidgets, gc\nRunDetails(run).show()\nall_shown()",
        "choice, = [each for each in gc.get_objects() if type(each) is ipywidgets.Dropdown]\nprint(choice.options, choice.value)",
        "choice.value = choice.options[0]",
    )
    failed, chosen = (widget_text(after[index]) for index in (2, 3))
    assert "rank 1 on " in failed  # the cause
    assert "this is rank 1" in failed
    assert "this is rank 0" in chosen
    assert "this is rank 1" not in chosen
    assert "std_log_process_01.txt') user_logs/std_log_process_01.txt" in text_of(after[-1]["outputs"][4])


def test_what_fails_is_told_in_its_cell_and_the_kernel_goes_on(azure: AzureProject) -> None:
    azure.train("raise ValueError('bad batch')")
    after = run_notebook(
        azure,
        "experiment.submit(ScriptRunConfig('src', 'tran.py'))",
        "from azureml.core import Webservice\nprint('imported')\nWebservice(None, 'x')",
        "run = experiment.submit(ScriptRunConfig('src', 'train.py'))\nrun.wait_for_completion(show_output=True)",
        "run.get_status()",
    )
    cells = [text_of(outputs) for outputs in after[-1]["outputs"][2:]]
    assert "UserErrorException" in cells[0]
    assert "did you mean train.py" in cells[0]
    assert "imported" in cells[1]
    assert "models are registered and downloaded here" in cells[1]
    assert "ActivityFailedException" in cells[2]
    assert "ValueError: bad batch" in cells[2]
    assert cells[3] == '{"text/plain": "\'Failed\'"}'


def test_an_interrupt_stops_the_waiting_and_not_the_run(azure: AzureProject) -> None:
    """Jupyter interrupts the kernel with its whole process group."""
    azure.train(
        f"import os, time\nopen({str(azure.folder / 'begun')!r}, 'w').close()\n" + LIVE.format(go=str(azure.folder / "go"))
    )
    after = run_notebook(
        azure,
        "run = experiment.submit(ScriptRunConfig('src', 'train.py'))\nRunDetails(run).show()",
        "# interrupt when: begun\nrun.wait_for_completion(show_output=True)",
        "run.get_status()",
        "open('go', 'w').close()\nrun.wait_for_completion()['status']",
        "all_shown()",
    )
    cells = [text_of(outputs) for outputs in after[-1]["outputs"][2:]]
    assert "ExperimentExecutionException" in cells[1]
    assert "the run goes on" in cells[1]
    assert "'Running'" in cells[2]
    assert "'Completed'" in cells[3]
    assert "Completed" in widget_text(after[-1])


@pytest.mark.needs("chainer", "sklearn")
def test_the_example(azure: AzureProject) -> None:
    shutil.copytree(ROOT / "examples" / "azureml", azure.folder, dirs_exist_ok=True)
    notebook = json.loads((azure.folder / "notebook.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    outputs = execute(azure, *cells)[-1]["outputs"]
    assert not [output for shown in outputs for output in shown if "ename" in output]
    assert "'Completed'" in text_of(outputs[4])
    assert [model["id"] for model in azure.json("models")] == ["notebook-digits:1"]
