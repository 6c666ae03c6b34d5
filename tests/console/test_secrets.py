"""`--secret NAME`: the ranks have the value, and nothing that dtrain writes shows it."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from .conftest import Project

SECRET = "s3cr3t/'$HOME' v4lue"

# Writes it in two pieces, from a child, with the words of an exception, and as the last thing before it is killed.
TALKS = """
import os, signal, subprocess, sys, time
secret = os.environ["TOKEN"]
assert len(secret) == 20, "not the value"
print("in a line:", secret)
sys.stdout.write("in two pieces: " + secret[:9]); sys.stdout.flush()
time.sleep(0.1)
sys.stdout.write(secret[9:] + "\\r\\n"); sys.stdout.flush()
subprocess.run(["sh", "-c", "echo child: $TOKEN >&2"])
print(secret[:9], "is not whole", flush=True)
END
"""
ENDS = {
    "raise ValueError(f'cannot log in with {secret!r}')": (1, "ValueError: cannot log in with"),
    "sys.exit(f'no {secret}')": (1, "called sys.exit("),
    "print('at last', secret, flush=True); os.kill(os.getpid(), signal.SIGKILL)": (137, "killed by SIGKILL"),
    "print('at last', secret, end='')": (0, "completed"),
}


def written(project: Project) -> dict[Path, bytes]:
    """All that dtrain wrote, in all of its runs; not the copies of the script."""
    files = (path for path in project.folder.glob("workspace/**/*") if "code" not in path.parts)
    return {path: path.read_bytes() for path in files if path.is_file()}


@pytest.mark.parametrize("size", [1, pytest.param(2, marks=pytest.mark.needs("mpi"))])
@pytest.mark.parametrize("end", ENDS)
def test_a_secret_is_shown_nowhere(project: Project, end: str, size: int) -> None:
    project.env["TOKEN"] = SECRET
    script = project.script(TALKS.replace("END", end))
    code, words = ENDS[end]
    done = project.dtrain("run", "-n", str(size), "--secret", "TOKEN", script, f"--token={SECRET}")
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    log = project.latest.rank(0).output_log.read_bytes()
    assert log.startswith(b"in a line: ***\nin two pieces: ***\r\n")
    assert b"child: ***\n" in log
    assert f"{SECRET[:9]} is not whole".encode() in log
    assert ("at last" not in end) or b"at last ***" in log
    assert {path: data for path, data in written(project).items() if SECRET.encode() in data or b"v4lue" in data} == {}
    assert "v4lue" not in done.stdout + done.stderr
    shown = project.json("show", "latest")
    assert (shown["spec"]["secrets"], shown["spec"]["args"]) == (["TOKEN"], ["--token=***"])


@pytest.mark.needs("mpi")
def test_a_secret_stands_on_no_command_line(project: Project, wait_until: Callable[..., None]) -> None:
    project.env["TOKEN"] = secret = secrets.token_hex(8)  # another one than other tests' that run now
    script = project.script("import time\nprint('ready', flush=True)\ntime.sleep(60)\n")
    job = project.start("run", "-n", "2", "--secret", "TOKEN", script)
    wait_until(lambda: len(list(project.folder.glob("workspace/runs/*/ranks/0000?/process.json"))) == 2)
    lines = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
    job.terminate()
    job.communicate(timeout=20)
    assert not [line for line in lines if secret in line]
    assert [line for line in lines if "_rank_main" in line]


@pytest.mark.needs("mpi")
def test_nothing_is_lost_on_its_way_through_the_mask(project: Project) -> None:
    """A lot at once, until the very end, by the rank and by its children."""
    project.env["TOKEN"] = SECRET
    text = "x" * 90
    script = project.script(
        f"import os\nfor n in range(20000):\n    print(n, {text!r}, os.environ['TOKEN'])\n"
        "if os.fork() == 0:\n    os.write(1, b'child\\n')\n    os._exit(0)\nos.wait()\nos._exit(0)\n"
    )
    done = project.dtrain("run", "-n", "2", "--env", "PYTHONUNBUFFERED=1", "--secret", "TOKEN", script)
    assert done.returncode == 0, done.stderr
    expected = "".join(f"{n} {text} ***\n" for n in range(20000)) + "child\n"
    assert [project.latest.rank(rank).output_log.read_text() for rank in range(2)] == [expected] * 2


def test_a_dry_run_and_a_secret_of_the_command_line(project: Project) -> None:
    script = project.script("import os\nprint(len(os.environ['TOKEN']))\n")
    options = ("--secret", "TOKEN", "--env", f"TOKEN={SECRET}")
    dry = project.dtrain("run", "--dry-run", *options, script, SECRET)
    assert (dry.returncode, "v4lue" in dry.stdout, dry.stdout.strip().endswith("train.py '***'")) == (0, False, True)
    plan = project.dtrain("run", "--dry-run", "--json", *options, script, SECRET).stdout
    assert ("v4lue" in plan, '"secrets": [\n    "TOKEN"\n  ]' in plan) == (False, True)
    done = project.dtrain("run", *options, script)
    assert done.stdout.endswith("20\n")
    assert project.json("show", "latest")["spec"]["environment"] == {"TOKEN": "***"}


@pytest.mark.parametrize(
    ("value", "words"),
    [(None, "--secret TOKEN: there is no such variable; export it first"), ("abc", "is shorter than 4 characters")],
)
def test_secrets_that_cannot_be(project: Project, value: str | None, words: str) -> None:
    os.environ.pop("TOKEN", None)
    if value is not None:
        project.env["TOKEN"] = value
    done = project.dtrain("run", "--secret", "TOKEN", project.script(""))
    assert done.returncode == 2
    assert words in done.stderr
    assert not list(project.folder.glob("workspace/runs/*"))
