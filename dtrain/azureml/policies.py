"""``azureml.train.hyperdrive``: which runs of a sweep are not worth their end. Pure: told of values, not of runs.

Each time that a run logs the primary metric is one interval of it. Values here are signed so that more is better.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence, Set
from typing import ClassVar

from dtrain.azureml.errors import Named, UserErrorException
from dtrain.azureml.runconfig import check_count

Values = Mapping[str, Sequence[float]]
"""What each run has logged of the primary metric, in order, by its id."""


class EarlyTerminationPolicy(Named):
    """A policy, applied to a run at each ``evaluation_interval`` of its intervals, from the first after ``delay_evaluation``."""

    _fields: ClassVar = ("evaluation_interval", "delay_evaluation")

    def __init__(self, evaluation_interval: int = 1, delay_evaluation: int = 0) -> None:
        self.evaluation_interval = check_count("evaluation_interval", evaluation_interval)
        self.delay_evaluation = check_count("delay_evaluation", delay_evaluation, 0)

    def _due(self, logged: int) -> int:
        """The newest interval, of as many as were ``logged``, at which it is applied; 0 where there is none yet."""
        newest = logged - logged % self.evaluation_interval
        return newest if newest >= max(self.delay_evaluation, 1) else 0

    def _stops(self, run: str, at: int, values: Values, ended: Set[str]) -> bool:
        """Whether ``run`` is to end, by what all runs had logged at its interval ``at``; ``ended`` are those that are over."""
        raise NotImplementedError


class NoTerminationPolicy(EarlyTerminationPolicy):
    """Every run goes on to its end."""

    def __init__(self) -> None:
        super().__init__()

    def _stops(self, run: str, at: int, values: Values, ended: Set[str]) -> bool:
        return False


class BanditPolicy(EarlyTerminationPolicy):
    """Ends a run whose best value is further from the best run's than ``slack_factor`` (a ratio) or ``slack_amount`` allows."""

    _fields: ClassVar = ("slack_factor", "slack_amount")

    def __init__(
        self,
        evaluation_interval: int = 1,
        slack_factor: float | None = None,
        slack_amount: float | None = None,
        delay_evaluation: int = 0,
    ) -> None:
        super().__init__(evaluation_interval, delay_evaluation)
        given = [value for value in (slack_factor, slack_amount) if value is not None]
        if len(given) != 1 or isinstance(given[0], bool) or not isinstance(given[0], int | float) or given[0] < 0:
            raise UserErrorException(
                f"BanditPolicy(slack_factor={slack_factor!r}, slack_amount={slack_amount!r}): give one of them, a number from 0"
            )
        self.slack_factor, self.slack_amount = slack_factor, slack_amount

    def _stops(self, run: str, at: int, values: Values, ended: Set[str]) -> bool:
        best = max(max(each[:at]) for each in values.values() if each)
        if self.slack_amount is not None:
            allowed = best - self.slack_amount
        else:
            assert self.slack_factor is not None
            # Of a metric that is to be small, and so negative here, the ratio is above the best one.
            allowed = best / (1 + self.slack_factor) if best > 0 else best * (1 + self.slack_factor)
        return max(values[run][:at]) < allowed


class MedianStoppingPolicy(EarlyTerminationPolicy):
    """Ends a run whose best value is worse than the median of all runs' averages until the same interval."""

    def _stops(self, run: str, at: int, values: Values, ended: Set[str]) -> bool:
        averages = [statistics.fmean(each[:at]) for each in values.values() if len(each) >= at]
        return max(values[run][:at]) < statistics.median(averages)


class TruncationSelectionPolicy(EarlyTerminationPolicy):
    """Ends the worst ``truncation_percentage`` of the runs that have come to the same interval, by their values there.

    A run that is no worse there than one that goes on does so, too.
    """

    _fields: ClassVar = ("truncation_percentage", "exclude_finished_jobs")

    def __init__(
        self,
        truncation_percentage: int,
        evaluation_interval: int = 1,
        delay_evaluation: int = 0,
        exclude_finished_jobs: bool = False,
    ) -> None:
        super().__init__(evaluation_interval, delay_evaluation)
        self.truncation_percentage = check_count("truncation_percentage", truncation_percentage)
        if truncation_percentage > 99:
            raise UserErrorException(f"truncation_percentage={truncation_percentage} is not a number from 1 to 99")
        self.exclude_finished_jobs = exclude_finished_jobs

    def _stops(self, run: str, at: int, values: Values, ended: Set[str]) -> bool:
        left_out = ended if self.exclude_finished_jobs else frozenset[str]()
        there = sorted(each[at - 1] for name, each in values.items() if len(each) >= at and name not in left_out)
        return values[run][at - 1] < there[len(there) * self.truncation_percentage // 100]
