"""Finds the rank that lives and does nothing any more, and says who waits for whom."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

from dtrain.job_options import Hangs
from dtrain.launch.beats import Beats
from dtrain.launch.crew import Crew
from dtrain.launch.plan import LaunchPlan
from dtrain.launch.stacks import Beat, collect_stacks, collective, place, read_beat
from dtrain.layout import RunLayout
from dtrain.progress import FINALIZE, FINALIZES, SCRIPT_OVER
from dtrain.status import listed, read_process

HANG = 123
"""The exit code of a job that was ended for it: beside 124, that of the time limit."""
# How much later than another rank's progress one's may be seen: its guard's next beat, the next reading, and as much again.
_LATE_S = 4.0
_PLACE = re.compile(r":\d+ in ")
"""In what :func:`~dtrain.launch.stacks.place` says of a rank that answered; of another it says why it did not."""


class HangWatch:
    """Watches the ranks of one attempt. Used by its supervisor.

    Progress is what the rank's guard counts (metrics, collectives, calls of MPI, checkpoints; see dtrain.progress) and what the
    rank prints.
    Only the supervisor's own clock is used: hosts' clocks differ.
    """

    def __init__(
        self,
        plan: LaunchPlan,
        run: RunLayout,
        hangs: Hangs,
        say: Callable[[str], None],
        crew: Crew,
        beats: Beats,
    ) -> None:
        """``say`` shows words; ``crew`` reaches ranks on other hosts."""
        self._plan, self._run, self._hangs, self._say, self._crew, self._beats = plan, run, hangs, say, crew, beats
        # Servers, and workers that serve a chief, do nothing of their own; an evaluator waits for checkpoints.
        self._idlers = {rank for rank, planned in plan.tasks.items() if planned.task.role in ("ps", "evaluator")}
        self._ranks: list[int] = []
        self._last: dict[int, Beat] = {}
        self._since: dict[int, float] = {}
        self._reported: set[int] = set()

    def printed(self, rank: int) -> None:
        """The rank wrote something."""
        self._progressed(rank)

    def look(self) -> str | None:
        """After a reading of the beats, why the job has to be ended, or None. Blocks where a rank hangs, for the moment in which
        stacks are collected."""
        limit = self._hangs.hang_timeout_s
        if limit is None:
            return None
        self._ranks = [rank for rank in self._plan.deciding_ranks(self._run) if rank not in self._idlers]
        if self._plan.elastic and any(self._run.rank(rank).error.is_file() for rank in self._ranks):
            for rank in self._ranks:  # they wait for a host to take its place, which has a limit of its own (--elastic-timeout)
                self._progressed(rank)
        idle_s = {rank: self._idle_s(rank) for rank in self._ranks}
        idle = [rank for rank in self._ranks if idle_s[rank] > limit and not self._has_ended(rank)]
        if not idle:
            return None
        hung = [rank for rank in idle if rank not in self._reported]
        left = [rank for rank in self._ranks if not self._run.rank(rank).done.is_file()]
        all_wait = self._hangs.on_hang == "auto" and all(self._beat(rank).collective for rank in left)
        stuck = all_wait and idle == left  # nobody is left who could send what these wait for
        if all_wait and not stuck and all(idle_s[rank] > limit - min(_LATE_S, 0.75 * limit) for rank in left):
            return None  # since the same moment, it seems, which is seen of some a beat later
        if not stuck and (not hung or self._wait_at_the_end(hung, left)):
            return None
        self._reported.update(hung)
        cause = self._tell(idle if stuck else hung)
        # Who never told anything through dtrain may be hard at work in silence, as may a chief that waits for its workers: they
        # are shown, not ended.
        known = not self._plan.tasks and any(self._beat(rank).count for rank in hung)
        ends = self._hangs.on_hang == "end" or (self._hangs.on_hang == "auto" and (known or stuck))
        if not ends:
            self._say("dtrain: the job goes on (--on-hang end would end it)")
        return cause if ends else None

    def _wait_at_the_end(self, hung: list[int], left: list[int]) -> bool:
        """Whether these ranks are done, and wait for others of those ``left`` that still do something."""
        return all(self._beat(rank).collective in FINALIZES for rank in hung) and not set(left) <= set(hung)

    def _beat(self, rank: int) -> Beat:
        """The last one that was read; an empty one of a rank that has not begun."""
        return self._last.get(rank, Beat())

    def _progressed(self, rank: int) -> None:
        self._since[rank] = time.monotonic()
        self._reported.discard(rank)

    def _idle_s(self, rank: int) -> float:
        """Seconds since the rank's last progress was seen; 0 of one that has not begun."""
        if rank not in self._beats.last:
            return 0.0
        beat, before = Beat.parse(self._beats.last[rank]), self._beat(rank)
        self._last[rank] = beat
        if rank not in self._since or (beat.count, beat.calls) != (before.count, before.calls):
            self._progressed(rank)
        return time.monotonic() - self._since[rank]

    def _has_ended(self, rank: int) -> bool:
        files = self._run.rank(rank)
        return files.done.is_file() or files.error.is_file()

    def _tell(self, hung: list[int]) -> str:
        """Show what every rank does, those that do the same in a line, and return the cause in a sentence."""
        limit, ranks, tasks = self._hangs.hang_timeout_s, self._plan.ranks(self._run), self._plan.task_names(self._run)
        stacks = collect_stacks(self._run, ranks, self._crew.tell, self._crew.pause)
        beats = {rank: read_beat(self._run, rank) for rank in ranks}
        waits: dict[str, list[int]] = {}
        alike: dict[tuple[str, str], list[int]] = {}
        for rank, beat in beats.items():
            name = beat.collective or collective(stacks[rank])
            waits.setdefault(name, []).append(rank)
            where = "" if name == SCRIPT_OVER else place(stacks[rank])
            alike.setdefault((name, where), []).append(rank)

        def named(ranks: list[int]) -> str:
            return listed(tasks[rank] if tasks else f"rank {rank}" for rank in ranks)

        self._say(f"dtrain: no progress of {named(hung)} for {limit:g} s: no output, metric, collective or checkpoint")
        for (name, where), ranks_there in alike.items():
            one, since_s = len(ranks_there) == 1, max(beats[rank].since_s for rank in ranks_there)
            call = FINALIZE if name == SCRIPT_OVER else name
            waiting = f"{'waits' if one else 'wait'} in {call}" + (f" for {since_s:.0f} s" if since_s else "")
            doing = waiting if name else f"{'is' if one else 'are'} in no collective that dtrain knows"
            self._say(f"dtrain:   {named(ranks_there)} {doing}: {where or _scripts_are_over(ranks_there)}")
        self._say(f"dtrain: the stacks of all ranks are in {self._run.ranks}/*/stack.txt")
        gone = [rank for rank in self._ranks if self._run.rank(rank).done.is_file()]
        free = [rank for rank in waits.pop("", []) if rank in self._ranks and rank not in gone]
        # Who is over while others exchange is why they wait.
        over = [] if free or waits.keys() <= {*FINALIZES} else waits.pop(SCRIPT_OVER, [])
        gone = [rank for rank in gone if rank not in over]
        waited = "; ".join(f"{named(ranks)} waited in {name}" for name, ranks in waits.items())
        if over:
            blamed = f"{self._on_hosts(over)} had left ({_scripts_are_over(over)}) while {waited}"
        elif free and waited:
            blamed = f"{named(free)} did not come ({place(stacks[free[0]])}), and {waited}"
        else:
            spots = [(named(there), len(there) == 1, spot) for (_, spot), there in alike.items() if set(there) & set(hung)]
            blamed = waited or "; ".join(_at(*each) for each in sorted(spots, key=lambda each: bool(_PLACE.search(each[2]))))
        blamed += f"; {named(gone)} had left before with exit code 0" if gone else ""
        return f"no progress for {limit:g} s (--hang-timeout): {blamed}"

    def _on_hosts(self, ranks: list[int]) -> str:
        """The ranks, each with its host."""
        hosts = {rank: record.host for rank in ranks if (record := read_process(self._run, rank)) is not None}
        return listed(f"rank {rank} on {hosts.get(rank, '?')}" for rank in ranks)


def _scripts_are_over(ranks: list[int]) -> str:
    return "its script is over" if len(ranks) == 1 else "their scripts are over"


def _at(names: str, is_one: bool, where: str) -> str:
    return f"{names} {'was' if is_one else 'were'} at {where}" if _PLACE.search(where) else f"{names}: {where}"
