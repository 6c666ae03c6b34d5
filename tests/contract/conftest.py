"""The implementations that the contract runs over: the one of this process's world.

A plain pytest process is a world of one and gets the null object. Under mpirun (test_under_mpirun.py starts these same tests so)
it is MPI, at whatever size, or, where DTRAIN_TEST_COMMUNICATOR says so, Horovod.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from dtrain.comm import Communicator

UNDER_MPI = any(name in os.environ for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"))


KINDS = ["mpi", "mpi-small-buckets"] if UNDER_MPI else ["local"]


@pytest.fixture(params=["horovod"] if os.environ.get("DTRAIN_TEST_COMMUNICATOR") == "horovod" else KINDS)
def make_comm(request: pytest.FixtureRequest) -> Callable[[], Communicator]:
    """Makes a communicator; collective."""
    if request.param == "local":
        from dtrain.comm.local import LocalCommunicator

        return LocalCommunicator
    if request.param == "horovod":
        from dtrain.comm.horovod import HorovodCommunicator

        return HorovodCommunicator
    from dtrain.comm.mpi import MpiCommunicator

    # 72 bytes: every bucket overflows, and arrays of more than nine float64 travel alone and in parts
    return MpiCommunicator if request.param == "mpi" else lambda: MpiCommunicator(bucket_bytes=72)


@pytest.fixture
def comm(make_comm: Callable[[], Communicator]) -> Iterator[Communicator]:
    made = make_comm()
    yield made
    made.close()
