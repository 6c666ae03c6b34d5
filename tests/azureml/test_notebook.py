"""A notebook submits a job: with a real Jupyter kernel, where one is installed."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.azureml.conftest import AzureProject

# In a process of its own, whose environment the kernel inherits.
NOTEBOOK = """
import nbformat
from nbclient import NotebookClient
CELLS = [
    "%load_ext dtrain.azureml",
    "from azureml.core import Experiment, ScriptRunConfig, Workspace\\nexperiment = Experiment(Workspace.from_config(), 'nb')",
    "run = experiment.submit(ScriptRunConfig('src', 'train.py'))\\nrun.wait_for_completion(show_output=True)['status']",
    "import os, time\\nfrom azureml.widgets import RunDetails\\n"
    "run = experiment.submit(ScriptRunConfig('src', 'waits.py'))\\nRunDetails(run).show()",
    # The kernel is free while the run is shown; a cell whose output changes later.
    "open('go', 'w').close()\\nrun.wait_for_completion()\\nimport threading\\n"
    "[t.join(60) for t in threading.enumerate() if t.name.startswith('show')]\\nNone",
]
notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in CELLS])
NotebookClient(notebook, kernel_name="python3", timeout=60).execute()
for cell in notebook.cells:
    for output in cell.outputs:
        print(output.get("text") or output.get("data"))
"""


@pytest.mark.needs("jupyter")
def test_a_submit_from_a_notebook(azure: AzureProject) -> None:
    azure.train("from azureml.core import Run\nRun.get_context().log('loss', 0.5)\nprint('hello')")
    azure.train(
        f"import os, time\nwhile not os.path.exists({str(azure.folder / 'go')!r}): time.sleep(0.05)\nprint('<went>')", "waits.py"
    )
    azure.script(NOTEBOOK, "notebook.py")
    argv = [sys.executable, "notebook.py"]
    done = subprocess.run(argv, cwd=azure.folder, env=azure.environ(), capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert "hello" in done.stdout
    assert "'Completed'" in done.stdout
    assert "<tr><th>state</th><td>Completed</td></tr>" in done.stdout
    assert "&lt;went&gt;" in done.stdout
