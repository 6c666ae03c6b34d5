"""``HyperDriveConfig``, which ``experiment.submit`` takes: a job, and the settings to try it with."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any, ClassVar

from dtrain.azureml.errors import Named, UserErrorException, take_options
from dtrain.azureml.estimator import Estimator
from dtrain.azureml.parameters import ParameterSampling, Setting
from dtrain.azureml.policies import EarlyTerminationPolicy, NoTerminationPolicy
from dtrain.azureml.runconfig import ScriptRunConfig, check_count

_MOST = {"max_total_runs": 1000, "max_concurrent_runs": 100}
_KNOWN: Mapping[str, Any] = {
    "hyperparameter_sampling": None,
    "primary_metric_name": None,
    "primary_metric_goal": None,
    "max_total_runs": None,
    "max_concurrent_runs": None,
    "max_duration_minutes": 10080,
    "policy": None,
    "estimator": None,
    "run_config": None,
}
_REFUSED: Mapping[str, str] = {
    "resume_from": "submit a sweep of the settings that are left",
    "resume_child_runs": "submit a run of its own, with resume_from= in the estimator",
    "pipeline": "submit the steps one after another from the control script",
}


class PrimaryMetricGoal(Enum):
    """Whether more or less of the primary metric is better."""

    MAXIMIZE = "maximize"
    MINIMIZE = "minimize"

    @property
    def sign(self) -> int:
        """What a value is multiplied with so that more is better."""
        return 1 if self is PrimaryMetricGoal.MAXIMIZE else -1


class HyperDriveConfig(Named):
    """A sweep: an ``estimator`` or a ScriptRunConfig (``run_config``), run once for each setting. Called by control scripts.

    A parameter is given to the script as an argument, ``--NAME VALUE``, after those that it has anyway.
    """

    _options: ClassVar = tuple(_KNOWN)
    _differs: ClassVar = {
        "(max_concurrent_runs=)": "at most as many as the compute target has nodes for; 'local' and hosts run one at a time",
        "(max_duration_minutes=)": "runs that still go on then are canceled, and the sweep is Completed if one has completed",
    }
    _refused: ClassVar = {f"({name}=)": reason for name, reason in _REFUSED.items()}
    _by_place: ClassVar[Sequence[str]] = tuple(_KNOWN)

    def __init__(self, *positional: Any, **given: Any) -> None:
        """Raises UserErrorException for what cannot be, TypeError for an unknown argument."""
        named = dict(zip(self._by_place, positional, strict=False))
        if len(positional) > len(_KNOWN) or named.keys() & given.keys():
            raise TypeError("HyperDriveConfig() has an argument twice, or too many by place; give them by name")
        options = take_options("HyperDriveConfig", {**named, **given}, _KNOWN, _REFUSED)
        if (options["estimator"] is None) == (options["run_config"] is None):
            raise UserErrorException("HyperDriveConfig() takes estimator=, or run_config=ScriptRunConfig(...), and one of them")
        policy = NoTerminationPolicy() if options["policy"] is None else options["policy"]
        for name, value, kind in (
            ("hyperparameter_sampling", options["hyperparameter_sampling"], ParameterSampling),
            ("primary_metric_goal", options["primary_metric_goal"], PrimaryMetricGoal),
            ("primary_metric_name", options["primary_metric_name"], str),
            ("policy", policy, EarlyTerminationPolicy),
            ("estimator", options["estimator"], Estimator | None),
            ("run_config", options["run_config"], ScriptRunConfig | None),
        ):
            if not isinstance(value, kind) or value == "":
                raise UserErrorException(f"HyperDriveConfig() has {name}={value!r:.80}, and takes {_WANTED[name]} there")
        self._check_limits(options)
        self._job: Estimator | ScriptRunConfig = options["estimator"] or options["run_config"]
        self._policy = policy
        self._goal: PrimaryMetricGoal = options["primary_metric_goal"]
        self._sampling: ParameterSampling = options["hyperparameter_sampling"]
        self._options_given = options

    @staticmethod
    def _check_limits(options: Mapping[str, Any]) -> None:
        for name, most in _MOST.items():
            is_given = options[name] is not None or name == "max_total_runs"
            if is_given and check_count(name, options[name]) > most:
                raise UserErrorException(f"{name}={options[name]} is not a number from 1 to {most}")
        minutes = options["max_duration_minutes"]
        if isinstance(minutes, bool) or not isinstance(minutes, int | float) or minutes <= 0:
            raise UserErrorException(f"max_duration_minutes={minutes!r} is not a number of minutes above 0")

    def _settings(self) -> list[Setting]:
        """The settings that are tried, in this order."""
        return list(itertools.islice(self._sampling._settings(), self._options_given["max_total_runs"]))

    def _record(self, at_once: int) -> dict[str, Any]:
        """What is told of the sweep in its run's definition."""
        given = self._options_given
        return {
            "primaryMetricName": given["primary_metric_name"],
            "primaryMetricGoal": self._goal.name,
            "maxTotalRuns": given["max_total_runs"],
            "maxConcurrentRuns": at_once,
            "maxDurationMinutes": given["max_duration_minutes"],
            "sampling": type(self._sampling).__name__,
            "policy": type(self._policy).__name__,
        }


class HyperDriveRunConfig(HyperDriveConfig):
    """The older name, whose first argument by place is the estimator."""

    _options: ClassVar = ()  # the same
    _by_place: ClassVar = ("estimator", *(name for name in _KNOWN if name not in ("estimator", "run_config")))


_WANTED = {
    "hyperparameter_sampling": "RandomParameterSampling(...) or GridParameterSampling(...)",
    "primary_metric_goal": "PrimaryMetricGoal.MAXIMIZE or MINIMIZE",
    "primary_metric_name": "the name that the script logs it by",
    "policy": "BanditPolicy(...), MedianStoppingPolicy(...), TruncationSelectionPolicy(...) or NoTerminationPolicy()",
    "estimator": "an estimator",
    "run_config": "a ScriptRunConfig",
}
