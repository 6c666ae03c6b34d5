"""The commands that read: their data, their --json, their help, and what they say of what is not there."""

from __future__ import annotations

import csv
import dataclasses
import io
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable

import orjson
import pytest

from dtrain.files import atomic_write
from dtrain.layout import Workspace
from dtrain.processes import ProcessRecord
from dtrain.status import RunStatus, write_record

from .conftest import Project

COMMANDS = [
    "run",
    "runs",
    "show",
    "logs",
    "stacks",
    "stop",
    "metrics",
    "register",
    "models",
    "pull",
    "verify",
    "unregister",
    "env",
]

TRAIN = """
import sys, dtrain
run = dtrain.init()
for step in range(3):
    run.log_row(step, loss=1.0 / (step + 1) + run.rank)
run.log("loss", float("nan"), step=3)
print("trained")
(run.outputs / "model.bin").write_bytes(b"weights" + sys.argv[-1].encode())
"""


@pytest.fixture
def trained(project: Project) -> Project:
    assert project.dtrain("run", project.script(TRAIN), "1").returncode == 0
    return project


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(project: Project, command: str) -> None:
    text = project.dtrain(command, "--help").stdout
    assert f"  dtrain {command}" in text.split("Example:")[1]
    assert command in project.dtrain("--help").stdout


def test_show_and_runs(trained: Project) -> None:
    run = trained.latest
    text = trained.dtrain("show", run.id[:-2]).stdout
    assert run.id in text
    assert "completed" in text
    assert str(run.outputs) in text
    data = trained.json("show", "latest")
    assert data["ranks"][0]["steps"] == 3
    assert data["spec"]["args"] == ["1"]
    assert [each["id"] for each in trained.json("runs")] == [run.id]
    assert run.id in trained.dtrain("runs").stdout


def test_metrics(trained: Project) -> None:
    rows = trained.json("metrics", "latest")
    assert [(row["step"], row["mean"]) for row in rows[:3]] == [(0, 1.0), (1, 0.5), (2, pytest.approx(1 / 3))]
    by_rank = trained.json("metrics", "latest", "--by-rank")
    assert [row["step"] for row in by_rank] == [0, 1, 2, 3]
    text = trained.dtrain("metrics", "latest", "--by-rank", "--csv").stdout
    read = list(csv.DictReader(io.StringIO(text)))
    assert [row["loss"] for row in read] == ["1.0", "0.5", str(1 / 3), "nan"]
    assert trained.dtrain("metrics", "latest", "--csv", "--json").returncode == 2


def test_logs(trained: Project) -> None:
    assert trained.dtrain("logs", "latest").stdout.endswith(":0] trained\n")
    assert trained.dtrain("logs", "latest", "--rank", "0").stdout == "trained\n"
    refused = trained.dtrain("logs", "latest", "--rank", "1")
    assert (refused.returncode, "has ranks 0 to 0" in refused.stderr) == (2, True)


def test_logs_follow_a_running_job_to_its_end(project: Project, wait_until: Callable[..., None]) -> None:
    script = project.script(
        "import os, time\nprint('first', flush=True)\n"
        "while not os.path.exists('outputs/go'):\n    time.sleep(0.05)\nprint('last')\n"
    )
    job = project.start("run", script)
    wait_until(lambda: any((project.folder / "workspace" / "runs").glob("*/ranks/00000/output.log")))
    follower = project.start("logs", "latest", "--follow")
    assert follower.stdout is not None
    assert follower.stdout.readline().endswith("first\n")
    assert project.json("show", "latest")["state"] == "running"
    (project.latest.outputs / "go").touch()
    said = follower.communicate(timeout=20)
    assert said[0].endswith("last\n")
    assert f"dtrain: run {project.latest.id} completed in " in said[1]
    job.communicate(timeout=20)


def test_logs_that_are_followed_of_a_run_that_has_ended_say_how(project: Project) -> None:
    assert project.dtrain("run", project.script("print('first'); raise SystemExit(3)")).returncode == 3
    followed = project.dtrain("logs", "-f", "latest", timeout=20)
    assert (followed.returncode, followed.stdout[-6:]) == (0, "first\n")
    assert f"dtrain: run {project.latest.id} failed after " in followed.stderr
    assert "with exit code 3\ndtrain: first to fail was rank 0" in followed.stderr
    assert project.dtrain("logs", "latest").stderr == ""


def test_logs_follow_what_another_host_writes(project: Project) -> None:
    """A file replaced by a longer copy stands for one of a network file system: only who opens it sees what came."""
    run = Workspace(project.folder / "workspace").create_run("train")
    run.make_folders(1)
    elsewhere = ProcessRecord(host="node2", pid=1, started=1.0)
    status = RunStatus(state="running", size=1, started=1.0, supervisor=elsewhere)
    for path, record in ((run.spec, status), (run.status, status), (run.rank(0).process, elsewhere)):
        write_record(path, record)
    log = run.rank(0).output_log
    log.write_text("first\n")
    follower = project.start("logs", "latest", "--follow")
    assert follower.stdout is not None
    for shown, follows in (("first", b"second\n"), ("second", b"last\n")):
        assert follower.stdout.readline() == f"[node2:0] {shown}\n"
        atomic_write(log, log.read_bytes() + follows)
    another = project.start("logs", "latest", "--follow")
    assert another.stdout is not None
    assert another.stdout.readline() == "[node2:0] first\n"
    another.send_signal(signal.SIGINT)  # Ctrl-C
    assert another.communicate(timeout=20)[1] == ""
    assert another.returncode == 130
    write_record(run.status, dataclasses.replace(status, state="completed"))
    assert follower.communicate(timeout=20)[0] == "[node2:0] last\n"


def test_stop_ends_a_running_job(project: Project, wait_until: Callable[..., None]) -> None:
    script = project.script(
        "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: (print('told', flush=True), sys.exit(0)))\n"
        "print('begun', flush=True)\ntime.sleep(60)\n"
    )
    job = project.start("run", script)
    assert job.stdout is not None
    assert "begun" in job.stdout.readline()
    done = project.dtrain("stop", "latest")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{project.latest.id}  canceled  canceled by SIGTERM\n"
    output, _ = job.communicate(timeout=20)
    assert job.returncode == 143
    assert "told" in output
    done = project.dtrain("stop", "latest")
    assert (done.returncode, done.stdout) == (0, f"{project.latest.id}  canceled  canceled by SIGTERM\n")
    assert "has ended before" in done.stderr


def test_sigusr1_is_passed_on_to_the_ranks(project: Project) -> None:
    script = project.script(
        "import signal, sys, time\nsignal.signal(signal.SIGUSR1, lambda *_: sys.exit(0))\n"
        "print('begun', flush=True)\ntime.sleep(60)\n"
    )
    job = project.start("run", script)
    assert job.stdout is not None
    assert "begun" in job.stdout.readline()
    job.send_signal(signal.SIGUSR1)
    _, words = job.communicate(timeout=20)
    assert job.returncode == 0, words


def test_register_pull_verify(trained: Project) -> None:
    registered = trained.json("register", "latest", "--name", "net", "--path", "outputs/model.bin", "--tag", "stage=test")
    assert (registered["name"], registered["version"], registered["tags"]) == ("net", 1, {"stage": "test"})
    assert trained.dtrain("run", trained.script(TRAIN), "2").returncode == 0
    assert "net:2" in trained.dtrain("register", "latest", "--name", "net").stdout
    assert [each["version"] for each in trained.json("models", "net")] == [1, 2]
    assert [each["version"] for each in trained.json("models")] == [2]
    assert trained.json("show", "latest")["models"] == ["net:2"]
    for reference, data in (("net:1", b"weights1"), ("net", b"weights2")):
        folder = trained.folder / reference
        assert trained.dtrain("pull", reference, str(folder)).returncode == 0
        assert (folder / "model.bin").read_bytes() == data
    assert trained.dtrain("verify").returncode == 0


def test_unregister(trained: Project) -> None:
    """Asks on a terminal, wants --yes where there is none, and deletes no version that is not named."""
    for _ in range(2):
        trained.json("register", "latest", "--name", "net")
    for args, code, words in (
        (("net:1",), 2, "net:1 would be deleted for good, and there is no terminal to ask on; say --yes"),
        (("net", "--yes"), 1, "'net' does not say which version is to be deleted; write net:VERSION"),
        (("net:7", "--yes"), 1, "model 'net' has no version 7; it has 1, 2"),
    ):
        done = trained.dtrain("unregister", *args)
        assert (done.returncode, words in done.stderr) == (code, True), done.stderr
    for answer, left in (("n", [1, 2]), ("y", [2])):
        ours, terminal = pty.openpty()
        os.write(ours, f"{answer}\n".encode())
        argv, environ = trained.argv("unregister", "net:1"), trained.environ()
        done = subprocess.run(argv, stdin=terminal, cwd=trained.folder, env=environ, capture_output=True, text=True, check=False)
        os.close(ours)
        os.close(terminal)
        assert (done.returncode, "Delete net:1  1 file  " in done.stderr) == (len(left) - 1, True), done.stderr
        assert [each["version"] for each in trained.json("models", "net")] == left
    assert trained.dtrain("unregister", "net:2", "--yes").stdout.endswith("  deleted\n")
    assert trained.json("models") == []
    assert trained.dtrain("verify").returncode == 0


def test_flipped_bit_in_the_registry(trained: Project) -> None:
    registered = trained.json("register", "latest", "--name", "net")
    blake3 = registered["files"][0]["blake3"]
    (blob,) = (trained.folder / "workspace" / "registry").glob(f"blobs/*/{blake3}")
    blob.chmod(0o644)
    data = bytearray(blob.read_bytes())
    data[3] ^= 1
    blob.write_bytes(data)

    verified = trained.dtrain("verify", "net:1")
    assert verified.returncode == 1
    assert "net:1  model.bin" in verified.stdout
    assert orjson.loads(trained.dtrain("verify", "--json").stdout)[0]["path"] == "model.bin"
    pulled = trained.dtrain("pull", "net", str(trained.folder / "there"))
    assert pulled.returncode == 1
    assert "model.bin" in pulled.stderr
    assert not (trained.folder / "there").exists()


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (("register", "latest", "--name", "a/b"), 2, "model name 'a/b' is not allowed"),
        (("register", "latest", "--name", "net", "--path", "outputs/nothing"), 1, "model.bin"),
        (("pull", "net", "there"), 1, "net"),
        (("models", "net"), 1, "net"),
        (("show", "nothing"), 2, "no run 'nothing'"),
        (("verify", "net"), 1, "net"),
        (("verfy",), 2, "verfy"),
    ],
)
def test_bad_input(trained: Project, args: tuple[str, ...], code: int, words: str) -> None:
    done = trained.dtrain(*args)
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_registering_a_failed_run_is_refused(project: Project) -> None:
    project.dtrain("run", project.script("open('outputs/model.bin', 'w').write('half'); raise SystemExit(1)"))
    refused = project.dtrain("register", "latest", "--name", "net")
    assert refused.returncode == 1
    assert "--any-state" in refused.stderr
    assert project.dtrain("register", "latest", "--name", "net", "--any-state").returncode == 0


def test_registering_a_run_whose_checkpoint_is_damaged_is_refused(project: Project) -> None:
    script = "import numpy as np, dtrain\nrun = dtrain.init()\nrun.checkpoints.save(1, {'w': np.ones(3)})\n"
    project.dtrain("run", project.script(script + "open('outputs/model.bin', 'w').write('m')\n"))
    (shard,) = project.latest.checkpoints.glob("*/*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1])
    refused = project.dtrain("register", "latest", "--name", "net")
    assert refused.returncode == 1
    assert "does not verify" in refused.stderr


def test_colours_only_on_a_terminal(trained: Project) -> None:
    import os
    import pty
    import subprocess
    import sys

    def on_terminal(**env: str) -> bytes:
        master, slave = pty.openpty()
        argv = [sys.executable, "-m", "dtrain.cli", "run", "train.py", "1"]
        environ = {**trained.environ(), "TERM": "xterm", **env}
        job = subprocess.Popen(argv, cwd=trained.folder, env=environ, stdout=slave, stderr=slave, stdin=slave)
        job.wait(30)
        os.close(slave)
        return os.read(master, 100_000)

    assert b"\x1b[" in on_terminal()
    assert b"\x1b[" not in on_terminal(NO_COLOR="1")
    assert "\x1b[" not in trained.dtrain("run", "train.py", "1").stdout


def test_a_loss_that_became_nan_is_seen(trained: Project) -> None:
    assert trained.json("show", "latest")["ranks"][0]["metrics"]["loss"] == "nan"
    assert "nan" in trained.dtrain("show", "latest").stdout


def test_a_damaged_run_does_not_hide_the_others(trained: Project) -> None:
    good = trained.latest.id
    assert trained.dtrain("run", "train.py", "[bold]").returncode == 0
    trained.latest.status.write_text('{"state": "completed", "of_another_version": 1}')
    assert [each["state"] for each in trained.json("runs")] == ["completed", "damaged"]
    trained.latest.status.write_text("{")
    assert [each["state"] for each in trained.json("runs")] == ["completed", "damaged"]
    text = trained.dtrain("runs").stdout
    assert good in text
    assert "damaged" in text
    shown = trained.dtrain("show", "latest")
    assert (shown.returncode, "status.json is damaged" in shown.stderr) == (2, True)


def test_what_an_ascii_terminal_cannot_show_is_escaped(project: Project) -> None:
    project.env.update(PYTHONIOENCODING="ascii")
    script = project.script("import sys\nsys.stdout.buffer.write('loss \u2193'.encode())\n")
    done = project.dtrain("run", "--env", "PYTHONIOENCODING=utf-8", script)
    assert done.returncode == 0, done.stderr
    assert "loss \\u2193" in done.stdout


def test_env(project: Project) -> None:
    data = project.json("env")
    packages = {package["name"]: package for package in data["packages"]}
    assert packages["numpy"]["version"]
    assert all(package["version"] or package["install"] for package in packages.values())
    assert data["python"] in project.dtrain("env").stdout


@pytest.mark.needs("horovod")
def test_env_says_what_horovod_was_built_with(project: Project) -> None:
    (horovod,) = [package for package in project.json("env")["packages"] if package["name"] == "horovod"]
    assert horovod["built_with"]["mpi"] is True
    assert horovod["built_with"]["nccl"] is False
    assert "built with MPI" in project.dtrain("env").stdout


def test_the_package_is_the_command(project: Project) -> None:
    done = project.run([sys.executable, "-m", "dtrain", "--help"])
    assert done.stdout.startswith("Usage: dtrain [OPTIONS] COMMAND"), done.stderr
