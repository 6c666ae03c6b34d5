"""What is particular to MPI; the contract itself is tests/contract/test_communicator.py."""

from __future__ import annotations

import numpy as np
import pytest

from dtrain.comm import Communicator, create_communicator
from dtrain.comm.mpi import MpiCommunicator
from dtrain.env import RankEnv
from dtrain.errors import CommunicationError, RankError

pytestmark = pytest.mark.mpi


def test_a_world_of_another_size_names_the_library_and_what_to_do(comm: Communicator) -> None:
    with pytest.raises(RankError) as caught:
        create_communicator(RankEnv(size=comm.size + 1), "mpi")
    message = str(caught.value)
    assert f"started {comm.size + 1} ranks" in message
    assert f"a world of {comm.size}" in message
    assert "Open MPI v" in message or "MPICH" in message
    assert "mpirun" in message
    assert "pip install" in message


def test_auto_is_mpi_for_several_ranks(comm: Communicator) -> None:
    made = create_communicator(RankEnv(size=comm.size))
    assert (made.rank, made.size) == (comm.rank, comm.size)
    assert isinstance(made, MpiCommunicator)
    made.close()


def test_messages_of_the_script_are_not_ours(comm: Communicator) -> None:
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    request = world.isend(("script", comm.rank), dest=right, tag=0)
    pending = world.Ibcast(np.full(1, comm.rank), root=0)  # a collective of the script that is under way while ours runs
    arrays = [np.full(3, comm.rank, np.float64)]
    comm.allreduce_mean_(arrays)
    assert comm.allgather_obj(comm.rank) == list(range(comm.size))
    assert world.recv(source=left, tag=0) == ("script", left)
    request.wait()
    pending.Wait()
    np.testing.assert_array_equal(arrays[0], (comm.size - 1) / 2)


def test_mpi_errors_become_ours(comm: Communicator) -> None:
    from mpi4py import MPI

    broken = MpiCommunicator()
    broken._comm.Free()
    with pytest.raises(CommunicationError, match="barrier: MPI failed on rank") as caught:
        broken.barrier()
    assert isinstance(caught.value.__cause__, MPI.Exception)
    broken._comm = None


def test_bucket_sizes_must_agree(comm: Communicator) -> None:
    with pytest.raises(CommunicationError, match="bucket_bytes differs"):
        MpiCommunicator(bucket_bytes=1024 + comm.rank)


def test_few_messages_for_many_arrays(comm: Communicator, monkeypatch: pytest.MonkeyPatch) -> None:
    made = MpiCommunicator()
    sent: list[int] = []
    real = made._buckets.exchange
    monkeypatch.setattr(
        made._buckets, "exchange", lambda arrays, message, transfer: (sent.append(1), real(arrays, message, transfer))
    )
    made.allreduce_mean_([np.zeros(10, np.float32) for _ in range(1000)])
    assert len(sent) == 1
    made.close()


def test_large_arrays_go_in_parts(comm: Communicator) -> None:
    length = 3 * 2**20 + 1  # 12 MiB: four parts
    values = np.arange(length) % 1000
    arrays = [(values + comm.rank).astype(np.float32), np.full(length, comm.rank, np.float16), np.full(5, comm.rank, np.float32)]
    comm.allreduce_mean_(arrays)
    np.testing.assert_array_equal(arrays[0], values + (comm.size - 1) / 2)
    for array in arrays[1:]:
        np.testing.assert_array_equal(array, (comm.size - 1) / 2)
    comm.broadcast_([arrays[0]])
    np.testing.assert_array_equal(arrays[0], values + (comm.size - 1) / 2)
