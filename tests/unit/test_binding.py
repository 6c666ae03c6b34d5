"""Which processors and GPU each rank of a host has to itself."""

from __future__ import annotations

import os
from pathlib import Path

import orjson
import pytest

from dtrain.binding import Bind, HostTopology, format_cpus, parse_cpus, plan_binding
from dtrain.errors import UsageError
from dtrain.resources import bound_variables


def host(cores: int, nodes: int = 1, *, threads: int = 1, gpus: int = 0) -> HostTopology:
    """One whose core n has the processors n, n + cores, ..., as Linux counts them."""
    sets = tuple(frozenset(range(core, cores * threads, cores)) for core in range(cores))
    return HostTopology(cores=sets, nodes=tuple(core * nodes // cores for core in range(cores)), gpus=gpus)


@pytest.mark.parametrize(
    ("bind", "ranks", "topology", "processors", "threads"),
    [
        ("core", 2, host(4), ["0-1", "2-3"], 2),
        ("core", 2, host(5), ["0-1", "2-3"], 2),  # none has more than another
        ("core", 4, host(8, 2, threads=2), ["0-1,8-9", "2-3,10-11", "4-5,12-13", "6-7,14-15"], 4),
        ("core", 3, host(8, 2, threads=2), ["0-1,8-9", "2-3,10-11", "4-5,12-13"], 4),
        ("core", 4, host(2, threads=2), ["0", "2", "1", "3"], 1),  # more ranks than cores: hyperthreads
        ("numa", 2, host(8, 2), ["0-3", "4-7"], 4),
        ("numa", 4, host(8, 2), ["0-3", "0-3", "4-7", "4-7"], 2),
        ("numa", 3, host(8, 2), ["0-3", "0-3", "4-7"], 2),
        ("numa", 2, host(8, 4), ["0-3", "4-7"], 4),
        ("numa", 3, host(2), ["0-1", "0-1", "0-1"], 1),
        ("none", 2, host(4), [], None),
    ],
)
def test_shares(bind: Bind, ranks: int, topology: HostTopology, processors: list[str], threads: int | None) -> None:
    bindings = plan_binding(bind, ranks, topology)
    assert [format_cpus(binding.cpus) for binding in bindings] == processors
    assert {binding.threads for binding in bindings} <= {threads}


def test_how_a_binding_is_told() -> None:
    assert str(plan_binding("numa", 1, host(8, 2))[0]) == "processors 0-7 (NUMA nodes 0-1), 8 threads"
    assert str(plan_binding("core", 3, host(8, 2, gpus=4))[2]) == "processors 4-5 (NUMA node 1), 2 threads, GPU 2"
    assert str(plan_binding("core", 2, host(2, 1))[1]) == "processors 1 (NUMA node 0), 1 thread"


def test_more_ranks_than_processors() -> None:
    with pytest.raises(UsageError, match="5 ranks on this host exceed the 4 processors"):
        plan_binding("core", 5, host(4))


@pytest.mark.parametrize(
    ("ranks", "gpus", "seen"),
    [(1, 1, [None]), (1, 4, [None]), (2, 1, [None, None]), (2, 2, [0, 1]), (2, 4, [0, 1])],
)
def test_each_rank_has_its_gpu_where_there_is_one_for_each(ranks: int, gpus: int, seen: list[int | None]) -> None:
    """One rank alone may use them all; ranks that are too many see them all, and the trainers say so."""
    assert [binding.gpu for binding in plan_binding("core", ranks, host(8, gpus=gpus))] == seen


def test_what_a_bound_rank_is_told() -> None:
    binding = plan_binding("core", 2, host(8, gpus=2))[1]
    told = bound_variables(binding, {"MKL_NUM_THREADS": "7"})
    assert (told["CUDA_VISIBLE_DEVICES"], told["OMP_NUM_THREADS"], "MKL_NUM_THREADS" in told) == ("1", "4", False)
    assert "CUDA_VISIBLE_DEVICES" not in bound_variables(binding, {"CUDA_VISIBLE_DEVICES": "0,1"})


def test_what_sys_says_of_a_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two nodes of two cores with two processors each, of which this process may use all but one."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)) - {5})
    for node, listed in enumerate(("0,2,4,6", "1,3,5,7")):
        folder = tmp_path / f"sys/devices/system/node/node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(f"{listed}\n")
    for cpu in range(8):
        folder = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    (tmp_path / "dev").mkdir()
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / "dev" / name).touch()
    found = HostTopology.read(tmp_path)
    assert [sorted(core) for core in found.cores] == [[0, 4], [2, 6], [1], [3, 7]]
    assert (found.nodes, found.gpus) == ((0, 0, 1, 1), 2)
    bare = HostTopology.read(tmp_path / "nothing")
    assert (len(bare.cores), set(bare.nodes), bare.gpus) == (7, {0}, 0)


def test_a_host_says_what_it_has() -> None:
    there = host(4, 2, threads=2, gpus=3)
    assert HostTopology.from_json(orjson.loads(orjson.dumps(there.to_json()))) == there
    assert there.processors == 8


def test_lists_of_the_kernel() -> None:
    assert parse_cpus("0-3,8,10-11\n") == {0, 1, 2, 3, 8, 10, 11}
    assert format_cpus({0, 1, 2, 3, 8, 10, 11}) == "0-3,8,10-11"
    assert (parse_cpus(""), format_cpus([])) == (set(), "")
