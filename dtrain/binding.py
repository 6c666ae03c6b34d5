"""Which cores and which GPU each rank of a host has to itself: ``--bind core|numa``.

Planned from what the process may use (its affinity) and what /sys says of the host, and done by the guard of each rank before the
script starts: so it is the same under every launcher, which has to leave the ranks unbound.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from dtrain.errors import UsageError

Bind = Literal["none", "core", "numa"]
BINDS: tuple[Bind, ...] = get_args(Bind)


@dataclass(frozen=True, kw_only=True)
class HostTopology:
    """What a process may use of its host.

    ``cores`` are physical ones, each the set of its logical processors; ``nodes`` holds the number of each core's NUMA node, in
    the same order; ``gpus`` counts them.
    """

    cores: tuple[frozenset[int], ...]
    nodes: tuple[int, ...]
    gpus: int = 0

    @staticmethod
    def read(root: Path = Path("/")) -> HostTopology:
        """This host's. Where /sys is silent, every logical processor is a core of node 0."""
        allowed = os.sched_getaffinity(0)
        cpus = root / "sys/devices/system/cpu"
        node_of = {
            cpu: int(path.parent.name.removeprefix("node"))
            for path in (root / "sys/devices/system/node").glob("node[0-9]*/cpulist")
            for cpu in parse_cpus(_read(path))
        }
        found: dict[frozenset[int], int] = {}
        for cpu in sorted(allowed):
            siblings = parse_cpus(_read(cpus / f"cpu{cpu}/topology/thread_siblings_list")) or {cpu}
            found[frozenset(siblings & allowed) or frozenset({cpu})] = node_of.get(cpu, 0)
        ordered = sorted(found.items(), key=lambda item: (item[1], min(item[0])))
        return HostTopology(
            cores=tuple(core for core, _ in ordered), nodes=tuple(node for _, node in ordered), gpus=count_gpus(root)
        )

    @property
    def processors(self) -> int:
        """How many logical processors there are."""
        return sum(map(len, self.cores))

    def to_json(self) -> dict[str, Any]:
        return {"cores": [sorted(core) for core in self.cores], "nodes": self.nodes, "gpus": self.gpus}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> HostTopology:
        return HostTopology(cores=tuple(map(frozenset, values["cores"])), nodes=tuple(values["nodes"]), gpus=values["gpus"])


def count_gpus(root: Path = Path("/")) -> int:
    """How many of NVIDIA's GPUs this host has, or this container was given."""
    return sum(1 for path in (root / "dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name))


@dataclass(frozen=True, kw_only=True)
class RankBinding:
    """What one rank is bound to: logical processors, of which NUMA nodes, how many threads it should have, its GPU, None where it
    sees all."""

    cpus: frozenset[int] = field(default_factory=frozenset)
    nodes: tuple[int, ...] = ()
    threads: int = 1
    gpu: int | None = None

    def __str__(self) -> str:
        nodes = f"NUMA node{'s' * (len(self.nodes) > 1)} {format_cpus(self.nodes)}"
        shown = f"processors {format_cpus(self.cpus)} ({nodes}), {self.threads} thread{'s' * (self.threads > 1)}"
        return shown if self.gpu is None else f"{shown}, GPU {self.gpu}"


def plan_binding(bind: Bind, local_size: int, host: HostTopology) -> list[RankBinding]:
    """What each of a host's ``local_size`` ranks is bound to, by local rank; without binding nothing. Pure.

    ``core``: as many cores of its own for each rank as for any other, close to each other; hyperthreads stay together while there
    is a core for each rank. ``numa``: all cores of its own NUMA nodes or, of more ranks than nodes, of a node that it shares. The
    GPU is the one of its local rank, where there is one for every rank and more than one rank: a single one sees all.

    Raises UsageError for more ranks than there are processors, with ``core``. Who else uses the host is not known: two jobs that
    are bound at once have the same cores.
    """
    if bind == "none":
        return []
    logical = [frozenset({cpu}) for core in host.cores for cpu in sorted(core)]
    if bind == "core":
        if local_size > len(logical):
            raise UsageError(
                f"--bind core: {local_size} ranks on this host exceed the {len(logical)} processors that they may use; start "
                "fewer, or leave out --bind"
            )
        units = list(host.cores) if local_size <= len(host.cores) else logical
        share = len(units) // local_size
        sets = [_union(units[rank * share : (rank + 1) * share]) for rank in range(local_size)]
        threads = [len(cpus) for cpus in sets]
    else:
        sets = _by_node(local_size, host)
        threads = [max(1, len(cpus) // sets.count(cpus)) for cpus in sets]
    gpus = range(local_size) if 1 < local_size <= host.gpus else [None] * local_size
    # Ranks work in step: threads that one has more than another would only wait.
    return [
        RankBinding(cpus=cpus, nodes=_nodes_of(cpus, host), threads=min(threads), gpu=gpu)
        for cpus, gpu in zip(sets, gpus, strict=True)
    ]


def _by_node(local_size: int, host: HostTopology) -> list[frozenset[int]]:
    nodes = [
        _union(core for core, of in zip(host.cores, host.nodes, strict=True) if of == node) for node in sorted(set(host.nodes))
    ]
    if local_size >= len(nodes):
        return [nodes[rank * len(nodes) // local_size] for rank in range(local_size)]
    share = len(nodes) // local_size
    return [_union(nodes[rank * share : (rank + 1) * share]) for rank in range(local_size)]


def _nodes_of(cpus: frozenset[int], host: HostTopology) -> tuple[int, ...]:
    return tuple(sorted({node for core, node in zip(host.cores, host.nodes, strict=True) if core & cpus}))


def _union(sets: Iterable[frozenset[int]]) -> frozenset[int]:
    return frozenset().union(*sets)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def parse_cpus(text: str) -> set[int]:
    """The kernel's lists: ``0-3,8``."""
    ranges = re.findall(r"(\d+)(?:-(\d+))?", text)
    return {cpu for first, last in ranges for cpu in range(int(first), int(last or first) + 1)}


def format_cpus(cpus: Iterable[int]) -> str:
    """The inverse of :func:`parse_cpus`."""
    runs: list[list[int]] = []
    for cpu in sorted(cpus):
        if runs and cpu == runs[-1][1] + 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(f"{first}-{last}" if last > first else str(first) for first, last in runs)
