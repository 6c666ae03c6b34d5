"""The agents of one attempt (launch/agent.py), from the side of the supervisor."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from dtrain import env
from dtrain.errors import NotRunnable
from dtrain.launch import ssh
from dtrain.launch.agent import ALL, GONE
from dtrain.launch.mirror import Incoming
from dtrain.launch.plan import LaunchPlan, PlannedHost
from dtrain.launch.ssh import Connection
from dtrain.layout import RunLayout
from dtrain.status import RankFailure, listed

# How much is taken over from a host before another one's turn comes.
_MOST_BYTES = 1 << 22


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
                connection = ssh.connect(line, self._run.root, {env.RUN_DIR: str(self._run.root)}, prepare)
            except OSError as error:
                raise NotRunnable(f"the ssh client cannot be started: {error}") from error
            self._connections[host.name] = connection

    def heard(self) -> dict[str, int]:
        """Take over what has come; how many bytes each has said so far: one of which that does not change any more is silent."""
        for name, connection in self._connections.items():
            data = connection.hear(_MOST_BYTES)
            self._heard[name] = self._heard.get(name, 0) + len(data)
            for line in self._incoming[name].feed(data):
                for word, ranks in ((GONE, self._gone), (ALL, self._all_here)):
                    if line.startswith(word):
                        ranks.add(int(line.removeprefix(word)))
        return self._heard

    def has_all(self, rank: int) -> bool:
        """Whether all is here, as far as it was :meth:`heard`, that a rank had written when this was asked first; ask again until
        it is.

        True at once where its host sees the run folder, and when nothing will come any more.
        """
        if rank not in self._copied or self._connections[self._host_of[rank]].process.poll() is not None:
            return True
        if rank not in self._asked:
            self._asked.add(rank)
            self.tell(rank, "all")
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
        """True when the agent of that rank's host has said so, as far as it was :meth:`heard`, or is gone itself."""
        return rank in self._gone or self.is_gone(rank)

    def is_gone(self, rank: int) -> bool:
        """True when the agent of that rank's host has ended, and with it the rank; False where there was none."""
        connection = self._connections.get(self._host_of.get(rank, ""))
        return connection is not None and connection.process.poll() is not None

    def look(self) -> list[RankFailure]:
        """The hosts whose agents ended since the last look, each as the failure of its first rank."""
        failures = []
        for host in self._hosts:
            connection = self._connections.get(host.name)
            if connection is None or host.name in self._reported:
                continue
            connection.attend()
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
    others = ""
    if len(ranks) > 1:  # the first is named by the failure itself
        others = f": {listed(tasks[rank] for rank in ranks)}" if tasks else f": ranks {listed(ranks)}"
    message, task = f"lost: host {host.name} {why}{others}", tasks[ranks[0]] if tasks else ""
    return RankFailure(rank=ranks[0], task=task, host=host.name, time=when, exit_code=ssh.FAILED, kind="exit", message=message)


def _why(connection: Connection, code: int) -> str:
    words = ssh.last_words(connection.said())
    if code < 0:
        return f"has no connection any more: its ssh client was killed by {signal.Signals(-code).name}"
    if code == ssh.FAILED and connection.broke():
        return f"does not answer: the ssh connection broke ({words})"
    return f"has no agent of dtrain's any more: it ended with code {code}{f' ({words})' if words else ''}"
