"""``python -m dtrain.azureml.sweep_rank``: the one rank of a sweep. It starts the children, ends those that are not worth their
end, and waits for all; what it decides it prints. Who cancels the sweep sends SIGTERM, and it cancels its children.
"""

from __future__ import annotations

import collections
import os
import signal
import sys
import time
from typing import NoReturn

from dtrain.azureml import records
from dtrain.azureml.console import say
from dtrain.azureml.errors import TrainingException, UserErrorException
from dtrain.azureml.run import Run
from dtrain.azureml.state import ENDED, status_of
from dtrain.azureml.sweep import TAG, Sweep, logged_names, logged_values, read_sweep, setting_text
from dtrain.errors import DtrainError
from dtrain.layout import RunLayout
from dtrain.resources import THREAD_VARIABLES
from dtrain.status import RankFailure, write_record

_POLL_S = 0.5
_FIRST = 3
"""After so many children that failed, and none that completed, the rest is not tried."""
_SHOWN = 12
_CANCEL_S = 15.0  # a job's ranks are killed 10 s after they were told to end


class _Canceled(BaseException):
    """Somebody canceled the sweep."""


def _cancel(*_: object) -> NoReturn:
    raise _Canceled


class Sweeper:
    """Works through the settings of one sweep."""

    def __init__(self, run: Run, sweep: Sweep) -> None:
        self._run, self._sweep = run, sweep
        self._left = collections.deque(sweep.settings)
        self._going: dict[str, Run] = {}
        self._ended: dict[str, str] = {}  # status by id
        self._values: dict[str, list[float]] = {}  # signed: more is better
        self._judged: dict[str, int] = {}  # the interval until which each was
        self._until = time.monotonic() + sweep.limit_s
        self._over = ""  # why the rest is not tried, where its time is over
        self.first_failed: RunLayout | None = None
        """The child that was seen to fail first."""

    def work(self) -> None:
        """Run all children. Blocks until they have ended. Raises TrainingException, which says why, where none has completed."""
        while self._left or self._going:
            self._look()
            failed = list(self._ended.values()).count("Failed")
            if self._left and failed == len(self._ended) >= _FIRST:
                self._stop(f"the first {failed} runs have all failed")
            if time.monotonic() > self._until:
                self._over = f"max_duration_minutes={self._sweep.limit_s / 60:g} are over"
                self._stop(self._over)
                self._until = float("inf")
            while self._left and len(self._going) < self._sweep.at_once:
                self._begin()
            if self._going:
                time.sleep(_POLL_S)
        told = self._count()
        if "Completed" not in self._ended.values():
            first = "" if self.first_failed is None else f"{self.first_failed.id} failed: {status_of(self.first_failed).cause}"
            why = (first, self._over, f"no run of the sweep has completed ({told})")
            raise TrainingException("; ".join(filter(None, why)))
        say(f"the sweep has tried {len(self._ended)} settings: {told}")
        if not any(self._values.values()):
            self._warn_of_no_metric()

    def _warn_of_no_metric(self) -> None:
        """Say what the children have logged instead, and let ``get_details()`` tell it."""
        metric = self._sweep.metric
        names = list(dict.fromkeys(name for child in self._run.get_children() for name in logged_names(child._layout)))
        logged = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
        what = f"a number as {metric!r}" if metric in names else repr(metric)
        text = f"no run logged {what}; they logged {logged or 'nothing'}"
        say(f"warning: {text}")
        records.note(self._run._layout, "warning", text=text)

    def _count(self) -> str:
        """How many children have ended how, and how many settings have none."""
        counted = collections.Counter(self._ended.values())
        counted["not tried"] = len(self._sweep.settings) - len(self._ended)
        return ", ".join(f"{count} {status}" for status, count in counted.items() if count)

    def _begin(self) -> None:
        setting = self._left.popleft()
        text = setting_text(setting)
        child = self._run.submit_child(self._sweep.job_of(setting, self._run._layout.code), tags={TAG: text})
        say(f"{child.id} begins with {text}")
        self._going[child.id] = child

    def _look(self) -> None:
        """See how the children go on, and cancel what the policy does not let go on."""
        sign, metric = self._sweep.goal.sign, self._sweep.metric
        for name, child in list(self._going.items()):
            status = child.get_status()
            self._values[name] = [value * sign for value in logged_values(child._layout, metric)]
            if status in ENDED:
                del self._going[name]
                self._ended[name] = status
                if status == "Failed" and self.first_failed is None:
                    self.first_failed = child._layout
                best = f"{metric} {max(self._values[name]) * sign:g}" if self._values[name] else f"no {metric} logged"
                say(f"{name} {status}: {best}")
        for name, child in self._going.items():
            at = self._sweep.policy._due(len(self._values[name]))
            if at > self._judged.get(name, 0):
                self._judged[name] = at
                if self._sweep.policy._stops(name, at, self._values, self._ended.keys()):
                    say(f"{name} is canceled by {type(self._sweep.policy).__name__} after {at} values of {metric}")
                    _ask_to_end(child)

    def _stop(self, why: str) -> None:
        """Try no other setting, and cancel what goes on."""
        say(f"{why}: {len(self._left)} settings are not tried, {len(self._going)} runs are canceled")
        self._left.clear()
        for child in self._going.values():
            _ask_to_end(child)


def _ask_to_end(child: Run) -> bool:
    """Cancel a child. False where that cannot be (Slurm does not answer, say), which is said: others are to be canceled still."""
    try:
        child.cancel()
    except UserErrorException as error:
        say(f"{child.id} is not canceled: {error}")
        return False
    return True


def cancel_children(run: Run) -> None:
    """Cancel all that go on, and wait until those that could be have ended; for 15 s at most."""
    going = [child for child in run.get_children() if child.get_status() not in ENDED]
    children = [child for child in going if _ask_to_end(child)]
    until = time.monotonic() + _CANCEL_S
    while time.monotonic() < until and any(child.get_status() not in ENDED for child in children):
        time.sleep(_POLL_S)


def _fail(run: RunLayout, message: str, child: RunLayout | None) -> NoReturn:
    """End this rank, which failed of ``message``; the traceback is that of a ``child``'s script, and never ours."""
    failure = None if child is None else status_of(child).failure
    trace = "" if failure is None else failure.traceback
    say(f"{trace}{message}")
    write_record(run.rank(0).error, RankFailure.now(0, "exit", 1, message, trace))
    sys.exit(1)


def main() -> None:
    run: Run = Run.get_context(allow_offline=False)
    sweep = read_sweep(run._layout)
    for name in THREAD_VARIABLES:  # this rank's share of the machine is none of its children's
        os.environ.pop(name, None)
    os.environ.update(sweep.threads)
    sweeper = Sweeper(run, sweep)
    signal.signal(signal.SIGTERM, _cancel)
    try:
        sweeper.work()
    except BaseException as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        cancel_children(run)
        if isinstance(error, _Canceled):
            sys.exit(128 + signal.SIGTERM)
        if isinstance(error, DtrainError):
            _fail(run._layout, str(error), sweeper.first_failed if isinstance(error, TrainingException) else None)
        raise


if __name__ == "__main__":
    main()
