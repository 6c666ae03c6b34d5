"""Horovod's driver: the process that gives ranks to workers and starts them, in the place that mpirun has for MPI.

``python -m dtrain.launch.gloo_driver --hosts node1:2,node2:2 --interface eth0 --workers 4 -- COMMAND``; with ``--elastic``
workers may come and go. Ranks find each other through a server in this process; in an elastic job Horovod's own ElasticDriver
decides who goes on. It is what horovodrun uses. Horovodrun itself starts workers by a shell with all variables on its command
line, where others read them, and leaves those on other hosts behind: here dtrain starts them, as its ssh launcher does.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from horovod.runner.common.util.hosts import HostInfo, SlotInfo, get_host_assignments
from horovod.runner.elastic.driver import ElasticDriver
from horovod.runner.elastic.rendezvous import create_rendezvous_handler
from horovod.runner.elastic.worker import WorkerNotificationClient
from horovod.runner.gloo_run import create_run_env_vars, create_slot_env_vars
from horovod.runner.http.http_server import RendezvousServer
from horovod.runner.util.network import get_driver_ip

from dtrain import env
from dtrain.hosts import Host, parse_hosts
from dtrain.launch import ssh
from dtrain.launch.discovery import Discovery
from dtrain.launch.ssh import Connection
from dtrain.layout import RunLayout
from dtrain.processes import begin_group, signal_name
from dtrain.roles import Task
from dtrain.status import Kind, RankFailure, World, read_failure, write_record

_POLL_S = 0.05
# From telling a worker to end until it is killed, where it is this driver that ends it: Horovod gave its host up.
_GRACE_S = 5.0
# What a worker that was told to end returns, as a rule.
_ENDED = 128 + signal.SIGTERM
# A worker that hears from Horovod that it has no rank any more aborts, with pages of words; most are ended before.
_DISMISS_S = 2.0
# Horovod gives up a host on which a worker failed. It may come back after twice to three times the first, doubled each time.
_COOLDOWN_S = (5, 300)


class Workers:
    """The workers' processes, on this host and others. Its methods are called by the threads of Horovod, or of this module."""

    def __init__(self, run: RunLayout, command: Sequence[str], *, elastic: bool) -> None:
        self._run, self._command, self._elastic = run, command, elastic
        self._variables: dict[str, str] = {}
        self.stop = threading.Event()
        """Ends all workers when it is set."""
        self._dismissed: dict[int, threading.Event] = {}
        """Of each worker that is alive."""
        self._turns: dict[str, threading.Semaphore] = {}
        """For connections that are about to begin, by host."""

    @property
    def alive(self) -> set[int]:
        return set(self._dismissed)

    def use(self, variables: Mapping[str, object]) -> None:
        """Give these variables to all workers from now on."""
        self._variables = {name: str(value) for name, value in variables.items()}

    def run(self, number: int, slot: SlotInfo, events: Sequence[threading.Event] = ()) -> int:
        """Run a worker to its end, by itself or because one of the events is set; return its exit code. Blocks."""
        dismissed = self._dismissed[number] = threading.Event()
        try:
            code = self._run_one(number, slot, (self.stop, dismissed, *events))
        except OSError as error:
            self._record(number, Host.labelled(slot.hostname).name, ("exit", 1, f"cannot be started: {error}"))
            code = 1
        if self._elastic:
            self._run.end_worker(number)
        del self._dismissed[number]
        return code

    def dismiss(self, numbers: set[int]) -> None:
        """End workers that the others go on without. Blocks for :data:`_DISMISS_S` at most."""
        for number in numbers:
            self._run.end_worker(number)
            if (dismissed := self._dismissed.get(number)) is not None:
                dismissed.set()
        deadline = time.monotonic() + _DISMISS_S
        while numbers & self.alive and time.monotonic() < deadline:
            time.sleep(_POLL_S)

    def _run_one(self, number: int, slot: SlotInfo, events: Sequence[threading.Event]) -> int:
        files, host = self._run.rank(number), Host.labelled(slot.hostname)
        given = {**self._variables, **create_slot_env_vars(slot), **(env.worker_variables(number) if self._elastic else {})}
        here = ssh.is_here(host)
        connection = None if here else self._connect_in_turn(host, given, events)
        if not here and connection is None:
            self._record(number, host.name, ("ended", _ENDED, "ended before it began"))
            return _ENDED
        process = self._start(given) if connection is None else connection.process
        self._wait(process, connection, events)
        code = process.returncode
        files.look_again()
        if connection is not None:
            ended = connection.how_it_ended(code, host.name, begun=files.process.is_file())
            connection.release()
        else:
            how: Kind = "signal" if code < 0 else "exit"
            message = (
                f"killed by {signal_name(-code)}, with the process that watched it" if code < 0 else f"exited with code {code}"
            )
            ended = (how, 128 - code if code < 0 else code, message)
        if code != 0 and not files.done.is_file() and read_failure(self._run, number) is None:
            self._record(number, socket.gethostname() if connection is None else host.name, ended)
        return 128 - code if code < 0 else code

    def _start(self, given: Mapping[str, str]) -> subprocess.Popen[bytes]:
        prepare = functools.partial(begin_group, signal.SIGTERM)
        return subprocess.Popen(self._command, env={**os.environ, **given}, stdin=subprocess.DEVNULL, preexec_fn=prepare)

    def _connect_in_turn(self, host: Host, given: Mapping[str, str], events: Sequence[threading.Event]) -> Connection | None:
        """Connect to a host; blocks until that has begun or failed, or an event says that it no longer matters. None: it did
        before this one's turn came."""
        with self._turns.setdefault(host.name, threading.Semaphore(ssh.MOST_BEGINNING)):
            if any(event.is_set() for event in events):
                return None
            connection = self._connect(host, given)
            while not connection.hear() and connection.process.poll() is None and not any(event.is_set() for event in events):
                connection.attend()
                time.sleep(_POLL_S)
        return connection

    def _connect(self, host: Host, given: Mapping[str, str]) -> Connection:
        told = {**ssh.starting_variables(), **env.own_variables(), **given, **env.control_variables(ordered=True)}
        argv = ssh.command(host.name, Path.cwd(), told, self._command)
        connection = ssh.connect(argv, Path.cwd(), {}, functools.partial(begin_group, signal.SIGTERM))
        connection.introduce({**ssh.sent_variables(), **env.secret_variables(env.given_secrets())})
        return connection

    def _wait(self, process: subprocess.Popen[bytes], connection: Connection | None, events: Sequence[threading.Event]) -> None:
        """Until the worker has ended; where an event says so, it is told to, and killed when its time is over."""
        deadline: float | None = None
        while process.poll() is None:
            time.sleep(_POLL_S)
            if connection is not None:
                connection.attend()
                connection.hear()
            if deadline is None and any(event.is_set() for event in events):
                deadline = time.monotonic() + _GRACE_S
                if connection is None:
                    process.terminate()
                else:
                    connection.tell("leave")
            elif deadline is not None and time.monotonic() > deadline:
                deadline = float("inf")
                if connection is None:
                    process.kill()
                else:
                    connection.close()

    def _record(self, number: int, host: str, ended: tuple[Kind, int, str]) -> None:
        kind, exit_code, message = ended
        task = str(Task("worker", number)) if self._elastic else ""
        failure = RankFailure(
            rank=number, task=task, host=host, time=time.time(), exit_code=exit_code, kind=kind, message=message
        )
        write_record(self._run.rank(number).error, failure, durable=False)


class Unawaited:
    """A worker that Horovod tells that hosts have come or gone, without waiting for its answer.

    Horovod does so under the lock without which nobody goes on: for a minute and more where that worker's host is cut off.
    """

    def __init__(self, client: WorkerNotificationClient) -> None:
        self._client = client

    def notify_hosts_updated(self, timestamp: float, update_res: Any) -> None:
        threading.Thread(target=self._tell, args=(timestamp, update_res), daemon=True).start()

    def _tell(self, timestamp: float, update_res: Any) -> None:
        with contextlib.suppress(Exception):  # as Horovod does: who cannot be told is found by other means
            self._client.notify_hosts_updated(timestamp, update_res)


class Driver(ElasticDriver):  # type: ignore[misc]
    """Horovod's, which also numbers the workers by their starts, and records which of them train together.

    What it overrides is called by its own threads.
    """

    def __init__(self, run: RunLayout, workers: Workers, *args: Any, **kwargs: Any) -> None:
        self._run, self._workers = run, workers
        self._numbers: dict[tuple[str, int], int] = {}
        self._started = 0
        self.reason = ""
        """Why it stopped, where it was not because the work was done."""
        super().__init__(*args, **kwargs)

    def number_of(self, slot: SlotInfo) -> int:
        """The number of the worker that was started in this slot last."""
        return self._numbers[slot.hostname, slot.local_rank]

    def wait_for_available_slots(self, min_num_proc: int, min_hosts: int = 1) -> Any:
        there = self._host_manager.current_hosts.count_available_slots()
        if there < min_num_proc and self._started:
            _say(f"{there} of {min_num_proc} workers can go on; waiting for a host up to {self._timeout:g} s (--elastic-timeout)")
        try:
            return super().wait_for_available_slots(min_num_proc, min_hosts)
        except Exception:  # Horovod's own timeout, or that it has been stopped meanwhile
            hosts = f"no hosts with {min_num_proc} slots within {self._timeout:g} s (--elastic-timeout)"
            self.reason = self.reason or (
                f"fewer than --min-workers {min_num_proc} were left, and {hosts}" if self._started else hosts
            )
            raise

    def get_worker_client(self, slot_info: SlotInfo) -> Unawaited | None:
        client = super().get_worker_client(slot_info)
        return None if client is None else Unawaited(client)

    def stop(self, error_message: str | None = None) -> None:
        states = self._worker_registry
        if not self.reason and states.count("SUCCESS") == 0:
            gave_up = "a worker failed on each host, and Horovod gives up a host, with all its workers, when one of them fails"
            self.reason = "all workers failed" if states.count("FAILURE") == states.size() else error_message or gave_up
        super().stop(error_message)

    def _activate_workers(self, min_num_proc: int) -> None:
        super()._activate_workers(min_num_proc)
        slots = sorted((slot for slots in self.host_assignments.values() for slot in slots), key=lambda slot: int(slot.rank))
        workers = [self.number_of(slot) for slot in slots]
        write_record(self._run.world, World(since=time.time(), workers=workers, started=self._started), durable=False)
        self._workers.dismiss(set(range(self._started)) - set(workers))

    def _start_worker_process(self, slot_info: SlotInfo) -> None:
        number, self._started = self._started, self._started + 1
        self._numbers[slot_info.hostname, slot_info.local_rank] = number
        self._run.rank(number).root.mkdir(parents=True, exist_ok=True)
        self._run.worker_staging(number).mkdir(parents=True, exist_ok=True)
        super()._start_worker_process(slot_info)


def main() -> NoReturn:
    asked = _parse(sys.argv[1:])
    begun = RunLayout(Path(os.environ[env.RUN_DIR])).newest_attempt()
    run = begun if begun.attempt is not None else RunLayout(begun.root, 0)  # a pasted line of --dry-run begins none
    rendezvous, address = RendezvousServer(), get_driver_ip([asked.interface])
    workers = Workers(run, asked.command, elastic=asked.elastic is not None)

    def end(number: int, _frame: FrameType | None) -> None:
        workers.stop.set()
        if not workers.alive:
            os._exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    logging.disable()  # Horovod's own words about what is said here
    _leave(
        _run_elastic(asked, run, workers, rendezvous, address)
        if asked.elastic
        else _run_fixed(asked, workers, rendezvous, address)
    )


def _run_fixed(asked: argparse.Namespace, workers: Workers, rendezvous: RendezvousServer, address: str) -> int:
    """Run as many workers as were asked for to their end; the first exit code that is not 0. Who fails leaves the others alone:
    to end those is the supervisor's."""
    slots = get_host_assignments([HostInfo(host.label, host.slots) for host in asked.hosts], asked.workers, asked.workers)
    port = rendezvous.start()
    rendezvous.init(slots)
    workers.use(create_run_env_vars(address, [asked.interface], port))
    with ThreadPoolExecutor(
        max_workers=len(slots)
    ) as pool:  # threads that stay: the kernel ends a process with the one that began it
        codes = list(pool.map(lambda slot: workers.run(slot.rank, slot), slots))
    return next((code for code in codes if code), 0)


def _run_elastic(asked: argparse.Namespace, run: RunLayout, workers: Workers, rendezvous: RendezvousServer, address: str) -> int:
    """Run workers while there are enough, until they are done; the exit code of the one that failed first, of the last ones."""
    least, most = asked.elastic
    discovery = Discovery(asked.hosts, asked.discovery, _say)
    driver = Driver(run, workers, rendezvous, discovery, least, most, timeout=asked.timeout, cooldown_range=_COOLDOWN_S)
    port = rendezvous.start(create_rendezvous_handler(driver))
    workers.use(create_run_env_vars(address, [asked.interface], port, elastic=True))

    def create_worker(slot: SlotInfo, events: list[threading.Event]) -> tuple[int, float]:
        code = workers.run(driver.number_of(slot), slot, events)
        if code != 0:
            discovery.doubt(Host.labelled(slot.hostname).name)
        return code, time.time()

    try:
        driver.start(asked.workers, create_worker)
    except Exception:  # whatever Horovod's own timeout is
        _say(driver.reason)
        return 1
    while not driver.finished():
        time.sleep(_POLL_S)
        if workers.stop.is_set() and not workers.alive:
            return 1
    ended = sorted(driver.get_results().worker_results.values(), key=lambda result: result[1])
    code = next((code for code, _ in ended if code), 1 if driver.reason else 0)
    if code:
        _say(driver.reason or "a worker failed when others were done")
    return code


def _say(words: str) -> None:
    sys.stderr.write(f"{words}\n")
    sys.stderr.flush()


def _leave(code: int) -> NoReturn:
    """End this process, whatever threads of Horovod's still wait."""
    sys.stderr.flush()
    os._exit(code)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m dtrain.launch.gloo_driver")
    parser.add_argument("--hosts", type=parse_hosts, default=())
    parser.add_argument("--discovery", type=Path)
    parser.add_argument("--interface", required=True)
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--elastic", type=int, nargs=2, metavar=("MIN", "MAX"))
    parser.add_argument("--timeout", type=float)
    parser.add_argument("command", nargs="+")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
