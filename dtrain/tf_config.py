"""``TF_CONFIG``, which tells each process of a TensorFlow cluster who all of them are and which one it is.

The format is TensorFlow's: https://www.tensorflow.org/guide/distributed_training#setting_up_the_tf_config_environment_variable
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dtrain.errors import RankError
from dtrain.roles import ROLES, Dialect, Task

TF_CONFIG = "TF_CONFIG"


@dataclass(frozen=True, kw_only=True)
class Member:
    """A task of a cluster and its place in it."""

    task: Task
    rank: int
    size: int
    local_rank: int
    local_size: int


def read_tf_config(environ: Mapping[str, str]) -> Member | None:
    """Which task of which cluster ``TF_CONFIG`` says this is; None when it names no cluster, as TensorFlow reads it too."""
    text = environ.get(TF_CONFIG, "")
    if not text.strip():
        return None
    try:
        config = json.loads(text)
    except ValueError as error:
        raise _bad_tf_config(text, f"is not JSON ({error})") from None
    if not isinstance(config, dict):
        raise _bad_tf_config(text, "is not a JSON object")
    if not config.get("cluster"):
        return None
    tasks = _cluster(text, config["cluster"])
    mine = _own_task(text, config.get("task"))
    if not mine.in_cluster:
        # The cluster does not count its evaluator, which comes after it.
        return Member(task=mine, rank=len(tasks), size=len(tasks) + 1, local_rank=0, local_size=1)
    if mine not in tasks:
        raise _bad_tf_config(text, f"says that this is {mine}, which is not in its cluster of {', '.join(map(str, tasks))}")
    hosts = [address.rpartition(":")[0] for address in tasks.values()]
    rank = list(tasks).index(mine)
    return Member(
        task=mine,
        rank=rank,
        size=len(tasks),
        local_rank=hosts[:rank].count(hosts[rank]),
        local_size=hosts.count(hosts[rank]),
    )


def _cluster(text: str, cluster: Any) -> dict[Task, str]:
    """The tasks of a cluster and their addresses, in the order of ranks."""
    if not isinstance(cluster, dict):
        raise _bad_tf_config(text, "has a cluster that is not an object of roles")
    for role, addresses in cluster.items():
        if role == "evaluator":
            raise _bad_tf_config(
                text, "lists an evaluator in its cluster: the others would wait for it; only its own task names it"
            )
        if role not in ROLES:
            raise _bad_tf_config(text, f"has a role {role!r}")
        good = isinstance(addresses, list) and all(isinstance(a, str) and re.fullmatch(r"\S+:\d+", a) for a in addresses)
        if not good:
            raise _bad_tf_config(text, f"has {role}={addresses!r}, which is no list of 'host:port'")
    leaders = sum(len(cluster.get(role, [])) for role in ("chief", "master"))
    if leaders > 1:
        raise _bad_tf_config(text, f"has {leaders} chiefs or masters; a cluster has at most one")
    return {Task(role, index): address for role in ROLES for index, address in enumerate(cluster.get(role, []))}


def _own_task(text: str, task: Any) -> Task:
    if not isinstance(task, dict) or "type" not in task or "index" not in task:
        raise _bad_tf_config(text, "does not say in task.type and task.index which task this is")
    role, index = task["type"], task["index"]
    if role not in ROLES:
        raise _bad_tf_config(text, f"has task.type={role!r}")
    if isinstance(index, bool) or not re.fullmatch(r"\d+", str(index)):
        raise _bad_tf_config(text, f"has task.index={index!r}, which is no number from 0")
    return Task(role, int(index))


def _bad_tf_config(text: str, what: str) -> RankError:
    return RankError(
        f"{TF_CONFIG} {what}; allowed are roles {', '.join(ROLES)} and the form "
        '{"cluster": {"chief": ["host:port"], "worker": ["host:port", ...], "ps": [...]}, "task": {"type": "ps", "index": 0}}; '
        f"it is {text[:400]}"
    )


def cluster_variables(addresses: Mapping[Task, str], mine: Task, dialect: Dialect) -> dict[str, str]:
    """``TF_CONFIG`` for one task of a cluster. ``addresses``: ``host:port`` of every task; the evaluator's is left out."""
    cluster: dict[str, list[str]] = {}
    for task, address in addresses.items():
        if task.in_cluster:
            cluster.setdefault(task.role, []).append(address)
    config: dict[str, Any] = {"cluster": cluster, "task": {"type": mine.role, "index": mine.index}}
    if dialect == "workers":
        config["environment"] = "cloud"  # as Azure ML writes it; tf.estimator asks for it where there is no chief
    return {TF_CONFIG: json.dumps(config)}
