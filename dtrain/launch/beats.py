"""Finds the rank, or the host, that gives no sign of life any more."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

from dtrain.launch.agents import Agents, lost
from dtrain.launch.plan import LaunchPlan
from dtrain.launch.ssh import FAILED
from dtrain.layout import RunLayout
from dtrain.status import RankFailure, read_process

_LOOK_S = 1.0
# Where a host has been silent for so long, it is not yet said that a rank of it alone is lost: their beats may come by its agent.
_DOUBT_S = 2.5
# A supervisor that did not look for so long was itself stopped, or its file system was, and so perhaps was everything else.
_STOPPED_S = 5.0


class Beats:
    """What the guards of one attempt have said last. Its supervisor reads it, once for all who watch."""

    def __init__(self, plan: LaunchPlan, run: RunLayout, *, watched: bool = True) -> None:
        """``watched``: whether anybody asks for them; else they are not read."""
        self._plan, self._run, self._watched = plan, run, watched
        self._looked = time.monotonic()
        self.last: dict[int, bytes] = {}
        """Of each rank that has begun, its heartbeat file."""
        self.stopped_s = 0.0
        """How long this process did not look, until the last reading: not how long that took, for of many ranks it takes long."""

    @property
    def due(self) -> bool:
        """Whether they are to be read: the last reading is long enough ago."""
        return self._watched and time.monotonic() - self._looked >= _LOOK_S

    def read(self) -> None:
        """Read them all; blocks where the file system does."""
        pauses, self.last = [self._pause()], {}
        for rank in self._plan.ranks(self._run):
            with contextlib.suppress(OSError):  # it has not begun
                self.last[rank] = self._run.rank(rank).heartbeat.read_bytes()
            pauses.append(self._pause())
        self.stopped_s = sum(pause for pause in pauses if pause > _STOPPED_S)

    def _pause(self) -> float:
        """Seconds since this was last asked."""
        before, self._looked = self._looked, time.monotonic()
        return self._looked - before


class BeatWatch:
    """Watches the beats of the guards and agents of one attempt. Used by its supervisor.

    A beat counts by its change, seen on the supervisor's own clock: hosts' clocks differ.
    """

    def __init__(
        self,
        plan: LaunchPlan,
        run: RunLayout,
        timeout_s: float | None,
        beats: Beats,
        agents: Agents,
        host_of: Callable[[int], str],
    ) -> None:
        """``host_of`` names the host of a rank."""
        self._plan, self._run, self._timeout_s, self._beats = plan, run, timeout_s, beats
        self._agents, self._host_of = agents, host_of
        self._last: dict[int | str, bytes | int] = {}
        self._seen: dict[int | str, float] = {}
        self._reported: set[int | str] = set()

    def look(self) -> list[RankFailure]:
        """After a reading of the beats, what was lost since the one before: a host as the failure of its first rank, else the
        rank's own."""
        now, limit = time.monotonic(), self._timeout_s
        if limit is None:
            return []
        self._seen = {key: seen + self._beats.stopped_s for key, seen in self._seen.items()}
        for name, count in self._agents.heard().items():
            if count:  # else it is about to begin
                self._note(name, count, now)
        silent = {rank for rank in self._plan.ranks(self._run) if self._silent_s(rank, now) > limit}
        failures = []
        for host in self._plan.other_hosts:
            begun = [rank for rank in host.ranks if rank in self._seen]
            if host.name in self._seen:  # then it is the host that is silent, and not only what it wrote into the run folder
                quiet = now - self._seen[host.name]
            else:
                quiet = now - max(self._seen[rank] for rank in begun) if begun and silent.issuperset(begun) else 0.0
            if quiet > limit and host.name not in self._reported:
                self._reported.update([host.name, *host.ranks])
                self._agents.give_up(host.name)
                tasks = self._plan.task_names(self._run)
                failures.append(lost(host, f"does not answer since {_clock(quiet)}", time.time() - quiet, tasks))
            elif quiet > _DOUBT_S:
                silent.difference_update(host.ranks)
        for rank in sorted(silent - self._reported):
            self._reported.add(rank)
            failures.append(self._lost(rank, now - self._seen[rank]))
        return failures

    def _note(self, key: int | str, value: bytes | int, now: float) -> None:
        if self._last.get(key) != value or key not in self._seen:
            self._last[key], self._seen[key] = value, now

    def _silent_s(self, rank: int, now: float) -> float:
        """Seconds since the rank's last beat; 0 of one that has not begun, or has ended."""
        if rank not in self._beats.last:
            return 0.0
        self._note(rank, self._beats.last[rank], now)
        silent_s = now - self._seen[rank]
        if silent_s <= (self._timeout_s or 0.0):
            return 0.0
        files = self._run.rank(rank)
        files.look_again()
        if files.done.is_file() or files.error.is_file():
            self._seen.pop(rank)
            return 0.0
        return silent_s

    def _lost(self, rank: int, quiet_s: float) -> RankFailure:
        record = read_process(self._run, rank)
        process = record.find() if record is not None else None
        state = f"; its process {process.pid} is {process.status()}" if process is not None else ""
        names = self._plan.task_names(self._run)
        return RankFailure(
            rank=rank,
            task=names[rank] if names else "",
            host=self._host_of(rank),
            time=time.time() - quiet_s,
            exit_code=FAILED,
            kind="exit",
            message=f"lost: gives no sign of life since {_clock(quiet_s)} (--heartbeat-timeout){state}",
        )


def _clock(ago_s: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(time.time() - ago_s))
