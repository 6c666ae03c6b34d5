"""How a crew starts its processes, and that its steps wait for nobody. What they do then: tests/console, tests/cluster."""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dtrain.launch import ssh
from dtrain.launch.agents import Agents
from dtrain.launch.crew import Crew
from dtrain.launch.plan import LaunchPlan, PlannedHost, PlannedProcess, PlannedTask
from dtrain.launch.ports import PortProbe, free_ports
from dtrain.layout import RunLayout
from dtrain.roles import Task
from dtrain.status import RankFailure, read_failure

# A step that waits for somebody takes seconds; one that does not, milliseconds, on a machine with much else to do.
_MOST_S = 3.0
_TASKS = 8


@pytest.fixture
def silent() -> Iterator[tuple[str, int]]:
    """An address whose SYNs are dropped: that of a server whose backlog is full."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        address: tuple[str, int] = server.getsockname()
        while True:
            filler = stack.enter_context(socket.socket())
            filler.settimeout(0.5)
            try:
                filler.connect(address)
            except TimeoutError:
                break
        yield address


class SlowHost:
    """Another host, on which nothing begins until it may (tests/fakes/bin/ssh)."""

    def __init__(self, folder: Path) -> None:
        self.connected = folder / "connected"
        self.connected.touch()

    @property
    def clients(self) -> int:
        return len(self.connected.read_text().splitlines())

    def begin(self) -> None:
        self.connected.with_suffix(".go").touch()


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SlowHost:
    host = SlowHost(tmp_path)
    monkeypatch.setenv("CONNECTED", str(host.connected))
    monkeypatch.setenv("PATH", f"{Path(__file__).parents[1] / 'fakes' / 'bin'}:{os.environ['PATH']}")
    return host


class Steps:
    """A crew of tasks that sleep, which is asked for step after step until something is so."""

    def __init__(
        self, folder: Path, tasks: list[PlannedTask], *, start_timeout_s: float = 60.0, host: str = "", agent: bool = False
    ) -> None:
        """``host`` is another one that all are on, with an ``agent``."""
        self.run = RunLayout(folder / "run").begin_attempt(0, len(tasks))
        planned = functools.partial(
            PlannedProcess, host=host or "here", over_ssh=bool(host), argv=("sleep", "60"), environment={}
        )
        processes = tuple(planned(name=str(each.task), cwd=folder, task=each) for each in tasks)
        others = (PlannedHost(name=host, ranks=(0,)),) if agent else ()
        plan = LaunchPlan(launcher="multi_worker", size=len(tasks), processes=processes, other_hosts=others)
        self.said: list[str] = []
        agents = Agents(plan, self.run, 6.0, self.said.append)
        self.crew = Crew(plan, self.run, agents, output=1, start_timeout_s=start_timeout_s, say=self.said.append)

    def until(self, condition: Callable[[list[RankFailure]], object]) -> list[RankFailure]:
        deadline, failures = time.monotonic() + 60, list[RankFailure]()
        while not condition(failures):
            began = time.monotonic()
            failures += self.crew.step()
            assert time.monotonic() - began < _MOST_S
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return failures

    def end(self) -> None:
        for process in self.crew.processes:
            process.kill()
            process.wait()
        self.crew.release()


def _worker(rank: int, address: tuple[str, int] | None, **how: int) -> PlannedTask:
    return PlannedTask(rank=rank, task=Task("worker", rank), address=address, **how)


def test_hosts_that_do_not_answer_hold_no_step_up(tmp_path: Path, silent: tuple[str, int]) -> None:
    steps = Steps(tmp_path, [_worker(rank, silent) for rank in range(_TASKS)], start_timeout_s=0.5)
    steps.until(lambda _: len(steps.crew.processes) == _TASKS)  # nobody answers there, so the ports are free
    failures = steps.until(len)
    assert failures[0].message == f"does not listen on 127.0.0.1:{silent[1]}, 0.5 s after its start (--start-timeout)"
    steps.end()


def test_a_killed_task_is_started_again_when_its_port_is_free(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    steps = Steps(tmp_path, [_worker(0, ("127.0.0.1", port), max_restarts=1)])
    steps.until(lambda _: steps.crew.processes)
    with socket.create_server(("127.0.0.1", port)):
        (first,) = steps.crew.processes
        first.kill()
        steps.until(lambda _: steps.crew.restarts == 1)
        until = time.monotonic() + 1
        assert steps.until(lambda _: time.monotonic() > until) == []
        assert steps.crew.processes == []
        assert steps.crew.at_work
    assert steps.until(lambda _: steps.crew.processes) == []
    assert "worker 0 was killed by SIGKILL; it is started again" in steps.said[0]
    steps.end()


def test_few_connections_to_a_host_begin_at_a_time(tmp_path: Path, host: SlowHost) -> None:
    """sshd refuses some of more than ten. That a task listens is waited for by the next stage, not by the rest of its own."""
    steps = Steps(tmp_path, [_worker(rank, ("127.0.0.1", port)) for rank, port in enumerate(free_ports(20))], host="node2")
    steps.until(lambda _: host.clients == ssh.MOST_BEGINNING)
    until = time.monotonic() + 0.5
    assert steps.until(lambda _: time.monotonic() > until) == []
    assert len(steps.crew.processes) == ssh.MOST_BEGINNING
    host.begin()
    assert steps.until(lambda _: len(steps.crew.processes) == 20) == []
    steps.end()


def test_a_task_that_was_started_again_has_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The agent of its host says once that a rank is no longer, and that was the one before."""
    client = tmp_path / "ssh"
    client.write_text('#!/bin/sh\ncase "$*" in *launch.agent*) echo gone 0 ;; esac\nexec cat\n')
    client.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    steps = Steps(tmp_path, [_worker(0, None)], host="node2", agent=True)
    crew = steps.crew
    steps.until(lambda _: crew.agents.heard() and crew.agents.has_left(0))
    (process,) = crew.processes
    assert not crew.has_left(0)
    process.kill()
    process.wait()
    assert crew.has_left(0)
    steps.end()


@pytest.mark.needs("horovod")
def test_few_workers_of_gloo_begin_at_a_time(tmp_path: Path, host: SlowHost) -> None:
    from horovod.runner.common.util.hosts import HostInfo, get_host_assignments

    from dtrain.launch.gloo_driver import Workers

    workers = Workers(RunLayout(tmp_path / "run").begin_attempt(0, 20), ["true"], elastic=False)
    slots = get_host_assignments([HostInfo("no-such-host.invalid", 20)], 20, 20)
    with ThreadPoolExecutor(max_workers=20) as pool:
        codes = [pool.submit(workers.run, slot.rank, slot) for slot in slots]
        while host.clients < ssh.MOST_BEGINNING:
            time.sleep(0.05)
        time.sleep(0.5)
        assert host.clients == ssh.MOST_BEGINNING
        host.begin()
        while host.clients < 20:
            time.sleep(0.05)
        workers.stop.set()
        assert {code.result() for code in codes} == {0}


@pytest.mark.needs("horovod")
def test_a_worker_of_gloo_whose_turn_comes_too_late_is_not_started(tmp_path: Path, host: SlowHost) -> None:
    from horovod.runner.common.util.hosts import HostInfo, get_host_assignments

    from dtrain.launch.gloo_driver import Workers

    run = RunLayout(tmp_path / "run").begin_attempt(0, 20)
    workers = Workers(run, ["true"], elastic=False)
    slots = get_host_assignments([HostInfo("no-such-host.invalid", 20)], 20, 20)
    with ThreadPoolExecutor(max_workers=20) as pool:
        codes = [pool.submit(workers.run, slot.rank, slot) for slot in slots]
        while host.clients < ssh.MOST_BEGINNING:
            time.sleep(0.05)
        workers.stop.set()
        while sum(code.done() for code in codes) < 20 - ssh.MOST_BEGINNING:
            time.sleep(0.05)
        host.begin()
    assert host.clients == ssh.MOST_BEGINNING
    late = [failure for rank in range(20) if (failure := read_failure(run, rank)) and failure.message == "ended before it began"]
    assert len(late) == 20 - ssh.MOST_BEGINNING


@pytest.mark.needs("horovod")
def test_an_elastic_worker_that_cannot_be_told_of_hosts_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is anything said of it."""
    from horovod.runner.common.util.secret import make_secret_key
    from horovod.runner.elastic.worker import WorkerNotificationClient, WorkerNotificationService

    from dtrain.launch.gloo_driver import Unawaited

    key, raised = make_secret_key(), []
    monkeypatch.setattr(threading, "excepthook", lambda args: raised.append(args.exc_value))
    service = WorkerNotificationService(key, None, None)
    client = WorkerNotificationClient(service.addresses(), key, 0)
    service.shutdown()  # asked now, it fails
    with pytest.raises(OSError, match="refused"):
        client.notify_hosts_updated(0, 0)
    before = set(threading.enumerate())
    Unawaited(client).notify_hosts_updated(0, 0)
    for thread in set(threading.enumerate()) - before:
        thread.join(60)
    assert not raised


def test_a_name_is_asked_for_all_its_addresses() -> None:
    """Some of localhost's may not be this host's: ::1 in a container."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        probe = PortProbe(("localhost", server.getsockname()[1]))
        while (listens := probe.look()) is None:
            time.sleep(0.01)
        assert listens


@pytest.mark.parametrize("name", ["127.0.0.1", "no-such-host.invalid"])
def test_nobody_listens(name: str) -> None:
    probe, opened = PortProbe((name, free_ports(1)[0])), len(os.listdir("/proc/self/fd"))
    while (listens := probe.look()) is None:
        time.sleep(0.01)
    assert (listens, len(os.listdir("/proc/self/fd"))) == (False, opened)


def test_a_name_that_is_not_found_is_not_asked_for_at_every_try() -> None:
    """Each question may take seconds, in which the supervisor would see nothing else."""
    script = (
        "import sys, time\nfrom dtrain.launch.ports import PortProbe\nasked = []\n"
        "sys.addaudithook(lambda name, _: asked.append(name) if name == 'socket.getaddrinfo' else None)\n"
        "probe = PortProbe(('no-such-host.invalid', 1))\nanswers = set()\nend = time.monotonic() + 1\n"
        "while time.monotonic() < end:\n    answers.add(probe.look())\n    time.sleep(0.05)\n"
        "print(len(asked), False in answers)"
    )  # an audit hook stays for as long as its process
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["1", "True"]
