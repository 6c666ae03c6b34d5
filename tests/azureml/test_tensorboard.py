"""TensorBoard over runs: a real one, started, asked and ended."""

from __future__ import annotations

import signal
from collections.abc import Callable

import psutil
import pytest

from tests.azureml.conftest import BEGIN, AzureProject
from tests.azureml.test_submit import told

BOARD = """
import os, signal, socket, subprocess, sys, time, urllib.request
from azureml.tensorboard import Tensorboard
from azureml.tensorboard.export import export_to_tensorboard
def asked(url, what):
    # TensorBoard reads the folders when it has begun to answer.
    while True:
        with urllib.request.urlopen(url + "data/" + what, timeout=60) as answer:
            if found := json.load(answer):
                return found
        time.sleep(0.2)
"""


@pytest.mark.needs("tensorflow")
def test_tensorboard_is_a_real_one(azure: AzureProject) -> None:
    """Over two runs, in a folder of one's own, on a port that is taken, and through a Ctrl-C; and over what was exported."""
    azure.train(
        "from tensorboard.summary import Writer\nwriter = Writer('logs')\nwriter.add_scalar('loss', 1.5, 0)\nwriter.close()\n"
        "from azureml.core import Run\nRun.get_context().log('accuracy', 0.5)"
    )
    azure.script("#!/bin/sh\necho $1 > opened", "browser")
    (azure.folder / "browser").chmod(0o755)
    azure.env = {"BROWSER": str(azure.folder / "browser") + " %s"}
    done = azure.control(
        BOARD
        + """
runs = [experiment.submit(ScriptRunConfig("src", "train.py")) for _ in range(2)]
for run in runs:
    run.wait_for_completion()
taken = socket.create_server(("", 0))
port = taken.getsockname()[1]
board = Tensorboard(runs, local_root="linked", port=port)
url = board.start(start_browser=True)
process = board._process
os.setsid()
signal.signal(signal.SIGINT, lambda *_: None)
os.killpg(0, signal.SIGINT)
both = asked(url, "runs")
board.stop()
export_to_tensorboard(experiment, "exported")
with Tensorboard([], local_root="exported") as exported:
    tags = asked(exported.start(), "plugin/scalars/tags")
print(json.dumps({
    "ids": sorted(run.id for run in runs), "both": sorted(both), "exported": tags,
    "ended": process.poll() is not None, "other port": not url.endswith(f":{port}/"),
    "opened": open("opened").read() == url + "\\n",
}))
"""
    )
    found = told(done)
    assert found["both"] == found["ids"]
    assert found["exported"] == {name: {"accuracy": {"displayName": "", "description": ""}} for name in found["ids"]}  # type: ignore[attr-defined]
    assert (found["ended"], found["other port"], found["opened"]) == (True, True, True)
    assert "is in use; TensorBoard takes port" in done.stderr


@pytest.mark.needs("tensorflow")
def test_tensorboard_ends_with_its_process_however_that_ends(azure: AzureProject, wait_until: Callable[..., None]) -> None:
    azure.script(
        BEGIN + BOARD + "run = experiment.start_logging()\nboard = Tensorboard(run)\nboard.start()\n"
        "print(board._process.pid, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)\n",
        "submit.py",
    )
    done = azure.dtrain("azureml", "submit.py")
    assert done.returncode == -signal.SIGKILL
    pid = int(done.stdout.splitlines()[-1])
    wait_until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)


def test_tensorboard_that_is_missing_or_does_not_start_says_so(azure: AzureProject) -> None:
    done = azure.control(
        BOARD
        + """
run = experiment.start_logging()
sys.modules["tensorboard"] = None  # as where it is not installed
starts = [lambda: Tensorboard(run).start(), lambda: export_to_tensorboard(run, "x")]
for what in (*starts, lambda: Tensorboard([]), lambda: Tensorboard("x"), lambda: Tensorboard([], local_root="nowhere")):
    try:
        what()
    except Exception as error:
        print(error)
del sys.modules["tensorboard"]
try:
    export_to_tensorboard([run], "x")
except Exception as error:
    print(error)
# Another one of that name, which ends at once.
os.makedirs("tensorboard")
open("tensorboard/__init__.py", "w").close()
open("tensorboard/main.py", "w").write("raise SystemExit('cannot today')")
try:
    Tensorboard(run).start()
except Exception as error:
    print(error)
"""
    )
    assert "Tensorboard takes runs, not str 'x'\nlocal_root='nowhere' is not a folder" in done.stdout
    assert "export_to_tensorboard() takes a Run or an Experiment, not [Run(" in done.stdout
    for words in ("pip install tensorboard brings it", "has nothing to show; give runs", "did not start; it said:\ncannot today"):
        assert words in done.stdout
