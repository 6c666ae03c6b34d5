"""`dtrain run`: what reaches the script, what it leaves, and every way in which a rank can fail."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import orjson
import psutil
import pytest

from dtrain.files import read_json
from dtrain.metrics import read_metrics
from dtrain.status import read_status

from .conftest import ROOT, Project

LAUNCHES = [pytest.param(("-n", "1"), id="one rank"), pytest.param(("-n", "2"), id="two ranks", marks=pytest.mark.needs("mpi"))]

REPORT = """
import json, os, sys
from pathlib import Path
import dtrain
run = dtrain.init()
print("rank", run.rank, "of", run.size)
Path("outputs", f"report-{run.rank}.json").write_text(json.dumps({
    "argv": sys.argv, "name": __name__, "cwd": os.getcwd(), "first_path": sys.path[0], "threads": os.environ["OMP_NUM_THREADS"],
    "mine": os.environ.get("MINE"), "local": [run.local_rank, run.local_size]}))
run.log("loss", 0.5 + run.rank, step=7)
run.tags["who"] = "me"
"""

FAILURES = {
    # how rank 1 fails → (exit code, what the console says of it)
    "raise ValueError('bad batch')": (1, "ValueError: bad batch"),
    "sys.exit(3)": (3, "called sys.exit(3)"),
    "raise SystemExit('no data')": (1, "called sys.exit('no data')"),
    "os._exit(5)": (5, "exited with code 5"),
    "os.kill(os.getpid(), signal.SIGKILL)": (137, "killed by SIGKILL"),
    "os.kill(os.getppid(), signal.SIGKILL); time.sleep(60)": (137, "killed together with the process that watched it"),
    "os.abort()": (134, "killed by SIGABRT"),
    "raise ValueError('bad \\udc80')": (1, "ValueError: bad \\udc80"),
    "import ctypes; ctypes.string_at(0)": (139, "Fatal Python error: Segmentation fault"),
}

FAIL_LAST = """
import os, signal, sys, time
rank = int(os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK", os.environ.get("DTRAIN_RANK"))))
size = int(os.environ["DTRAIN_SIZE"])
print("before", rank)
if rank == size - 1:
    {how}
time.sleep(60)
"""


@pytest.mark.parametrize("ranks", LAUNCHES)
def test_what_reaches_the_script_and_what_it_leaves(project: Project, ranks: tuple[str, ...]) -> None:
    project.env.pop("OMP_NUM_THREADS", None)
    script = project.script(REPORT)
    size = int(ranks[1])

    done = project.dtrain(
        "run", *ranks, "--env", "MINE=a=b", "--experiment", "first", script, "--epochs", "3", "-n", "x y", "--", "--help"
    )

    assert done.returncode == 0, done.stderr
    assert {f"rank {rank} of {size}" for rank in range(size)} == {line.split("] ")[1] for line in done.stdout.splitlines()}
    run = project.latest
    assert run.id.startswith("first-")
    for rank in range(size):
        report = orjson.loads((run.outputs / f"report-{rank}.json").read_bytes())
        assert report["argv"] == [script, "--epochs", "3", "-n", "x y", "--", "--help"]
        assert report["name"] == "__main__"
        assert report["cwd"] == report["first_path"] == str(run.code)
        assert report["mine"] == "a=b"
        assert report["local"] == [rank, size]
        assert run.rank(rank).done.is_file()
        assert run.rank(rank).output_log.read_text() == f"rank {rank} of {size}\n"
    data = project.json("show", "latest")
    assert (data["state"], data["exit_code"], data["tags"]) == ("completed", 0, {"who": "me"})
    assert [rank["metrics"] for rank in data["ranks"]] == [{"loss": 0.5 + rank} for rank in range(size)]
    assert data["over_ranks"]["loss"]["mean"] == pytest.approx(0.5 + (size - 1) / 2)


@pytest.mark.parametrize(
    "family", [pytest.param("openmpi", marks=pytest.mark.needs("mpi")), pytest.param("mpich", marks=pytest.mark.needs("mpich"))]
)
@pytest.mark.parametrize("how", FAILURES)
def test_first_failure_is_named_and_ends_the_job(project: Project, how: str, family: str) -> None:
    if family == "mpich":
        project.env["DTRAIN_MPIRUN"] = str(Path(os.environ["DTRAIN_TEST_MPICH_PYTHON"]).parent / "mpirun")
    script = project.script(FAIL_LAST.format(how=how))
    code, words = FAILURES[how]

    done = project.dtrain("run", "-n", "2", "--grace", "5", script, timeout=40)  # the other rank would sleep for 60 s

    assert done.returncode == code, done.stderr
    assert words in done.stderr
    if not ("getppid" in how and family == "mpich"):  # MPICH kills all ranks before one can tell which was the first
        assert done.stderr.splitlines()[-1].endswith("ranks/00001/output.log")
        assert f"first to fail was rank 1 on {os.uname().nodename}" in done.stderr
    assert project.json("show", "latest")["exit_code"] == code
    if "bad batch" in how:
        tail = done.stderr[done.stderr.index("first to fail") :]
        assert "Traceback" in tail
        assert "train.py" in tail
        assert "runpy" not in tail
    assert "prterun" not in done.stdout  # what the launcher says of it would bury the cause


@pytest.mark.parametrize("how", [how for how in FAILURES if "getppid" not in how])
def test_failure_of_a_single_rank(project: Project, how: str) -> None:
    code, words = FAILURES[how]
    done = project.dtrain("run", project.script(FAIL_LAST.format(how=how)))
    assert done.returncode == code
    assert words in done.stderr


@pytest.mark.parametrize(
    "family", [pytest.param("openmpi", marks=pytest.mark.needs("mpi")), pytest.param("mpich", marks=pytest.mark.needs("mpich"))]
)
def test_a_call_of_mpi_abort_is_told_as_that(project: Project, family: str) -> None:
    """MPICH kills the ranks at once, guards and all."""
    python = os.environ["DTRAIN_TEST_MPICH_PYTHON"] if family == "mpich" else sys.executable
    calls = "from mpi4py import MPI\nif MPI.COMM_WORLD.rank == 1:\n    MPI.COMM_WORLD.Abort(7)\nMPI.COMM_WORLD.Barrier()\n"
    done = project.dtrain("run", "-n", "2", "--python", python, project.script(calls))
    assert done.returncode == 7, done.stderr
    assert f"first to fail was rank 1 on {os.uname().nodename}: called MPI_Abort(7)" in done.stderr


@pytest.mark.needs("mpi")
def test_failure_while_the_other_waits_in_a_collective(project: Project) -> None:
    """mpi4py calls MPI_Finalize at exit, which would wait for the rank that waits in the barrier."""
    script = project.script(
        "from mpi4py import MPI\nif MPI.COMM_WORLD.rank == 0:\n    raise KeyError('lost')\nMPI.COMM_WORLD.Barrier()\n"
    )
    done = project.dtrain("run", "-n", "2", script)
    assert done.returncode == 1
    assert "first to fail was rank 0" in done.stderr
    assert "KeyError: 'lost'" in done.stderr


@pytest.mark.parametrize("ranks", LAUNCHES)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted(project: Project, ranks: tuple[str, ...], number: int, code: int, wait_until: Callable[..., None]) -> None:
    size = int(ranks[1])
    script = project.script("import time\nprint('ready')\ntime.sleep(60)\n")
    job = project.start("run", *ranks, script)
    wait_until(lambda: bool(project.processes()) and all(_printed(project, rank) for rank in range(size)))

    job.send_signal(number)
    _, err = job.communicate(timeout=20)

    assert job.returncode == code
    assert f"{signal.Signals(number).name}: the ranks are told to end, within 10 s; a second signal kills them at once" in err
    assert f"canceled by {signal.Signals(number).name}" in err
    assert project.json("show", "latest")["state"] == "canceled"


def _printed(project: Project, rank: int) -> bool:
    log = project.latest.rank(rank).output_log
    return log.is_file() and log.stat().st_size > 0


@pytest.mark.needs("mpi")
def test_rank_that_will_not_end_is_killed_after_the_grace_time(project: Project) -> None:
    script = project.script(
        "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('deaf', flush=True)\ntime.sleep(60)\n"
    )
    done = project.dtrain("run", "-n", "2", "--timeout", "2", "--grace", "1", script, timeout=40)
    assert done.returncode == 124
    assert "time limit of 2 s reached" in done.stderr


SAVES_ON_TERM = """
import os, signal, sys, time
from pathlib import Path
from mpi4py import MPI
rank = MPI.COMM_WORLD.rank
def save(*_):
    time.sleep(1 + 2 * rank)
    Path("outputs", f"saved-{rank}").touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
while True:
    time.sleep(0.1)
"""


@pytest.mark.parametrize(
    "family",
    [
        pytest.param("openmpi", marks=pytest.mark.needs("mpi")),
        pytest.param("mpich", marks=pytest.mark.needs("mpich")),
    ],
)
def test_ranks_have_their_grace_time_whatever_the_launcher(
    project: Project, family: str, wait_until: Callable[..., None]
) -> None:
    """mpirun itself kills its ranks a moment after it was told to end, or when the first of them has."""
    if family == "mpich":
        python = os.environ["DTRAIN_TEST_MPICH_PYTHON"]
        project.env["DTRAIN_MPIRUN"] = str(Path(python).parent / "mpirun")
        argv = [python, "-m", "dtrain.cli", "run", "-n", "2", "--grace", "20", project.script(SAVES_ON_TERM)]
        job = subprocess.Popen(argv, cwd=project.folder, env=project.environ(), stderr=subprocess.PIPE, text=True)
    else:
        job = project.start("run", "-n", "2", "--grace", "20", project.script(SAVES_ON_TERM))
    wait_until(lambda: bool(project.processes()) and all(_printed(project, rank) for rank in range(2)))
    job.send_signal(signal.SIGTERM)
    _, err = job.communicate(timeout=40)
    assert job.returncode == 143, err
    assert sorted(path.name for path in project.latest.outputs.glob("saved-*")) == ["saved-0", "saved-1"]


@pytest.mark.parametrize(("then", "code"), [("", 0), ("time.sleep(60)", 123)])
def test_who_does_not_read_the_console_stops_nobody(
    project: Project, wait_until: Callable[..., None], then: str, code: int
) -> None:
    lines = 100_000
    script = project.script(f"import time\nfor n in range({lines}):\n    print(n, 'x' * 100)\n{then}\n")
    job = project.start("run", "--hang-timeout", "3", script)
    wait_until(lambda: any(project.folder.glob("workspace/runs/*/status.json")) and read_status(project.latest).is_over)
    out, err = job.communicate(timeout=40)
    assert (job.returncode, read_status(project.latest).exit_code) == (code, code), err
    shown = [line.split()[1] for line in out.splitlines()]
    assert shown == [str(n) for n in range(lines)]


def test_daemon_of_a_script_is_ended_with_the_run(project: Project) -> None:
    script = project.script(
        "import subprocess, sys\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], start_new_session=True)\n"
    )
    done = project.dtrain("run", script)
    assert done.returncode == 0  # and the fixture sees that nothing is left


@pytest.mark.needs("mpi")
def test_killed_dtrain_leaves_no_rank_nor_what_ranks_started(project: Project, wait_until: Callable[..., None]) -> None:
    script = "import subprocess, time\nsubprocess.Popen(['sleep', '60'])\nprint('ready')\ntime.sleep(60)\n"
    job = project.start("run", "-n", "2", project.script(script))
    wait_until(lambda: bool(project.processes()) and all(_printed(project, rank) for rank in range(2)))
    job.kill()
    job.communicate()
    wait_until(lambda: not project.processes())
    wait_until(lambda: not list(Path(os.environ["TMPDIR"]).glob(f"dtrain-{project.latest.id}*")))
    data = project.json("show", "latest")
    assert data["state"] == "failed"
    assert "supervisor" in data["cause"]


@pytest.mark.needs("mpi")
def test_killed_mpirun_ends_the_run(project: Project, wait_until: Callable[..., None]) -> None:
    job = project.start("run", "-n", "2", project.script("import time\nprint('ready')\ntime.sleep(60)\n"))
    wait_until(lambda: bool(project.processes()) and all(_printed(project, rank) for rank in range(2)))
    psutil.Process(job.pid).children()[0].kill()
    _, err = job.communicate(timeout=20)
    assert job.returncode == 137
    assert "mpirun was killed by SIGKILL" in err
    assert not list(Path(os.environ["TMPDIR"]).glob(f"dtrain-{project.latest.id}*"))


STALE = """#!/bin/sh
mkdir "$TMPDIR/ompi.$$" && echo stale > "$TMPDIR/ompi.$$/pmix.$(hostname).tool"
exec {mpirun} "$@"
"""


@pytest.mark.needs("mpi")
def test_what_a_killed_mpirun_left_behind_keeps_nobody_from_starting(project: Project) -> None:
    """By itself, Open MPI refuses to start where one of the same process id was killed before."""
    mpirun = project.folder / "mpirun"
    mpirun.write_text(STALE.format(mpirun=shutil.which("mpirun", path=project.environ()["PATH"])))
    mpirun.chmod(0o755)
    project.env["DTRAIN_MPIRUN"] = str(mpirun)
    done = project.dtrain("run", "-n", "2", project.script("print('hi')"))
    assert done.returncode == 0, done.stderr
    by_itself = [str(mpirun), "--allow-run-as-root", "-n", "1", "true"]
    assert subprocess.run(by_itself, env=project.environ(), capture_output=True, timeout=30, check=False).returncode != 0


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (("nothing.py",), 127, "no such script: nothing.py"),
        (("trian.py",), 127, "did you mean train.py?"),
        (("-n", "0", "train.py"), 2, "a job has at least 1 rank"),
        (("-n", "5", "--max-ranks", "4", "train.py"), 2, "-n 5 exceeds --max-ranks 4"),
        (("--launcher", "mpy", "train.py"), 2, "unknown launcher 'mpy' (did you mean mpi?)"),
        (("--launcher", "local", "-n", "2", "train.py"), 2, "launcher 'local' runs one rank"),
        (("--experiment", "", "train.py"), 2, "experiment name '' is not allowed"),
        (("--experiment", "a/b", "train.py"), 2, "experiment name 'a/b' is not allowed"),
        (("--env", "nothing", "train.py"), 2, "'nothing' is not KEY=VALUE"),
        (("--env", "a-b=1", "train.py"), 2, "not a variable's name"),
        (("--timeout", "-1", "train.py"), 2, "--timeout=-1 is not a number of seconds above 0"),
        (("--resume", "latest", "train.py"), 2, "no run in workspace"),
        (("--workspace", "/proc/dtrain", "train.py"), 2, "workspace /proc/dtrain cannot be written"),
        (("--json", "train.py"), 2, "--json goes with --dry-run"),
        (("-m", "no such"), 2, "not a module's name"),
        (("ignored.py",), 2, "is not in the copy"),
        (("--nprocs", "2", "train.py"), 2, "No such option: --nprocs; use -n N, which counts all ranks"),
        (("--nproc_per_node=2", "train.py"), 2, "-H node1:N,node2:N starts N ranks on each host"),
        (("--nnodes", "2", "train.py"), 2, "say how many (--nodes)"),
        (("--hosts", "a,b", "train.py"), 2, "No such option: --hosts; use -H node1:2,node2:2"),
        (("--hots", "a,b", "train.py"), 2, "Did you mean"),
        (("python", "train.py"), 2, "leave python out: dtrain starts Python itself (dtrain run train.py)"),
        (
            ("-np", "4", "python", "train.py"),
            2,
            "leave python out: dtrain starts Python itself (dtrain run -n 4 train.py)",
        ),
        ((sys.executable, "-m", "train"), 2, "(dtrain run -m train), which --python PATH chooses"),
        (("python", "-u", "-W", "error", "train.py"), 2, "(dtrain run train.py), which --python PATH chooses; for Python's own"),
        (
            ("python", "-u"),
            2,
            "leave python out: dtrain starts Python itself, which --python PATH chooses; for Python's own options",
        ),
        (("python",), 2, "leave python out: dtrain starts Python itself, which --python PATH chooses\n"),
        (("/bin/ls", "-l"), 126, "/bin/ls is no Python script but a program; start it from a script"),
        (("-H", "localhost:2", "--network", "203.0.113.0/24", "train.py"), 127, "this host has no address in it; it is in "),
    ],
)
def test_what_cannot_be_run_is_said_at_once(project: Project, args: tuple[str, ...], code: int, words: str) -> None:
    project.script("")
    project.script("", "ignored.py")
    project.script("ignored.py\n", ".gitignore")
    done = project.dtrain("run", *args)
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(project.folder.glob("workspace/runs/*"))


@pytest.mark.needs("mpi")
def test_the_number_of_ranks_may_be_said_as_mpirun_does(project: Project) -> None:
    done = project.dtrain("run", "-np", "2", "--dry-run", "--json", project.script(""), "-np", "3")
    assert orjson.loads(done.stdout)["size"] == 2, done.stderr


@pytest.mark.needs("mpi")
def test_no_mpirun_says_what_installs_it(project: Project, tmp_path: Path) -> None:
    """A Python without mpirun beside it and none on PATH."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    (bin_folder / "python").symlink_to(sys.executable)
    environment = {**project.environ(), "PATH": str(bin_folder)}
    site = [path for path in sys.path if path.endswith("site-packages")]
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *site])
    argv = [str(bin_folder / "python"), "-m", "dtrain.cli", "run", "-n", "2", project.script("")]
    done = subprocess.run(argv, cwd=project.folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 127
    assert "MPI is not installed" in done.stderr
    assert "pip install 'dtrain[mpi]'" in done.stderr


def test_unknown_mpirun_is_refused(project: Project) -> None:
    fake = project.folder / "mpirun"
    fake.write_text("#!/bin/sh\necho 'Some MPI 1.0'\n")
    fake.chmod(0o755)
    project.env["DTRAIN_MPIRUN"] = str(fake)
    done = project.dtrain("run", "-n", "2", project.script(""))
    assert done.returncode == 127
    assert "Some MPI 1.0" in done.stderr


@pytest.mark.needs("mpi", "mpich")
@pytest.mark.parametrize(
    "script", ["from mpi4py import MPI\nprint('trains')\n", "import dtrain\ndtrain.init()\nprint('trains')\n"]
)
def test_mpirun_and_mpi4py_of_different_mpis_are_found_out(project: Project, script: str) -> None:
    project.env["DTRAIN_MPIRUN"] = str(Path(os.environ["DTRAIN_TEST_MPICH_PYTHON"]).parent / "mpirun")
    done = project.dtrain("run", "-n", "2", project.script(script))
    assert done.returncode == 1
    assert "sees a world of 1" in done.stderr
    assert "trains" not in done.stdout


@pytest.mark.parametrize("ranks", LAUNCHES)
def test_dry_run_starts_nothing_and_its_lines_work_in_a_shell(project: Project, ranks: tuple[str, ...]) -> None:
    script = project.script("import sys\nprint('ran', sys.argv[1:])\n")
    done = project.dtrain("run", "--dry-run", *ranks, script, "a b", "$HOME")
    assert done.returncode == 0
    assert not (project.folder / "workspace").exists()
    pasted = subprocess.run(done.stdout, shell=True, env=project.environ(), capture_output=True, text=True, check=False)
    assert pasted.stdout.splitlines() == ["ran ['a b', '$HOME']"] * int(ranks[1])
    plan = orjson.loads(project.dtrain("run", "--dry-run", "--json", *ranks, script).stdout)
    assert plan["size"] == int(ranks[1])


@pytest.mark.parametrize("ranks", LAUNCHES)
def test_arguments_that_mpirun_would_take_for_its_own(project: Project, ranks: tuple[str, ...]) -> None:
    words = [":", "\\:", "", "-n", "--host", "a b", "$HOME", "*", "\u00e4"]
    done = project.dtrain("run", *ranks, project.script("import sys\nprint(ascii(sys.argv[1:]))\n"), *words)
    assert done.returncode == 0, done.stderr
    assert [line.split("] ", 1)[1] for line in done.stdout.splitlines()] == [ascii(words)] * int(ranks[1])


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("sys.exit(256)", 0),
        ("try:\n    sys.exit(3)\nexcept SystemExit:\n    pass", 0),
        ("raise SystemExit(4)", 4),
        ("sys.exit(-1)", 255),
    ],
)
def test_exit_codes_are_those_of_python(project: Project, text: str, code: int) -> None:
    assert project.dtrain("run", project.script(f"import sys\n{text}\n")).returncode == code
    assert project.json("show", "latest")["state"] == ("failed" if code else "completed")


FORKS = """
import os, sys

for end in ("", "sys.exit(0)", "sys.exit(3)", "raise ValueError(end)"):
    if os.fork() == 0:
        exec(end)
        break
    os.wait()
else:
    os._exit(0)
"""


def test_how_a_process_ends_that_the_script_forked_is_not_how_the_rank_does(project: Project) -> None:
    done = project.dtrain("run", project.script(FORKS))
    assert done.returncode == 0, done.stderr
    assert read_json(project.latest.rank(0).done)["early"]


@pytest.mark.needs("mpi")
def test_a_call_of_mpi4py_that_fails_is_told_without_a_frame_of_dtrains(project: Project) -> None:
    done = project.dtrain("run", "-n", "2", project.script("from mpi4py import MPI\nMPI.COMM_WORLD.recv(source=9)\n"))
    assert done.returncode == 1, done.stderr
    assert 'File "train.py", line 2, in <module>' in done.stderr
    assert "_mpi_calls" not in done.stdout + done.stderr


def test_a_script_that_is_a_link_and_a_safe_path(project: Project) -> None:
    (project.folder / "lib").mkdir()
    (project.folder / "lib" / "mine.py").write_text("print('mine')\n")
    (project.folder / "work").mkdir()
    (project.folder / "work" / "train.py").symlink_to("../lib/mine.py")
    assert "mine" in project.dtrain("run", "work/train.py").stdout
    project.env["PYTHONPATH"] = os.pathsep.join([str(project.folder / "lib"), str(ROOT)])
    done = project.dtrain("run", "--env", "PYTHONSAFEPATH=1", project.script("import mine\n"))
    assert done.returncode == 0, done.stderr


RESUMES = """
import os, signal, sys
import numpy as np
import dtrain
run = dtrain.init()
restored = run.checkpoints.restore()
step = restored.step if restored else 0
print("from", step)
if sys.argv[1] == "die":
    os.kill(os.getpid(), signal.SIGKILL)
run.checkpoints.save(step + 1, {"w": np.ones(2)})
"""


def test_resume_goes_back_to_the_last_run_that_has_a_checkpoint(project: Project) -> None:
    script = project.script(RESUMES)
    assert project.dtrain("run", script, "die").returncode == 137
    begun = project.dtrain("run", "--resume", "latest", script, "save")
    assert "ended before its first checkpoint; this run begins anew" in begun.stderr
    assert "from 0" in begun.stdout
    assert project.dtrain("run", "--resume", "latest", script, "die").returncode == 137
    resumed = project.dtrain("run", "--resume", "latest", script, "save")
    assert "from 1" in resumed.stdout
    assert project.json("show", "latest")["checkpoints"] == [2]


def test_module(project: Project) -> None:
    package = project.folder / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "train.py").write_text("import sys\nprint(__name__, sys.argv[1:])\n")
    done = project.dtrain("run", "-m", "package.train", "--x")
    assert done.returncode == 0, done.stderr
    assert "__main__ ['--x']" in done.stdout


def test_script_sees_siblings_and_processes_it_spawns(project: Project) -> None:
    """multiprocessing's spawn imports the main script again, by its path."""
    project.script("VALUE = 42\n", "sibling.py")
    script = project.script(
        "import multiprocessing as mp\nfrom sibling import VALUE\n"
        "def f(x):\n    return x + VALUE\n"
        "if __name__ == '__main__':\n    with mp.get_context('spawn').Pool(1) as pool:\n        print(pool.map(f, [1]))\n"
    )
    done = project.dtrain("run", script)
    assert done.returncode == 0, done.stderr
    assert "[43]" in done.stdout


FILLS = """
import os, time
with open("outputs/full", "wb", 0) as file:
    try:
        while True:
            file.write(b"x" * 4096)
    except OSError:
        pass
time.sleep(8)
os.unlink("outputs/full")
"""


@pytest.fixture
def small(project: Project) -> Iterator[Path]:
    """A folder of its own file system, of 1 MB."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    folder = project.folder / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_disk_full_is_named(project: Project, small: Path) -> None:
    """Neither the record of the failure nor the rank's output can be written then; the cause must be told all the same."""
    script = project.script(
        "import dtrain\nrun = dtrain.init()\nfor step in range(100000):\n    run.log_row(step, text='x' * 100)\n"
    )
    done = project.dtrain("run", "--workspace", str(small), script)
    assert done.returncode == 1
    assert "metrics cannot be written" in done.stderr
    assert "space" in done.stderr
    (listed,) = project.json("runs", "--workspace", str(small))
    assert (listed["state"], "metrics cannot be written" in listed["cause"]) == ("failed", True)


def test_a_disk_that_is_full_at_the_end_is_recorded(project: Project, small: Path) -> None:
    """Though the ranks have used up all that there was."""
    done = project.dtrain("run", "--workspace", str(small), project.script(FILLS.split("time.sleep")[0]))
    assert done.returncode == 1
    (listed,) = project.json("runs", "--workspace", str(small))
    assert "its completion record cannot be written: No space left on device" in listed["cause"]
    assert not list(small.rglob("room"))


def test_a_rank_on_a_disk_that_is_full_for_a_while_is_not_lost(project: Project, small: Path) -> None:
    done = project.dtrain("run", "--workspace", str(small), "--heartbeat-timeout", "5", project.script(FILLS))
    assert done.returncode == 0, done.stderr


def test_a_message_of_several_lines_is_told_in_one(project: Project) -> None:
    done = project.dtrain("run", project.script("raise RuntimeError('first\\nsecond' + 'x' * 100_000)\n"))
    assert "first to fail was rank 0" in done.stderr
    assert done.stderr.split("first to fail")[1].splitlines()[0].endswith("RuntimeError: first")
    done = project.dtrain("run", project.script("def f(:\n    pass\n"))
    assert "SyntaxError: invalid syntax (train.py, line 1)" in done.stderr
    assert project.json("runs")[-1]["cause"].endswith("SyntaxError: invalid syntax (train.py, line 1)")


@pytest.mark.needs("mpi")
def test_a_failed_checkpoint_blames_the_rank_that_could_not_write(project: Project) -> None:
    script = project.script(
        "import numpy as np\nimport dtrain\nfrom dtrain import _shards\n"
        "run = dtrain.init()\n"
        "def full(*_):\n    raise OSError(28, 'No space left on device')\n"
        "if run.rank == 1:\n    _shards.write_shard = full\n"
        "run.checkpoints.save(1, {'w': np.ones(3)})\n"
    )
    done = project.dtrain("run", "-n", "2", script)
    assert done.returncode == 1
    told = done.stderr.split("first to fail was ")[1]
    assert told.startswith("rank 1")
    assert "No space left on device" in told
    assert "_exchange" not in told  # the traceback of an error that says all is the user's line


def test_cursor_movements_of_a_rank_do_not_reach_the_console(project: Project) -> None:
    done = project.dtrain("run", project.script("print('\\x1b[J\\x1b[32mgreen\\x1b[0m')\n"))
    assert done.stdout.endswith(":0] \x1b[32mgreen\x1b[0m\n")


def test_output_without_line_end_and_progress_bars(project: Project) -> None:
    script = project.script("import sys\nfor i in range(3):\n    sys.stdout.write(f'\\r{i}/3')\nsys.stdout.write('\\nrest')\n")
    done = project.dtrain("run", script)
    assert [line.split("] ")[1] for line in done.stdout.splitlines()] == ["2/3", "rest"]
    raw = [sys.executable, "-m", "dtrain.cli", "logs", "latest", "--rank", "0"]
    log = subprocess.run(raw, cwd=project.folder, env=project.environ(), capture_output=True, check=False).stdout
    assert log == b"\r0/3\r1/3\r2/3\nrest"


@pytest.mark.needs("mpi")
def test_whose_output_is_shown(project: Project) -> None:
    script = project.script(FAIL_LAST.format(how="raise ValueError('bad batch')").replace("time.sleep(60)", "sys.exit()"))
    shown = {
        option: project.dtrain("run", "-n", "2", "--show", option, script) for option in ("0", "1", "0,1", "0-1", "all", "none")
    }
    first_words = {option: {line.split("] ")[1] for line in done.stdout.splitlines()} for option, done in shown.items()}
    trace = {line for line in first_words["1"] if line != "before 1"}
    both = {"before 0", "before 1"} | trace
    assert first_words == {"0": {"before 0"}, "1": {"before 1"} | trace, "0,1": both, "0-1": both, "all": both, "none": set()}
    for done in shown.values():
        assert "first to fail was rank 1" in done.stderr
        told = done.stderr[done.stderr.index("first to fail") :].splitlines()
        assert told[1:3] == ["dtrain: the last it printed before:", "    before 1"]
        assert told[-2:-1] == ["    ValueError: bad batch"]
        assert done.stderr.count("Traceback") == 1
    assert project.latest.rank(0).output_log.read_text() == "before 0\n"


@pytest.mark.needs("mpi")
def test_no_line_of_a_flood_is_lost_or_torn(project: Project) -> None:
    """On both streams, by a child as well, as fast as they can, and up to the very end."""
    script = project.script(
        "import os, sys\nrank = os.environ['OMPI_COMM_WORLD_RANK']\nchild = os.fork() == 0\n"
        "for n in range(5000):\n    print(rank, child, n, 'x' * (n % 200), file=sys.stderr if n % 2 else sys.stdout)\n"
        "if not child:\n    os.wait()\n"
    )
    project.env["PYTHONUNBUFFERED"] = ""  # with it Python itself writes each line in pieces, between which its child's come
    done = project.dtrain("run", "-n", "4", script)
    assert done.returncode == 0, done.stderr
    came: dict[tuple[str, str], list[str]] = {(str(rank), child): [] for rank in range(4) for child in ("True", "False")}
    for line in done.stdout.splitlines():
        prefix, rank, child, rest = line.split(" ", 3)
        assert prefix.endswith(f":{rank}]")
        came[rank, child].append(rest)
    expected = [f"{n} {'x' * (n % 200)}" for n in range(5000)]
    assert all(lines == expected for lines in came.values())
    raw = [project.latest.rank(rank).output_log.read_text().splitlines() for rank in range(4)]
    assert [f":{rank}] {line}" for rank in range(4) for line in raw[rank]] == sorted(
        (":" + line.partition(":")[2] for line in done.stdout.splitlines()), key=lambda line: line[1]
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--show", "1"), "--show 1: there is no '1' in this job of rank 0 alone"),
        (("-n", "2", "--show", "0-2"), "no '0-2' in this job of ranks 0 to 1; use numbers as 0,2-3; all; none"),
        (("-n", "2", "--show", "worker"), "no 'worker' in this job of ranks 0 to 1"),
        (("--show", ""), "there is no ''"),
        (
            ("--launcher", "parameter_server", "-n", "2", "--show", "worker,chief"),
            "use numbers as 0,2-3, or ps, ps0, worker, worker0",
        ),
    ],
)
def test_ranks_that_cannot_be_shown(project: Project, options: tuple[str, ...], words: str) -> None:
    done = project.dtrain("run", *options, project.script(""))
    assert done.returncode == 2
    assert words in done.stderr
    assert not list(project.folder.glob("workspace/runs/*"))


def test_the_last_lines_of_a_failed_rank(project: Project) -> None:
    """Twenty of them, a bar as it stood in the end, and nothing of the traceback, which is told apart."""
    fails = "try:\n    1 / 0\nexcept Exception as e:\n    raise KeyError from e\n"
    script = project.script(f"print(*range(30), sep='\\n')\nprint('10%\\r50%\\r90%')\n{fails}")
    told = project.dtrain("run", script).stderr.splitlines()
    begin = told.index("dtrain: the last it printed before:")
    assert told[begin + 1 : begin + 22] == [*(f"    {n}" for n in (*range(11, 30), "90%")), "dtrain: and where it failed:"]
    told = project.dtrain("run", project.script("import os\nprint(*range(30), sep='\\n', flush=True)\nos.abort()\n")).stderr
    assert "the last it printed:\n" in told
    assert "killed by SIGABRT" in told


AGAIN = """
import os, signal, sys, time
import numpy as np
import dtrain
run = dtrain.init()
attempt = len([name for name in os.listdir(run.layout.root / "attempts")]) - 1
restored = run.checkpoints.restore()
first = restored.step + 1 if restored else 1
print("attempt", attempt, "begins at", first, flush=True)
for step in range(first, 7):
    run.log_row(step, seen=step + 100 * attempt)
    run.log("counted", attempt)
    if step % 2 == 0:
        run.checkpoints.save(step, {"w": np.full(2, step)})
    run.comm.barrier()
    if run.rank == run.size - 1 and step == 3 + attempt and attempt < 2:
        END
"""


def again(end: str) -> str:
    return AGAIN.replace("END", end)


@pytest.mark.needs("mpi")
def test_each_attempt_has_a_scratch_folder_of_its_own(project: Project) -> None:
    """An earlier one's may be removed late, on another host that was cut off."""
    end = "if run.layout.attempt == 0:\n    os.kill(os.getpid(), 9)\n"
    script = f"import os, dtrain\nrun = dtrain.init()\nprint(os.environ['OMPI_MCA_orte_tmpdir_base'][-2:], flush=True)\n{end}"
    done = project.dtrain("run", "-n", "2", "--max-restarts", "1", project.script(script))
    assert done.returncode == 0, done.stderr
    assert {line.split()[-1] for line in done.stdout.splitlines()} == {"-0", "-1"}


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.needs("mpi"))])
def test_a_killed_job_is_started_again_from_its_checkpoint(project: Project, ranks: int) -> None:
    script = project.script(again("os.kill(os.getpid(), signal.SIGKILL)"))
    done = project.dtrain("run", "-n", str(ranks), "--max-restarts", "3", script)
    assert done.returncode == 0, done.stderr
    assert "killed by SIGKILL" in done.stderr
    assert "starting the job again from the checkpoint of step 2 (restart 1 of 3)" in done.stderr
    assert "starting the job again from the checkpoint of step 4 (restart 2 of 3)" in done.stderr
    data = project.json("show", "latest")
    assert (data["state"], data["cause"], len(data["earlier"])) == ("completed", "", 2)
    assert data["checkpoints"] == [2, 4, 6]
    assert "attempt  1 ended: rank" in project.dtrain("show", "latest").stdout
    # What an attempt did after its last checkpoint is undone; each attempt's own files are kept.
    rows = read_metrics(project.latest).rows
    assert [[row["seen"] for row in rows[rank] if "seen" in row] for rank in range(ranks)] == [[1, 2, 103, 104, 205, 206]] * ranks
    counted = [(row["step"], row["counted"]) for row in rows[ranks - 1] if "counted" in row]
    assert counted == list(enumerate([0, 0, 0, 1, 1, 2, 2]))  # values without a step go on being counted
    files = project.latest.metrics_files()[ranks - 1]
    assert [len(file.read_text().splitlines()) for file in files] == [6, 4, 4]
    for attempt, begin in ((0, 1), (1, 3), (2, 5)):
        logs = project.dtrain("logs", "latest", "--rank", "0", "--attempt", str(attempt)).stdout
        assert logs == f"attempt {attempt} begins at {begin}\n"
    assert project.dtrain("logs", "latest", "--rank", "0").stdout == logs
    assert "has attempts 0 to 2" in project.dtrain("logs", "latest", "--attempt", "3").stderr


@pytest.mark.needs("mpi")
def test_where_a_restart_cannot_be_planned_the_attempt_decides(project: Project) -> None:
    mpirun = project.folder / "mpirun"
    mpirun.write_text(f'#!/bin/sh\nexec {Path(sys.executable).parent}/mpirun "$@"\n')
    mpirun.chmod(0o755)
    project.env["DTRAIN_MPIRUN"] = str(mpirun)
    script = project.script(
        f"import os, signal\nif os.path.exists({str(mpirun)!r}):\n    os.unlink({str(mpirun)!r})\nos.kill(os.getpid(), 9)\n"
    )
    done = project.dtrain("run", "-n", "1", "--launcher", "mpi", "--max-restarts", "1", script)
    assert done.returncode == 137, done.stderr
    assert "the job is not started again" in done.stderr
    assert done.stderr.rstrip().splitlines()[-2].endswith("killed by SIGKILL")
    assert (project.json("show", "latest")["state"], project.json("show", "latest")["earlier"]) == ("failed", [])


def test_a_supervisor_has_as_many_descriptors_as_it_may_and_ranks_what_they_had(project: Project) -> None:
    script = project.script(
        "import os, psutil\n"
        "for process in (psutil.Process(), psutil.Process().parent().parent()):\n"
        "    print(*process.rlimit(psutil.RLIMIT_NOFILE))\n"
    )
    argv = ["sh", "-c", 'ulimit -Sn 100 && ulimit -Hn 500 && exec "$@"', "sh", *project.argv("run", script)]
    done = project.run(argv)
    assert [line.split()[-2:] for line in done.stdout.splitlines()] == [["100", "500"], ["500", "500"]], done.stderr


def test_what_stops_the_supervisor_itself_is_recorded(project: Project) -> None:
    breaks = (
        "import os, time\nopen(os.environ['DTRAIN_RUN_DIR'] + '/ranks/00000/error.json', 'w').write('no JSON')\ntime.sleep(20)\n"
    )
    done = project.dtrain("run", project.script(breaks))
    assert done.returncode not in (0, None)
    data = project.json("show", "latest")
    assert (data["state"], "error.json" in data["cause"]) == ("failed", True), done.stderr


@pytest.mark.parametrize(
    ("end", "options", "code", "attempts"),
    [
        ("sys.exit(3)", ("--max-restarts", "3"), 3, 1),
        ("raise ValueError", ("--max-restarts", "3"), 1, 1),
        ("sys.exit(3)", ("--max-restarts", "1", "--restart-on", "3"), 3, 2),
        ("os.kill(os.getpid(), signal.SIGTERM)", (), 143, 1),
        ("time.sleep(60)", ("--max-restarts", "3", "--timeout", "3"), 124, 1),
    ],
)
def test_what_is_not_started_again(project: Project, end: str, options: tuple[str, ...], code: int, attempts: int) -> None:
    done = project.dtrain("run", *options, project.script(again(end)))
    assert done.returncode == code, done.stderr
    data = project.json("show", "latest")
    assert (data["state"], data["exit_code"], len(data["earlier"]) + 1) == ("failed", code, attempts)
    assert not list(project.latest.checkpoints.glob(".attempt-*"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--max-restarts", "-1"), "--max-restarts -1 is not a number from 0"),
        (("--restart-on", "kill"), "'kill' is not a list of exit codes"),
        (("--restart-on", "137,0"), "--restart-on 0 is not an exit code"),
    ],
)
def test_restarts_that_cannot_be(project: Project, options: tuple[str, ...], words: str) -> None:
    done = project.dtrain("run", *options, project.script(""))
    assert done.returncode == 2
    assert words in done.stderr
