"""The options of launcher horovod: what goes together, and what is refused in which words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dtrain.errors import NotRunnable, UsageError
from dtrain.hosts import Host
from dtrain.job_options import HorovodOptions
from dtrain.spec import JobSpec


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"controller": "glo"}, r"unknown --controller 'glo' \(did you mean gloo\?\); there are mpi, gloo"),
        ({"min_workers": 0}, "--min-workers 0 is not a number from 1"),
        ({"min_workers": 3, "max_workers": 2}, "--min-workers 3 is more than --max-workers 2"),
        ({"controller": "mpi", "min_workers": 1}, "elastic jobs need Gloo"),
        ({"discovery": Path("/hosts.sh")}, "--discovery is for an elastic job; say with --min-workers N"),
        ({"controller": "gloo", "elastic_timeout_s": 9.0}, "--elastic-timeout is for an elastic job"),
        ({"min_workers": 1, "elastic_timeout_s": 0.0}, "--elastic-timeout=0 is not a number of seconds above 0"),
    ],
)
def test_what_contradicts_itself(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        HorovodOptions(**options)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"launcher": "mpi", "horovod": HorovodOptions(controller="gloo")}, "go with --launcher horovod, not with mpi"),
        ({"workers": 2, "horovod": HorovodOptions(min_workers=3)}, "-n 2, with which the job begins, is not in --min-workers 3"),
        ({"workers": 3, "horovod": HorovodOptions(max_workers=2)}, "--max-workers 2"),
        ({"max_ranks": 4, "horovod": HorovodOptions(max_workers=5)}, "--max-workers 5 exceeds --max-ranks 4"),
        ({"bind": "core", "horovod": HorovodOptions(min_workers=1)}, "--bind cannot be where workers come and go"),
        (
            {"hosts": (Host("a"),), "shared_fs": False, "horovod": HorovodOptions(controller="gloo")},
            "--no-shared-fs does not go with Horovod over Gloo",
        ),
        ({"workers": 3, "hosts": (Host("a", 2),), "horovod": HorovodOptions(min_workers=1)}, "3 tasks exceed 1 host x 2 slots"),
    ],
)
def test_what_a_job_cannot_have(tmp_path: Path, spec: dict[str, Any], words: str) -> None:
    (tmp_path / "train.py").touch()
    with pytest.raises(UsageError, match=words):
        JobSpec(**{"target": str(tmp_path / "train.py"), "launcher": "horovod", **spec})


def test_the_program_that_names_the_hosts(tmp_path: Path) -> None:
    (tmp_path / "train.py").touch()
    program = tmp_path / "hosts.sh"
    job = {
        "target": str(tmp_path / "train.py"),
        "launcher": "horovod",
        "horovod": HorovodOptions(min_workers=1, discovery=program),
    }
    with pytest.raises(NotRunnable, match="there is no such file; name a program that prints a host a line"):
        JobSpec(**job)  # type: ignore[arg-type]
    program.touch()
    with pytest.raises(NotRunnable, match=r"is not executable; run: chmod \+x"):
        JobSpec(**job)  # type: ignore[arg-type]
    program.chmod(0o755)
    with pytest.raises(UsageError, match="--discovery says which hosts there are; leave out -H and --hostfile"):
        JobSpec(**job, hosts=(Host("node1"),))  # type: ignore[arg-type]
    assert JobSpec(**job, network="10.0.0.0/24").horovod_options.elastic  # type: ignore[arg-type]
