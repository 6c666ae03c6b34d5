"""`dtrain run --launcher horovod` over Gloo on two hosts: what tests/console/test_gloo.py tests on one, over ssh."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import psutil
import pytest

from dtrain.layout import RunLayout
from dtrain.status import read_failure, read_process, read_status, read_world
from tests.console.test_gloo import PLAIN, TRAIN, end, made_steps

from .conftest import ClusterProject, Testbed

pytestmark = [pytest.mark.needs("netcluster"), pytest.mark.needs("horovod")]

HOSTS = ("-H", "node1,node2")
GLOO = ("run", "--launcher", "horovod", "--controller", "gloo", *HOSTS)


def script_of(project: ClusterProject, rank: int) -> psutil.Process:
    """The process of a rank's script, which this machine knows by another id than its host does."""
    found = [p for p in project.processes() if p.environ().get("HOROVOD_RANK") == str(rank)]
    return next(p for p in found if p.parent() in found and os.getsid(p.pid) != p.pid)  # nor who waits for the guard's end


def rows_of(run: RunLayout, worker: int) -> str:
    """What a worker of an elastic job has logged."""
    path = run.metrics_file(worker, f"worker {worker}")
    return path.read_text() if path.exists() else ""


def test_ranks_are_on_their_hosts_and_their_secrets_on_no_command_line(project: ClusterProject) -> None:
    project.env["TOKEN"] = "s3cr3t v4lue"
    script = project.script(
        PLAIN
        + "import pathlib, socket\n"
        + "for path in pathlib.Path('/proc').glob('[0-9]*/cmdline'):\n"
        + "    try:\n        assert b'v4lue' not in path.read_bytes(), path\n    except OSError:\n        pass\n"
        + "print(os.environ['HOROVOD_GLOO_IFACE'], socket.gethostname(), rank, size, len(os.environ['TOKEN']), flush=True)\n"
    )
    done = project.dtrain(*GLOO, "--secret", "TOKEN", script)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["[node1:0] eth0 node1 0 2 12", "[node2:1] eth0 node2 1 2 12"]
    assert [read_process(project.latest, rank).host for rank in (0, 1)] == ["node1", "node2"]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("how", "code", "words"),
    [
        ("raise ValueError('bad batch')", 1, "ValueError: bad batch"),
        ("os.kill(os.getppid(), 9)", 137, "vanished without a record: it was killed together with the process that watched it"),
    ],
)
def test_the_first_to_fail_on_another_host(project: ClusterProject, how: str, code: int, words: str) -> None:
    script = project.script(PLAIN + f"if rank == 1:\n    {how}\ntime.sleep(60)\n")
    done = project.dtrain(*GLOO, script)
    assert done.returncode == code, done.stderr
    assert f"first to fail was rank 1 on node2: {words}" in done.stderr


def test_nothing_is_left_on_other_hosts_when_dtrain_is_killed(project: ClusterProject, wait_until: Callable[..., None]) -> None:
    script = project.script(PLAIN + "open(f'outputs/{rank}', 'w').close()\ntime.sleep(100)\n")
    job = project.start(*GLOO, script)
    wait_until(lambda: len(list(project.folder.glob("workspace/runs/*/outputs/[01]"))) == 2)
    project.find(job, "dtrain.cli", "run").send_signal(signal.SIGKILL)
    wait_until(lambda: not project.processes())


@pytest.mark.timeout(360)
@pytest.mark.parametrize("fault", ["kill", "cut"])
def test_an_elastic_job_goes_on_without_a_host_and_takes_it_back(
    project: ClusterProject, fault: str, cut: Callable[[str], None], wait_until: Callable[..., None]
) -> None:
    script = project.script(TRAIN.replace("EACH_STEP", ""))
    project.env["HOROVOD_GLOO_TIMEOUT_SECONDS"] = "20"  # a cut is not noticed before that; and so long workers wait for a new one
    options = ("--min-workers", "1", "-n", "2", "-H", "node2,node3", "--grace", "2")
    job = project.start("run", "--launcher", "horovod", *options, script, str(project.folder / "enough"))
    wait_until(lambda: made_steps(project, job, 2), 60)
    run = project.latest.newest_attempt()
    first = read_world(run).workers[0]  # rank 0, which Horovod tells of changes, and would wait for
    host = read_process(run, first).host  # type: ignore[union-attr]
    if fault == "kill":
        script_of(project, 0).kill()
    else:
        cut(host)
    wait_until(lambda: read_failure(run, first) is not None, 60)
    lost = time.monotonic()
    wait_until(lambda: made_steps(project, job, 1), 40)
    if fault == "cut":
        time.sleep(max(0, lost + 16 - time.monotonic()))  # longer than Horovod leaves the host out for: but it does not answer
        assert read_world(run).started == 2
        project.hosts("heal", host)
    wait_until(lambda: job.poll() is not None or '"workers":2.0' in rows_of(run, 2), 120)
    out, said = end(project, job)
    assert job.returncode == 0, out + said
    words = "killed by SIGKILL" if fault == "kill" else f"lost: the ssh connection to {host} broke"
    assert f"dtrain: worker {first} on {host}: {words}" in said
    assert read_status(run).state == "completed"


def test_a_host_that_does_not_see_the_workspace_is_refused(project: ClusterProject, testbed: Testbed) -> None:
    testbed("exec", "node2", "mount", "-t", "tmpfs", "tmpfs", str(project.folder))
    try:
        done = project.dtrain(*GLOO, project.script(PLAIN))
    finally:
        testbed("exec", "node2", "umount", "-l", str(project.folder))
    assert done.returncode == 127
    assert "host node2: does not see this workspace, which Horovod's ranks over Gloo have to" in done.stderr
