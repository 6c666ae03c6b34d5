"""Datastores of an object store, on a server that speaks S3, and of folders."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from email.utils import formatdate
from pathlib import Path

import pytest

from tests.azureml.conftest import AzureProject
from tests.azureml.test_submit import make_slurm, told


@dataclass(frozen=True)
class Server:
    """A server with a bucket ``data``: where it is, by the variables that say so."""

    url: str
    pid: int
    scheme: str
    variables: dict[str, str]


@contextlib.contextmanager
def serving(argv: list[str], folder: Path, make_bucket: urllib.request.Request, port: int) -> Iterator[int]:
    """A server process that has taken a request; its pid."""
    with open(folder / "log", "wb") as log, subprocess.Popen(argv, stdout=log, stderr=log) as server:
        try:
            while True:
                try:
                    urllib.request.urlopen(make_bucket).read()
                    break
                except OSError:
                    assert server.poll() is None, (folder / "log").read_text()
                    time.sleep(0.05)
            yield server.pid
        finally:
            server.kill()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    argv = [sys.executable, "-m", "moto.server", "-p", str(port)]
    variables = {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
    }
    with serving(argv, tmp_path_factory.mktemp("s3"), urllib.request.Request(f"{url}/data", method="PUT"), port) as pid:
        yield Server(url, pid, "s3", variables)


ACCOUNT = "devstoreaccount1"  # that of Azure's emulator, with a key that its documents give
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


def make_container(url: str) -> urllib.request.Request:
    """Azure's request for a container, signed by the account's key ("Authorize with Shared Key" of its documents)."""
    headers = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2021-08-06"}
    signed = "".join(f"{name}:{value}\n" for name, value in headers.items())
    text = "PUT" + "\n" * 12 + signed + f"/{ACCOUNT}/{ACCOUNT}/data\nrestype:container"
    signature = base64.b64encode(hmac.new(base64.b64decode(KEY), text.encode(), hashlib.sha256).digest()).decode()
    headers["Authorization"] = f"SharedKey {ACCOUNT}:{signature}"
    return urllib.request.Request(f"{url}/data?restype=container", method="PUT", headers=headers)


@pytest.fixture(scope="module")
def azure_storage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    port = free_port()
    folder = tmp_path_factory.mktemp("azurite")
    url = f"http://127.0.0.1:{port}/{ACCOUNT}"
    argv = [shutil.which("azurite-blob") or "", "--skipApiVersionCheck", "--disableTelemetry", "--inMemoryPersistence"]
    variables = {
        "AZURE_STORAGE_ENDPOINT": url,
        "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT,
        "AZURE_STORAGE_ACCOUNT_KEY": KEY,
    }
    with serving([*argv, "--blobPort", str(port)], folder, make_container(url), port) as pid:
        yield Server(url, pid, "az", variables)


@pytest.fixture(params=[pytest.param("s3", marks=pytest.mark.needs("s3"))])
def server(request: pytest.FixtureRequest) -> Server:
    found: Server = request.getfixturevalue(request.param)
    return found


both_servers = pytest.mark.parametrize(
    "server",
    [
        pytest.param("s3", marks=pytest.mark.needs("s3")),
        pytest.param("azure_storage", marks=pytest.mark.needs("azurite")),
    ],
    indirect=True,
)


@pytest.fixture
def bucket(azure: AzureProject, server: Server) -> AzureProject:
    """A project with a datastore ``images`` of that bucket, in a prefix of the test's own."""
    azure.env.update(server.variables)
    done = azure.dtrain("datastore", "add", "images", f"{server.scheme}://data/{azure.folder.name}", "--default")
    assert done.returncode == 0, done.stderr
    return azure


TRAIN = """
import os, sys
mounted, copied, single = sys.argv[1:]
print("numbers", *(open(path).read() for path in (mounted + "/deep/b.txt", copied + "/a.txt", single)))
print("variable", os.environ["AZUREML_DATAREFERENCE_whole"] == mounted)
for folder, text in ((mounted, "result"), (copied, "stays here")):
    open(os.path.join(folder, "written.txt"), "w").write(text)
"""


@both_servers
def test_an_object_store_is_filled_read_by_a_job_and_written_by_it(bucket: AzureProject, server: Server) -> None:
    (bucket.folder / "local" / "deep").mkdir(parents=True)
    (bucket.folder / "local" / "a.txt").write_text("1")
    (bucket.folder / "local" / "deep" / "b.txt").write_text("2 ä")
    bucket.train(TRAIN)
    done = bucket.control(
        """
store = ws.get_default_datastore()
store.upload("local", target_path="set")
open("local/a.txt", "w").write("other")
store.upload("local", target_path="set")  # what is there stays
store.upload_files("local/a.txt", target_path="single")
mounted = store.path("set", "whole").as_mount()
config = ScriptRunConfig("src", "train.py", [mounted, store.path("set").as_download(), store.path("single/a.txt").as_mount()])
run = experiment.submit(config)
run.wait_for_completion(show_output=True)
count = store.download("down", prefix="set")
print(json.dumps({"name": store.name, "count": count, "again": store.download("down"), "stores": list(ws.datastores),
                  "files": sorted(os.path.join(folder, name) for folder, _, names in os.walk("down") for name in names)}))
"""
    )
    found = told(done)
    assert "numbers 2 ä 1 other\n" in done.stdout
    assert "variable True" in done.stdout
    assert (found["name"], found["count"], found["again"]) == ("images", 3, 1)
    assert found["stores"] == ["workspaceblobstore", "workspacefilestore", "images"]
    assert found["files"] == ["down/set/a.txt", "down/set/deep/b.txt", "down/set/written.txt", "down/single/a.txt"]
    assert (bucket.folder / "down" / "set" / "written.txt").read_text() == "result"
    assert (bucket.folder / "down" / "set" / "a.txt").read_text() == "1"
    assert f"dtrain: uploaded 1 file to {server.scheme}://data/{bucket.folder.name}: set/written.txt" in done.stdout
    for words in (f"dtrain: copying set of {server.scheme}://data/{bucket.folder.name}\n", "dtrain: copied 2 files in "):
        assert done.stdout.count(words) == 2


def test_what_cannot_be_reached_is_said(bucket: AzureProject) -> None:
    for url, words in (
        ("s3://nobody/x", "s3://nobody/x cannot be listed: NoSuchBucket: The specified bucket does not exist; server, region"),
        ("s3://", "s3:// cannot be reached: "),
        (
            "gopher://data/x",
            "'gopher://data/x' is no place for files; give s3://bucket/prefix, az://container/prefix, or the path of a folder",
        ),
        ("gs://data/x", "'gs://data/x' is no place for files; give s3://bucket/prefix, az://container/prefix, or the path of"),
        (
            "az://data/x",
            "az://data/x cannot be reached: Generic MicrosoftAzure error: Account must be specified; server, account ",
        ),
        ("absent", "absent is not a folder"),
    ):
        done = bucket.dtrain("datastore", "add", "other", url)
        assert (done.returncode, words in done.stderr) == (2, True), done.stderr


def test_what_cannot_be_copied_or_uploaded_is_said(bucket: AzureProject) -> None:
    bucket.train(
        "import os, sys, time\nopen(sys.argv[1] + '/new', 'w').write('x')\n"
        "while not os.path.exists('outputs/go'): time.sleep(0.05)"
    )
    done = bucket.control(
        """
import time, urllib.request
def try_it(attempt):
    try:
        attempt()
    except Exception as error:
        print(type(error).__name__, error)
def tell(method):
    urllib.request.urlopen(urllib.request.Request(url + "/fleeting", method=method)).read()
url = os.environ["AWS_ENDPOINT_URL"]
store = ws.get_default_datastore()
failed = experiment.submit(ScriptRunConfig("src", "train.py", [store.path("nothing").as_download()]))
try_it(failed.wait_for_completion)
print(failed.get_status())
tell("PUT")
from dtrain.azureml.stores import add_store
add_store(ws._folder, "fleeting", "s3://fleeting")
run = experiment.submit(ScriptRunConfig("src", "train.py", [ws.datastores["fleeting"].path("new").as_mount()]))
while run.get_status() != "Running":
    time.sleep(0.05)
tell("DELETE")
details = run.get_details()
open(os.path.join(details["runFolder"], "outputs", "go"), "w").close()
details = run.wait_for_completion(show_output=True)
print(details["status"], details["warnings"])
os.environ["AWS_ENDPOINT_URL"] = "http://127.0.0.1:9"
try_it(lambda: store.upload("src"))
"""
    )
    lines = done.stdout.splitlines()
    assert f"failed with exit code 2: s3://data/{bucket.folder.name} has no 'nothing' to download" in lines[1]
    assert (lines[1].startswith("ActivityFailedException"), lines[3]) == (True, "Failed")
    assert "wrote to its copy of s3://fleeting is not uploaded, and stays in " in lines[-2]
    assert lines[-2].startswith("Completed")
    assert lines[-1].startswith(f"UserErrorException s3://data/{bucket.folder.name} cannot be listed: ")


REGISTERED = """
from azureml.core import Datastore
def register(name, **given):
    try:
        return Datastore.register_azure_blob_container(ws, name, "data", ACCOUNT, **given)
    except Exception as error:
        print(type(error).__name__, error)
register("images", account_key="d3Jvbmc=")
assert "AZURE_STORAGE_ACCOUNT_KEY" not in os.environ
"""


@pytest.mark.needs("azurite")
def test_a_container_is_registered_by_a_script_with_its_key(azure: AzureProject, azure_storage: Server) -> None:
    azure.env["AZURE_STORAGE_ENDPOINT"] = azure_storage.url
    done = azure.control(
        f"ACCOUNT, KEY = {ACCOUNT!r}, {KEY!r}{REGISTERED}"
        """
store = register("images", account_key=KEY)
store.upload_files(["submit.py"], target_path="registered", show_progress=False)
register("images", account_key="b3RoZXI=")
print(store.download("down", prefix="registered", show_progress=False), Datastore.get(ws, "images"))
"""
    )
    wrong, other, last = done.stdout.splitlines()[-3:]
    assert wrong.startswith(
        "UserErrorException abfss://data@devstoreaccount1.dfs.core.windows.net cannot be listed: Authorization"
    )
    assert "AZURE_STORAGE_ACCOUNT_KEY has another value already" in other
    assert last == "1 Datastore(name='images', url='abfss://data@devstoreaccount1.dfs.core.windows.net')"
    assert "AZURE_STORAGE_ACCOUNT_KEY is set for this process and its jobs, and kept nowhere" in done.stderr
    assert KEY not in done.stderr + (azure.folder / "workspace" / "azureml" / "datastore-urls" / "images.json").read_text()


@pytest.mark.needs("s3")
def test_a_container_that_does_not_answer_is_not_registered(azure: AzureProject) -> None:
    azure.env["AZURE_STORAGE_ENDPOINT"] = "http://127.0.0.1:9"
    done = azure.control(
        f"ACCOUNT = {ACCOUNT!r}{REGISTERED}"
        """
register("workspaceblobstore")
register("images", create_if_not_exists=True)
print(list(ws.datastores))
"""
    )
    unreached, taken, option, last = done.stdout.splitlines()[-4:]
    assert unreached.startswith("UserErrorException abfss://data@devstoreaccount1.dfs.core.windows.net cannot be listed: ")
    assert "; server, account and credentials are those of AZURE_STORAGE_ENDPOINT, AZURE_STORAGE_ACCOUNT_NAME, and " in unreached
    assert "overwrite=True gives the name to abfss://" in taken
    assert "create_if_not_exists=True) is not available without Azure: make the container first" in option
    assert last == "['workspaceblobstore', 'workspacefilestore']"


SLOW = """
import signal, time
store = ws.get_default_datastore()
store.upload("src", "set")
os.kill(int(os.environ["SERVER"]), signal.SIGSTOP)
config = ScriptRunConfig("src", "train.py", [store.path("set").as_download(), store.path("set", "mine").as_mount()])
run, canceled = experiment.submit(config), experiment.submit(config)
while not (lines := open(os.path.join(run.get_details()["runFolder"], "azureml", "console.log")).read()):
    time.sleep(0.05)
states = [run.get_status()]
canceled.cancel()
canceled.wait_for_completion()
os.kill(int(os.environ["SERVER"]), signal.SIGCONT)
run.wait_for_completion()
named = store.path("set", "set")
try:
    experiment.submit(ScriptRunConfig("src", "train.py", [named.as_download(), named.as_mount()]))
except Exception as error:
    refused = str(error)
print(json.dumps({"states": [*states, run.get_status(), canceled.get_status()], "lines": lines, "refused": refused}))
"""


def test_submit_waits_for_no_object_store(bucket: AzureProject, server: Server) -> None:
    """Its server answers nothing for a while: the run is Preparing, can be canceled, and goes on when it answers again."""
    bucket.env["SERVER"] = str(server.pid)
    bucket.train("import os, sys\nassert all(os.listdir(path) == ['train.py'] for path in sys.argv[1:])")
    try:
        found = told(bucket.control(SLOW))
    finally:
        os.kill(server.pid, signal.SIGCONT)
    assert found["states"] == ["Preparing", "Completed", "Canceled"]
    assert found["lines"] == f"dtrain: copying set of s3://data/{bucket.folder.name}\n"
    assert "two references to datastores are called 'set'" in str(found["refused"])


LOST = """
import signal, time
store = ws.get_default_datastore()
open("bin/answer", "w").close()
run = experiment.submit(ScriptRunConfig("src", "train.py", [store.path("set").as_mount()], compute_target="queue"))
folder = run.get_details()["runFolder"]
while not os.path.exists(os.path.join(folder, "slurm.json")):
    time.sleep(0.05)
os.kill(json.load(open(os.path.join(folder, "azureml", "supervisor.json")))["pid"], signal.SIGKILL)
open("bin/state", "w").write("COMPLETED")
while run.get_status() == "Queued":
    time.sleep(0.05)
print(run.get_status(), run.get_details()["warnings"])
"""


def test_results_that_nobody_uploads_any_more_are_named(bucket: AzureProject) -> None:
    """The job goes on under Slurm when the process that was to upload them is killed."""
    make_slurm(bucket)
    assert bucket.dtrain("compute", "add", "queue", "--slurm-partition", "debug").returncode == 0
    bucket.train("print('x')")
    last = bucket.control(LOST).stdout.splitlines()[-1]
    assert last.startswith("Failed [{'message': 'its supervisor was killed before it could upload what the job wrote to its ")


PLACES = """
from azureml.core import Datastore
os.makedirs("there")
for name in ("train-a", "train_a"):
    for store, text in ((ws.get_default_datastore(), "mine"), (Datastore.get(ws, "shared"), "shared")):
        open("there/x", "w").write(f"{text} {name}")
        store.upload("there", name, show_progress=False)
mine, shared = ws.get_default_datastore(), Datastore.get(ws, "shared")
places = [mine.path("train-a").as_mount(), mine.path("train_a").as_mount(), shared.path("train-a").as_mount(),
          mine.path("train-a").as_download(), mine.as_download(), mine]
params = {f"--{number}": place for number, place in enumerate(places)}
run = experiment.submit(Estimator("src", entry_script="train.py", script_params=params))
run.wait_for_completion(show_output=True)
for make in (lambda: mine.path("train-a", "../../../esc").as_download(),
             lambda: Estimator("src", entry_script="train.py", inputs=[mine.path("train-a", "x"), mine.path("train_a", "x")])):
    try:
        make()
    except Exception as error:
        print(type(error).__name__, error)
"""


def test_references_without_names_are_their_own_places(azure: AzureProject, tmp_path: Path) -> None:
    """Of two stores, of paths that differ in a sign, and of two modes; a copy is none of the mounted folder."""
    (tmp_path / "shared").mkdir()
    assert azure.dtrain("datastore", "add", "shared", "shared").returncode == 0
    azure.train(
        "import os, sys\nplaces = sys.argv[2::2]\nprint('read', [open(f'{place}/x').read() for place in places[:4]])\n"
        "print('whole', [sorted(os.listdir(place)) for place in places[4:]], len(set(places)))\n"
        "open(f'{places[3]}/new', 'w')"
    )
    done = azure.control(PLACES)
    assert "read ['mine train-a', 'mine train_a', 'shared train-a', 'mine train-a']" in done.stdout
    assert "whole [['train-a', 'train_a'], ['train-a', 'train_a']] 6" in done.stdout
    assert not list((azure.folder / "workspace" / "azureml").rglob("new"))
    assert "data_reference_name='../../../esc' is not allowed; use letters, digits and '_'" in done.stdout
    assert "two references to datastores are called 'x'" in done.stdout


def test_a_folder_is_a_datastore_and_names_are_kept(azure: AzureProject, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    (shared / "real").mkdir(parents=True)
    (shared / "linked").symlink_to("real")
    (shared / "real" / "x.txt").write_text("7")
    assert azure.dtrain("datastore", "add", "shared", "shared").returncode == 0
    assert azure.json("datastore", "list")["shared"] == {"url": str(shared), "default": False}
    azure.train(
        "import sys\nprint('read', *(open(path + '/x.txt').read() for path in sys.argv[1:]))\nopen(sys.argv[1] + '/new', 'w')"
    )
    done = azure.control(
        """
from azureml.core import Datastore
store = Datastore.get(ws, "shared")
config = ScriptRunConfig("src", "train.py", [store.path("real").as_mount(), store.path("linked").as_download()])
experiment.submit(config).wait_for_completion(show_output=True)
ws.set_default_datastore("shared")
print(ws.get_default_datastore().name)
try:
    Datastore.register_azure_file_share(ws, "share", "files", account_name="a")
except Exception as error:
    print(error)
files = Datastore(ws, "workspacefilestore")
files.upload_files(["submit.py"], target_path="deep", show_progress=False)
files.set_as_default()
count = files.download("copied", show_progress=False)
print(ws.get_default_datastore().name, count, os.listdir("copied/deep"), ws.datastores["workspaceblobstore"].name)
ws.set_default_datastore("shared")
store.unregister()
print(ws.get_default_datastore().name)
"""
    )
    assert "read 7 7\n" in done.stdout
    assert (shared / "real" / "new").exists()
    lines = done.stdout.splitlines()
    assert (lines[-4], lines[-2:]) == ("shared", ["workspacefilestore 1 ['submit.py'] workspaceblobstore", "workspaceblobstore"])
    assert "mount the share, and name its folder: `dtrain datastore add NAME FOLDER`" in lines[-3]
    assert azure.dtrain("datastore", "remove", "shared").returncode == 2
