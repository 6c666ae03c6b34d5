"""Datastores of an object store, on a server that speaks S3, and of folders."""

from __future__ import annotations

import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.azureml.conftest import AzureProject
from tests.azureml.test_submit import told


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a server with a bucket ``data``."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    path = tmp_path_factory.mktemp("s3") / "log"
    argv = [sys.executable, "-m", "moto.server", "-p", str(port)]
    with open(path, "wb") as log, subprocess.Popen(argv, stdout=log, stderr=log) as server:
        try:
            url = f"http://127.0.0.1:{port}"
            while True:
                try:
                    urllib.request.urlopen(urllib.request.Request(f"{url}/data", method="PUT")).read()
                    break
                except OSError:
                    assert server.poll() is None, path.read_text()
            yield url
        finally:
            server.kill()


@pytest.fixture
def bucket(azure: AzureProject, endpoint: str) -> AzureProject:
    """A project with a datastore ``images`` of that bucket, in a prefix of the test's own."""
    azure.env.update(AWS_ENDPOINT_URL=endpoint, AWS_ACCESS_KEY_ID="key", AWS_SECRET_ACCESS_KEY="secret", AWS_REGION="us-east-1")
    done = azure.dtrain("datastore", "add", "images", f"s3://data/{azure.folder.name}", "--default")
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


@pytest.mark.needs("s3")
def test_an_object_store_is_filled_read_by_a_job_and_written_by_it(bucket: AzureProject) -> None:
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
store.upload_files(["local/a.txt"], target_path="single")
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
    assert (found["name"], found["count"], found["again"], found["stores"]) == ("images", 3, 1, ["workspaceblobstore", "images"])
    assert found["files"] == ["down/set/a.txt", "down/set/deep/b.txt", "down/set/written.txt", "down/single/a.txt"]
    assert (bucket.folder / "down" / "set" / "written.txt").read_text() == "result"
    assert (bucket.folder / "down" / "set" / "a.txt").read_text() == "1"
    assert f"dtrain: uploaded 1 file to s3://data/{bucket.folder.name}: set/written.txt" in done.stdout


@pytest.mark.needs("s3")
def test_what_cannot_be_reached_or_uploaded_is_said(bucket: AzureProject, endpoint: str) -> None:
    for url, words in (
        ("s3://nobody/x", "s3://nobody/x cannot be listed: NoSuchBucket: The specified bucket does not exist; server, region"),
        ("s3://", "s3:// cannot be reached: "),
        ("gopher://data/x", "'gopher://data/x' is no place for files; give s3://bucket/prefix, or the path of a folder"),
        ("absent", "absent is not a folder"),
    ):
        done = bucket.dtrain("datastore", "add", "other", url)
        assert (done.returncode, words in done.stderr) == (2, True), done.stderr
    bucket.train(
        "import os, sys, time\nopen(sys.argv[1] + '/new', 'w').write('x')\n"
        "while not os.path.exists('outputs/go'): time.sleep(0.05)"
    )
    done = bucket.control(
        """
import urllib.request
def try_it(attempt):
    try:
        attempt()
    except Exception as error:
        print(type(error).__name__, error)
def tell(method):
    urllib.request.urlopen(urllib.request.Request(url + "/fleeting", method=method)).read()
url = os.environ["AWS_ENDPOINT_URL"]
store = ws.get_default_datastore()
try_it(lambda: experiment.submit(ScriptRunConfig("src", "train.py", [store.path("nothing").as_download()])))
tell("PUT")
from dtrain.azureml.stores import add_store
add_store(ws._folder, "fleeting", "s3://fleeting")
run = experiment.submit(ScriptRunConfig("src", "train.py", [ws.datastores["fleeting"].path("new").as_mount()]))
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
    assert any("datastore 'images' has no 'nothing' to download" in line for line in lines)
    assert "wrote to its copy of s3://fleeting is not uploaded, and stays in " in lines[-2]
    assert lines[-2].startswith("Completed")
    assert lines[-1].startswith(f"UserErrorException s3://data/{bucket.folder.name} cannot be listed: ")


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
    Datastore.register_azure_blob_container(ws, "blob", "container", account_name="a")
except Exception as error:
    print(error)
store.unregister()
print(ws.get_default_datastore().name)
"""
    )
    assert "read 7 7\n" in done.stdout
    assert (shared / "real" / "new").exists()
    assert done.stdout.splitlines()[-3::2] == ["shared", "workspaceblobstore"]
    assert "`dtrain datastore add NAME s3://bucket/prefix`" in done.stdout
    assert azure.dtrain("datastore", "remove", "shared").returncode == 2
