"""Packages that jobs ask for and this Python has not: installed by pip, from wheels of the test's own, into environments."""

from __future__ import annotations

import base64
import hashlib
import platform
import re
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from dtrain.azureml.packages import missing_packages
from tests.azureml.conftest import AzureProject
from tests.azureml.test_submit import told
from tests.console.conftest import another_python

TRAIN = """
import sys
import numpy, toy
from mpi4py import MPI
print("toy", toy.VERSION, MPI.COMM_WORLD.size, "environments" in sys.executable)
"""
ESTIMATOR = """Estimator(
    source_directory="src", entry_script="train.py", compute_target=cluster, node_count=2,
    distributed_training=MpiConfiguration(), pip_packages=["numpy", "toy==1.1"],
)"""


def wheel(folder: Path, name: str, version: str, requires: str = "") -> None:
    """A package of one module, as pip takes it from a folder."""
    folder.mkdir(exist_ok=True)
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n" + (f"Requires-Dist: {requires}\n" if requires else "")
    files = {
        f"{name}.py": f"VERSION = {version!r}\n",
        f"{info}/METADATA": metadata,
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    lines = []
    for path, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        lines.append(f"{path},sha256={digest},{len(text)}")
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
        archive.writestr(f"{info}/RECORD", "\n".join([*lines, f"{info}/RECORD,,"]) + "\n")


@pytest.fixture
def shop(azure: AzureProject) -> AzureProject:
    """A project whose pip knows two versions of ``toy``, and one of ``needy``, which wants an mpi4py of long ago."""
    for version in ("1.0", "1.1"):
        wheel(azure.folder / "wheels", "toy", version)
    wheel(azure.folder / "wheels", "needy", "1.0", requires="mpi4py<2")
    azure.env.update(PIP_NO_INDEX="1", PIP_FIND_LINKS=str(azure.folder / "wheels"))
    return azure


def environments(azure: AzureProject) -> list[str]:
    return sorted(path.name for path in (azure.folder / "workspace" / "environments").iterdir())


@pytest.mark.needs("mpi")
def test_two_jobs_at_once_share_an_environment_with_what_is_missing(shop: AzureProject) -> None:
    shop.train(TRAIN)
    done = shop.control(
        f"""
runs = [experiment.submit({ESTIMATOR}) for _ in range(2)]
first = runs[0].get_status()
details = [run.wait_for_completion(show_output=True) for run in runs]
print(json.dumps({{
    "first": first, "status": [each["status"] for each in details], "files": [run.get_file_names() for run in runs],
    "python": details[0]["runDefinition"]["environment"]["python"]["interpreterPath"],
}}))
"""
    )
    found = told(done)
    assert (found["first"], found["status"]) == ("Preparing", ["Completed", "Completed"])
    assert done.stdout.count("toy 1.1 2 True") == 4
    assert done.stdout.count("making an environment with toy==1.1") == 1
    log = "azureml-logs/20_image_build_log.txt"
    assert sorted(log in names for names in found["files"]) == [False, True]  # type: ignore[union-attr, attr-defined]
    record, lock, folder = environments(shop)[1], environments(shop)[2], environments(shop)[0]
    assert re.fullmatch(r"([0-9a-f]{16})-[0-9a-f]{8} \1.json \1.lock", f"{folder} {record} {lock}")
    assert f"/{folder}/bin/python" in str(found["python"])
    system = (shop.folder / "workspace" / "environments" / folder / "pyvenv.cfg").read_text()
    assert f"include-system-site-packages = {str(sys.prefix == sys.base_prefix).lower()}\n" in system
    # A later job finds it; a bare script's ranks know the MPI as well.
    shop.control(ESTIMATOR.replace("Estimator", "run = experiment.submit(Estimator", 1) + ")\nrun.wait_for_completion()")
    assert len(environments(shop)) == 3
    alone = (
        "experiment.submit(Estimator('src', entry_script='train.py', pip_packages=['toy'])).wait_for_completion(show_output=True)"
    )
    assert "toy 1.1 1 True" in shop.control(alone).stdout
    assert len(environments(shop)) == 6


@pytest.mark.parametrize(
    ("package", "words", "is_installed"),
    [
        ("toy==7", "No matching distribution found for toy==7", False),
        ("click==99", "No matching distribution found for click==99", True),
        pytest.param("needy", r"needy 1.0 depends on mpi4py<2", False, marks=pytest.mark.needs("mpi")),
    ],
)
def test_what_pip_cannot_install_fails_the_run_with_its_words(
    shop: AzureProject, package: str, words: str, is_installed: bool
) -> None:
    """``--any-version`` is named where another version is installed, and nowhere else."""
    shop.train(TRAIN)
    done = shop.try_control(
        f"""
run = experiment.submit(Estimator("src", entry_script="train.py", pip_packages=[{package!r}]))
try:
    run.wait_for_completion()
except Exception as error:
    print(type(error).__name__, error)
print(run.get_status(), "azureml-logs/20_image_build_log.txt" in run.get_file_names())
"""
    )
    assert re.search(rf"(?s)ActivityFailedException.*the environment that the job asks for cannot be made.*{words}", done.stdout)
    assert ("--any-version" in done.stdout) == is_installed
    assert done.stdout.endswith("Failed True\n")
    assert [name for name in environments(shop) if not name.endswith(".lock")] == []


def test_a_run_is_canceled_while_pip_works(shop: AzureProject, wait_until: Callable[..., None]) -> None:
    """pip waits for an index that never answers."""
    import socket

    shop.train(TRAIN)
    with socket.create_server(("127.0.0.1", 0)) as server:
        shop.env.pop("PIP_NO_INDEX")
        shop.env["PIP_INDEX_URL"] = f"http://127.0.0.1:{server.getsockname()[1]}/simple"
        done = shop.control(
            """
import time
run = experiment.submit(Estimator("src", entry_script="train.py", pip_packages=["elsewhere"]))
log = os.path.join(run.get_details()["runFolder"], "azureml", "console.log")
for _ in range(600):
    if "making an environment" in open(log).read():
        break
    time.sleep(0.05)
else:
    sys.exit(open(log).read())
run.cancel()
run.wait_for_completion()
print(run.get_status())
"""
        )
    assert done.stdout.splitlines()[-1] == "Canceled"
    wait_until(lambda: [name for name in environments(shop) if not name.endswith(".lock")] == [])
    assert not shop.supervisors()


FORKED = """
import os, signal, sys
from pathlib import Path
from dtrain.azureml import venv
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
os.register_at_fork(before=lambda: os.kill(os.getpid(), signal.SIGTERM))
venv._run(["/bin/sleep", "600"], Path("log"))
"""


def test_a_cancel_is_heard_also_while_pip_is_being_started(shop: AzureProject) -> None:
    """Where Python forks, it ignores what a signal's handler raises; nor is the process left that was being started."""
    shop.script(FORKED)
    assert shop.run([sys.executable, "train.py"]).returncode == 143


UNHEARD = """
import os, signal, sys, threading
from pathlib import Path
from dtrain.azureml import venv
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGTERM]).start()
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
venv._run(["/bin/sleep", "600"], Path("log"))
"""


def test_a_cancel_is_heard_also_where_it_interrupts_no_waiting(shop: AzureProject) -> None:
    """As one that comes just before the waiting; here another thread is sent the signal."""
    shop.script(UNHEARD)
    assert shop.run([sys.executable, "train.py"], timeout=30).returncode == 143


def test_no_install_and_a_python_of_ones_own(shop: AzureProject) -> None:
    shop.train("import sys\nprint(sys.executable)")
    text = "experiment.submit(Estimator('src', entry_script='train.py', pip_packages=['toy==1.0', 'numpy']))"
    done = shop.try_control(text, "--no-install")
    assert re.search(r"has not: toy==1.0 \(not installed\); run: .* -m pip install toy==1.0$", done.stderr.strip())
    assert not (shop.folder / "workspace" / "environments").exists()
    another_python(shop.folder / "other")
    done = shop.control(
        """
environment = Environment("mine")
environment.python.user_managed_dependencies = True
environment.python.interpreter_path = "other/bin/python"
experiment.submit(ScriptRunConfig("src", "train.py", environment=environment)).wait_for_completion(show_output=True)
"""
    )
    assert f"{shop.folder}/other/bin/python" in done.stdout


def test_what_is_missing_is_asked_for_by_its_name_of_today() -> None:
    """And what cannot be installed for one job is refused, whatever the options."""
    wanted, notes = missing_packages(["Toy_X[fast]>=2; python_version>'3'"], ["toy=1", "pip"], any_version=False, install=True)
    assert (wanted, notes) == (["toy==1.*", 'toy-x[fast]>=2; python_version > "3"'], [])
    with pytest.raises(
        Exception, match=r"chainer>=99 \([^;]*\); ask for another version(, or accept .*)?$"
    ):  # no command brings that one
        missing_packages(["chainer>=99"], [], any_version=False, install=True)
    assert missing_packages(["numpy==1.9.1"], [], any_version=True, install=True)[0] == []


def test_a_job_that_asks_for_a_python_of_its_time_runs_by_this_one_and_says_so_once(azure: AzureProject) -> None:
    """As nearly every environment of Azure's does."""
    azure.train("print('trained')")
    (azure.folder / "conda.yml").write_text("name: e\ndependencies:\n- python=3.6.2\n- pip:\n  - numpy\n")
    done = azure.control(
        """
from azureml.core.conda_dependencies import CondaDependencies
made = CondaDependencies.create(python_version="3.5")
made.set_python_version("3.6.2")
environment = Environment("of its time")
environment.python.conda_dependencies = made
for each in (environment, Environment.from_conda_specification("from a file", "conda.yml")):
    experiment.submit(ScriptRunConfig("src", "train.py", environment=each)).wait_for_completion(show_output=True)
print(made.serialize_to_string())
"""
    )
    version = re.escape(f"Python {platform.python_version()}")
    assert len(re.findall(rf"asked for python==3\.6\.2\.\*; it runs with {version}", done.stdout + done.stderr)) == 2
    assert done.stdout.count("trained") == 2
    assert "3.5" not in done.stdout
