"""What an elastic job lives through: a worker that died or left is told in a line, and is no failure of the job."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from dtrain.layout import RunLayout
from dtrain.status import RankFailure, World, read_world


class Survivals:
    """Of one attempt. Used by its supervisor, which asks :meth:`look` again and again."""

    def __init__(self, run: RunLayout, say: Callable[[str], None]) -> None:
        """``say`` shows words."""
        self._run, self._say = run, say
        self._world = World(since=0.0, workers=[], started=0)
        self._told: set[int] = set()

    def look(self, failures: Mapping[int, RankFailure]) -> dict[int, RankFailure]:
        """Say what the job has lived through since the last look; return the failures that it has not, by the worker's number."""
        world = read_world(self._run)
        count = f"{len(world.workers)} worker{'s' if len(world.workers) != 1 else ''}"
        survived = {number for number in failures if number < world.started and number not in world.workers}
        for number in sorted(survived - self._told):
            self._told.add(number)
            lost = failures[number]
            how = lost.describe() if lost.kind != "ended" else f"{lost.task} on {lost.host} was let go, as its host was"
            self._say(f"dtrain: {how}; the job goes on with {count}")
        joined = [number for number in world.workers if number >= self._world.started]
        if joined and self._world.workers:
            self._say(f"dtrain: {', '.join(f'worker {number}' for number in joined)} joined: the job has {count} now")
        self._world = world
        return {number: failure for number, failure in failures.items() if number not in survived}
