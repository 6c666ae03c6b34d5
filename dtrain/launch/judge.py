"""How an attempt ended: which rank failed first, or what else went wrong, from what is known when nobody is left."""

from __future__ import annotations

import dataclasses
import re
import signal
import time
from collections.abc import Callable, Mapping, Set

from dtrain.launch.aborts import name_abort
from dtrain.launch.output import Output
from dtrain.launch.plan import LaunchPlan
from dtrain.launch.ssh import FAILED
from dtrain.layout import RunLayout
from dtrain.processes import signal_name
from dtrain.status import ORPHANED, VANISHED, RankFailure, blame_who_left, first_failure, listed, script_over, who_left

_CAUSE_LINES = 20
# Slurm's words when it kills the ranks of srun, guards and all.
_STEP_CANCELED = re.compile(r"STEP \S+ ON \S+ CANCELLED")


class Judge:
    """Judges one attempt when it is over. Made by its supervisor, whose ``names`` of ranks (empty words where they have none) and
    ``host_of`` a rank it takes over."""

    def __init__(
        self, plan: LaunchPlan, run: RunLayout, output: Output, names: Mapping[int, str], host_of: Callable[[int], str]
    ) -> None:
        self._plan, self._run, self._output, self._names, self._host_of = plan, run, output, names, host_of

    def outcome(
        self, fatal: Mapping[int, RankFailure], failures: Mapping[int, RankFailure], on_other_hosts: Set[int], launcher_code: int
    ) -> tuple[int, str, RankFailure | None]:
        """The exit code, the cause in words (empty: all went well), and the first failure of a rank, where it was one.

        ``fatal`` are those of ``failures`` that ended the job; ``launcher_code`` is negative where the launcher was killed.
        """
        missing = [rank for rank in self._plan.deciding_ranks(self._run) if not self._run.rank(rank).done.is_file()]
        vanished = self._vanished([rank for rank in missing if rank not in failures], launcher_code)
        failure = first_failure(list(fatal.values()))
        gone = [failures[rank] for rank in sorted(on_other_hosts & failures.keys()) if failures[rank].message == ORPHANED]
        if launcher_code == 0 and failure is None:  # a lost daemon is no failure to Open MPI's mpirun
            gone += [self._silent(rank) for rank in missing if rank in on_other_hosts and not gone and self._has_begun(rank)]
        if gone and launcher_code >= 0:
            orphan = self._orphaned(gone)
            failure = orphan if failure is None or orphan.time < failure.time else failure
        if failure is not None and failure.of_shut_down:
            failure = self._why_shut_down(failure, vanished)
        elif len(vanished) == 1 and (failure is None or failure.kind == "consequence"):
            lost = vanished[0] if failure is None else dataclasses.replace(vanished[0], time=failure.time)  # it was gone by then
            failure = blame_who_left(self._run, lost, self._plan.size)
        elif failure is not None:
            failure = blame_who_left(self._run, self._named(failure), self._plan.size)
        elif launcher_code > 0:
            failure = self._left_early(vanished, launcher_code)
        if failure is not None:
            said = self._output.last_words(1) if self._plan.elastic else []  # why the others did not go on
            return failure.exit_code, "; ".join([failure.describe(), *said]), failure
        if vanished:
            return vanished[0].exit_code, _each(vanished), None
        if launcher_code != 0:
            return 128 - launcher_code if launcher_code < 0 else launcher_code, self._launcher_cause(launcher_code), None
        if missing:
            ranks = listed(self._names[rank] or f"rank {rank}" for rank in missing)
            return 1, f"the launcher ended with 0, but {ranks} left no completion record", None
        return 0, "", None

    def _vanished(self, silent: list[int], launcher_code: int) -> list[RankFailure]:
        """Ranks that began and left no record: they were killed, each with its guard, since any other end leaves one.

        Of several srun may say which was the first; else nobody can: MPICH kills the others before they can leave a record, and
        names any.
        """
        silent = [rank for rank in silent if self._has_begun(rank)]
        if launcher_code == 0 or (launcher_code < 0 and self._plan.launcher != "local"):
            return []  # one that was itself killed took its ranks with it; a single rank is started by nobody else
        message, first = VANISHED, self._output.first_to_end(before=_STEP_CANCELED).intersection(silent)
        if first:
            silent = sorted(first)
        elif any(_STEP_CANCELED.search(line) for line in self._output.last_words(_CAUSE_LINES)):
            message += "; Slurm canceled the step, as it does when MPI has lost a rank"
        killed = [RankFailure.now(rank, "signal", 128 + signal.SIGKILL, message) for rank in silent]
        killed = [dataclasses.replace(each, host=self._host_of(each.rank), task=self._names[each.rank]) for each in killed]
        return [named for each in killed if (named := self._named(each)) is not each] or killed

    def _why_shut_down(self, word: RankFailure, vanished: list[RankFailure]) -> RankFailure:
        """The rank that ended Horovod in all others; ``word`` is the first failure of it.

        It is the one that was killed before its script was over, unless another's was over before ``word``: who leaves later does
        so because of it. ``word`` itself where several were killed, for nobody can tell which was the first.
        """
        blamed = blame_who_left(self._run, word, self._plan.size)
        killed = [each for each in vanished if script_over(self._run, each.rank) is None]
        if not killed or blamed.time < word.time:
            return blamed
        return killed[0] if len(killed) == 1 else word

    def _left_early(self, vanished: list[RankFailure], launcher_code: int) -> RankFailure | None:
        """The rank that left before the others were done, for which MPI killed them, or mpirun ended."""
        left = who_left(self._run, self._plan.size, time.time())
        ended = _each(vanished) if vanished else f"{self._plan.processes[0].name} ended with code {launcher_code}"
        return None if left is None else left.then(ended)

    def _has_begun(self, rank: int) -> bool:
        return self._run.rank(rank).process.is_file()

    def _silent(self, rank: int) -> RankFailure:
        """One of which nobody says how it ended, as it may be where its guard is given no time."""
        failure = RankFailure.now(rank, "signal", FAILED, ORPHANED)
        return dataclasses.replace(failure, host=self._host_of(rank), task=self._names[rank])

    def _named(self, failure: RankFailure) -> RankFailure:
        return name_abort(failure, self._run, self._output.last_words(_CAUSE_LINES))

    def _orphaned(self, gone: list[RankFailure]) -> RankFailure:
        """The first of the ranks on other hosts whose launcher there has died."""
        message = f"lost: the daemon of {self._plan.processes[0].name} on this host, by which it was started, has died"
        return dataclasses.replace(min(gone, key=lambda each: each.time), kind="signal", exit_code=FAILED, message=message)

    def _launcher_cause(self, code: int) -> str:
        name = self._plan.processes[0].name
        how = f"was killed by {signal_name(-code)}" if code < 0 else f"ended with code {code}"
        said = "".join(f"\n  {line}" for line in self._output.last_words(_CAUSE_LINES))
        left = [rank for rank in range(self._plan.size) if self._run.rank(rank).done.is_file()]
        after = f", after rank {listed(left)} had left with exit code 0, and others had not" if left else ""
        return f"{name} {how} without any rank failing by itself{after}{'; it said:' + said if said else ''}"


def _each(vanished: list[RankFailure]) -> str:
    return f"{listed(each.who for each in vanished)}: each {vanished[0].message}"  # the same for all
