"""Tests that need several ranks: collected only under mpirun with --with-mpi.

``tests/contract/test_under_mpirun.py`` starts them so at several sizes and over every MPI there is; by hand:
``mpirun -np 2 python -m pytest --with-mpi tests/ranks``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dtrain.comm import Communicator


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return None if config.getoption("--with-mpi", False) else True


@pytest.fixture
def comm() -> Iterator[Communicator]:
    """All ranks."""
    from dtrain.comm.mpi import MpiCommunicator

    made = MpiCommunicator()
    yield made
    made.close()


@pytest.fixture
def first_ranks() -> Iterator[Callable[[int], Communicator | None]]:
    """Makes a communicator of the first n ranks: None on the others. Collective over all."""
    from mpi4py import MPI

    from dtrain.comm.mpi import MpiCommunicator

    made: list[Communicator] = []

    def make(count: int) -> Communicator | None:
        inside = MPI.COMM_WORLD.Get_rank() < count
        part = MPI.COMM_WORLD.Split(0 if inside else 1)
        made.append(MpiCommunicator(part))
        part.Free()  # ours is a duplicate, and must not need it
        return made[-1] if inside else None

    yield make
    for communicator in made:
        communicator.close()


@pytest.fixture
def shared_path(comm: Communicator, tmp_path: Path) -> Path:
    """One folder that all ranks share: rank 0's."""
    return Path(comm.bcast_obj(tmp_path))
