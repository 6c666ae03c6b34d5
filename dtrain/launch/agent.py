"""One process on every other host where mpirun starts ranks: it ends them when nobody else is left who would.

``python -m dtrain.launch.agent RUN ATTEMPT SCRATCH COPIED RANK...`` is started there by ssh. Its standard input is told what to
do with a rank (``end 3``, ``stacks 3``); when that ends, for whatever reason, it leaves no process of the run on its host. Once a
second it says that it is there, and which ranks are no longer (``gone 3``). Where the run folder there is a copy, which COPIED
says, it also sends what its ranks write (launch/mirror.py), and when asked (``all 3``) says that it has sent all (``all 3``).
:class:`Agents` is this host's side.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from dtrain import env
from dtrain.errors import NotRunnable
from dtrain.launch import ssh
from dtrain.launch.mirror import Incoming, Outgoing
from dtrain.launch.plan import LaunchPlan, PlannedHost
from dtrain.launch.ssh import Connection
from dtrain.layout import RunLayout
from dtrain.processes import DUMP_STACKS, END_SCRIPT, LAUNCHER_IS_GONE, answers_stacks
from dtrain.status import RankFailure, listed, read_process

_GONE = b"gone "
_ALL = b"all "
_BEAT_S = 1.0
_LOOK_S = 0.1
# How much is taken over from a host before another one's turn comes.
_MOST_BYTES = 1 << 22
# How long guards may take to record why their scripts ended.
_RECORD_S = 1.0
# How long to look for ranks that may yet begin, when not all of them have.
_BEGIN_S = 3.0


def processes_of(run: Path, last: int | None = None) -> list[psutil.Process]:
    """All processes of this host that belong to the run in this folder: they carry it in their environment.

    ``last``: only those of that attempt and of the ones before it; None: of all.
    """
    marker, attempt, found = os.fsencode(f"{env.RUN_DIR}={run}"), f"{env.ATTEMPT}=".encode(), []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError, psutil.Error), open(f"/proc/{name}/environ", "rb") as environ:
            variables = environ.read().split(b"\0")  # a zombie's is empty
            number = next((each.removeprefix(attempt) for each in variables if each.startswith(attempt)), b"")
            if marker in variables and (last is None or int(number or 0) <= last):
                found.append(psutil.Process(int(name)))
    return found


def signal_guard(run: RunLayout, rank: int, number: int) -> bool:
    """Send the guard of a rank a signal; False when the rank does not run on this host, or its guard is gone."""
    record = read_process(run, rank)
    if record is None or record.guard is None or record.find() is None:
        return False
    guard = record.guard.find()  # not the script's parent: that may be init by now
    if guard is None:
        return False
    with contextlib.suppress(psutil.Error):
        guard.send_signal(number)
    return True


class Agents:
    """The agents of one attempt, as the crew sees them. Nothing here blocks but :meth:`start`, for the time of a fork."""

    def __init__(self, plan: LaunchPlan, run: RunLayout, lost_s: float, say: Callable[[str], None]) -> None:
        """``lost_s``: seconds of silence after which a host is lost; ``say`` shows words."""
        self._plan, self._hosts, self._run, self._scratch, self.lost_s = plan, plan.other_hosts, run, plan.scratch, lost_s
        self._incoming = {host.name: Incoming(run, say) for host in self._hosts}
        self._copied = {rank for host in self._hosts if host.copied for rank in host.ranks}
        self._asked: set[int] = set()
        self._connections: dict[str, Connection] = {}
        self._host_of = {rank: host.name for host in self._hosts for rank in host.ranks}
        self._reported: set[str] = set()
        self._heard: dict[str, int] = {}
        self._gone: set[int] = set()
        self._all_here: set[int] = set()

    def start(self, prepare: Callable[[], None]) -> None:
        """Start one on each host, all at once; once. Raises NotRunnable when there is no ssh client."""
        for host in self._hosts if not self._connections else ():
            copied = "copied" if host.copied else ""
            words = [str(self._run.root), str(self._run.attempt or 0), str(self._scratch or ""), copied, *map(str, host.ranks)]
            argv = [sys.executable, "-m", "dtrain.launch.agent", *words]
            line = ssh.command(
                host.name, Path("/"), ssh.starting_variables(), argv, lost_s=2 * self.lost_s
            )  # what watches the beats names it better
            try:
                connection = ssh.connect(line, self._run.root, {env.RUN_DIR: str(self._run.root)}, prepare, listen=True)
            except OSError as error:
                raise NotRunnable(f"the ssh client cannot be started: {error}") from error
            self._connections[host.name] = connection

    def heard(self) -> dict[str, int]:
        """Take over what has come; how many bytes each has said so far: one of which that does not change any more is silent."""
        for name, connection in self._connections.items():
            data = connection.hear(_MOST_BYTES)
            self._heard[name] = self._heard.get(name, 0) + len(data)
            for line in self._incoming[name].feed(data):
                for word, ranks in ((_GONE, self._gone), (_ALL, self._all_here)):
                    if line.startswith(word):
                        ranks.add(int(line.removeprefix(word)))
        return self._heard

    def has_all(self, rank: int) -> bool:
        """Whether all is here that a rank had written when this was asked first; ask again until it is.

        True at once where its host sees the run folder, and when nothing will come any more.
        """
        if rank not in self._copied or self._connections[self._host_of[rank]].process.poll() is not None:
            return True
        if rank not in self._asked:
            self._asked.add(rank)
            self.tell(rank, "all")
        self.heard()
        if rank not in self._all_here:
            return False
        self._asked.discard(rank)
        self._all_here.discard(rank)
        return True

    def tell(self, rank: int, word: str) -> bool:
        """Say a word about a rank; False when it is on no host with an agent."""
        connection = self._connections.get(self._host_of.get(rank, ""))
        if connection is None:
            return False
        connection.tell(f"{word} {rank}")
        return True

    def has_left(self, rank: int) -> bool:
        """True when the agent of that rank's host says so, or is gone itself, and with it the rank."""
        connection = self._connections.get(self._host_of.get(rank, ""))
        if connection is None:
            return False
        self.heard()
        return rank in self._gone or connection.process.poll() is not None

    def look(self) -> list[RankFailure]:
        """The hosts whose agents ended since the last look, each as the failure of its first rank."""
        failures = []
        for host in self._hosts:
            connection = self._connections.get(host.name)
            if connection is None or host.name in self._reported:
                continue
            connection.said()  # what waits there for too long would stop it
            code = connection.process.poll()
            if code is not None:
                self._reported.add(host.name)
                failures.append(lost(host, _why(connection, code), time.time(), self._plan.task_names(self._run)))
        return failures

    def give_up(self, host: str) -> None:
        """Wait no more for the agent of a host that does not answer, if it has one: that ends what is left there when it can."""
        self._reported.add(host)
        if host in self._connections:
            self._connections[host].process.kill()

    def close(self) -> None:
        """Let them end what is left on their hosts, and then themselves."""
        for connection in self._connections.values():
            connection.close()

    def alive(self) -> bool:
        return any(connection.process.poll() is None for connection in self._connections.values())

    def release(self) -> None:
        """When all have ended, or were given up: end their clients and give the descriptors back."""
        for connection in self._connections.values():
            connection.process.kill()
            connection.process.wait()
            connection.release()


def lost(host: PlannedHost, why: str, when: float, tasks: Sequence[str]) -> RankFailure:
    """The failure of a whole host; ``when`` (Unix seconds) it was there for the last time; ``tasks`` as of a plan."""
    ranks = host.ranks
    named = listed(tasks[rank] for rank in ranks) if tasks else f"{'ranks' if len(ranks) > 1 else 'rank'} {listed(ranks)}"
    message, task = f"lost: host {host.name} {why}: {named}", tasks[ranks[0]] if tasks else ""
    return RankFailure(rank=ranks[0], task=task, host=host.name, time=when, exit_code=ssh.FAILED, kind="exit", message=message)


def _why(connection: Connection, code: int) -> str:
    words = ssh.last_words(connection.said())
    if code < 0:
        return f"has no connection any more: its ssh client was killed by {signal.Signals(-code).name}"
    if code == ssh.FAILED and connection.broke():
        return f"does not answer: the ssh connection broke ({words})"
    return f"has no agent of dtrain's any more: it ended with code {code}{f' ({words})' if words else ''}"


def main() -> None:
    root, attempt, scratch, copied, *ranks = sys.argv[1:]
    run = RunLayout(Path(root), int(attempt))
    own = [int(rank) for rank in ranks]
    outgoing = Outgoing(run, own if copied else (), 1)
    _listen(run, own, outgoing)
    _leave_nothing(run, own)
    outgoing.finish()
    if scratch:
        shutil.rmtree(scratch, ignore_errors=True)


def _listen(run: RunLayout, ranks: list[int], outgoing: Outgoing) -> None:
    """Do what is said until nobody is there to say anything."""
    os.set_blocking(1, False)
    pending, next_beat, here = b"", 0.0, set(ranks)
    while True:
        if time.monotonic() >= next_beat:
            next_beat = time.monotonic() + _BEAT_S
            gone = {rank for rank in here if (record := read_process(run, rank)) is not None and record.find() is None}
            here -= gone
            # Over a connection that broke unnoticed, it is by this that this host's sshd finds out, and ends.
            outgoing.say(b"".join(b"%s%d\n" % (_GONE, rank) for rank in gone) or b"\n")
        with contextlib.suppress(OSError):
            outgoing.write()
        wait_s = min(next_beat, outgoing.next_look) - time.monotonic()
        ready, _, _ = select.select([0], [1] if outgoing.is_waiting else [], [], max(0.0, wait_s))
        if not ready:
            continue
        data = os.read(0, 65536)
        if not data:
            return
        *lines, pending = (pending + data).split(b"\n")
        for line in lines:
            word, _, rank = line.decode().partition(" ")
            if word == "all":
                outgoing.confirm(b"%s%d\n" % (_ALL, int(rank)))
            else:
                _do(word, run, int(rank))


def _do(word: str, run: RunLayout, rank: int) -> None:
    if word == "end":
        signal_guard(run, rank, END_SCRIPT)
    elif word == "stacks":
        record = read_process(run, rank)
        if record is not None and (script := record.find()) is not None and answers_stacks(record.pid):
            script.send_signal(DUMP_STACKS)


def _leave_nothing(run: RunLayout, ranks: list[int]) -> None:
    """End what of the run is on this host: guards first, which then record why their scripts were ended.

    Not what a later attempt has started: this one may learn late that its connection is gone.
    """
    told = [signal_guard(run, rank, LAUNCHER_IS_GONE) for rank in ranks]
    deadline = time.monotonic() + (_RECORD_S if any(told) else 0.0)
    while time.monotonic() < deadline and processes_of(run.root, run.attempt):
        time.sleep(_LOOK_S)
    begun = all(run.rank(rank).process.is_file() for rank in ranks)
    deadline = time.monotonic() + (0.0 if begun else _BEGIN_S)
    while (left := processes_of(run.root, run.attempt)) or time.monotonic() < deadline:
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        time.sleep(_LOOK_S)


if __name__ == "__main__":
    main()
