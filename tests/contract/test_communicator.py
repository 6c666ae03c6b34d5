"""What every communicator does, at any size: expected values follow from rank and size."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from dtrain.comm import Communicator
from dtrain.errors import CommunicationError

LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "contiguous": lambda a: a.copy(),
    "fortran": lambda a: np.asfortranarray(a),
    "every_other": lambda a: np.repeat(a, 2, axis=0)[::2],
    "reversed": lambda a: a[::-1].copy()[::-1],
    "column": lambda a: np.stack([a, a], axis=-1)[..., 0],
    "swapped_bytes": lambda a: a.astype(a.dtype.newbyteorder()),
}
SHAPES = [(4, 5), (1, 1), (0, 3), (40, 7), (3,)]


def lay_out(values: np.ndarray, layout: str) -> np.ndarray:
    return LAYOUTS[layout](values)


def test_ranks_and_sizes_agree_with_each_other(comm: Communicator) -> None:
    assert comm.allgather_obj(comm.rank) == list(range(comm.size))
    # one host, so the local ranks are those of the job
    assert comm.local_size == comm.size
    assert sorted(comm.allgather_obj(comm.local_rank)) == list(range(comm.size))
    comm.barrier()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_mean_of_every_dtype_and_layout(comm: Communicator, dtype: type, layout: str) -> None:
    arrays = [
        lay_out(np.full(shape, comm.rank, dtype) + np.arange(np.prod(shape)).reshape(shape).astype(dtype), layout)
        for shape in SHAPES
    ]
    kept = list(arrays)

    comm.allreduce_mean_(arrays)

    for array, same, shape in zip(arrays, kept, SHAPES, strict=True):
        assert array is same
        expected = np.arange(np.prod(shape)).reshape(shape) + (comm.size - 1) / 2
        np.testing.assert_array_equal(array, expected)


def test_mean_where_each_rank_lays_its_arrays_out_differently(comm: Communicator) -> None:
    layouts = ["contiguous", "fortran", "every_other", "column"]
    layout = layouts[comm.rank % len(layouts)]
    arrays = [lay_out(np.arange(280.0).reshape(40, 7) * (comm.rank + 1), layout), np.array(comm.rank, np.float64)]

    comm.allreduce_mean_(arrays)

    np.testing.assert_array_equal(arrays[0], np.arange(280.0).reshape(40, 7) * (comm.size + 1) / 2)
    assert arrays[1] == (comm.size - 1) / 2


def test_mean_leaves_what_lies_between_the_elements(comm: Communicator) -> None:
    whole = np.full((6, 4), 7.0, np.float32)
    whole[::2, 1:3] = comm.rank
    comm.allreduce_mean_([whole[::2, 1:3]])
    expected = np.full((6, 4), 7.0)
    expected[::2, 1:3] = (comm.size - 1) / 2
    np.testing.assert_array_equal(whole, expected)


def test_mean_of_many_arrays_of_mixed_dtypes(comm: Communicator) -> None:
    dtypes = [np.float32, np.float16, np.float64]
    arrays = [np.full((index % 5, 2), index + comm.rank, dtypes[index % 3]) for index in range(50)]
    for call in range(3):  # the buckets are used again
        comm.allreduce_mean_(arrays)
        for index, array in enumerate(arrays):
            np.testing.assert_array_equal(array, np.full((index % 5, 2), index + (comm.size - 1) / 2 + call))
            array += comm.rank - (comm.size - 1) / 2 + 1
    comm.allreduce_mean_([])


def test_mean_of_large_arrays(comm: Communicator) -> None:
    length = 2001
    arrays = [np.arange(length, dtype=np.float32) % 1000 + comm.rank, np.full(length, comm.rank, np.float16)]
    comm.allreduce_mean_(arrays)
    np.testing.assert_array_equal(arrays[0], np.arange(length) % 1000 + (comm.size - 1) / 2)
    np.testing.assert_array_equal(arrays[1], (comm.size - 1) / 2)


def test_float16_is_summed_in_float32(comm: Communicator) -> None:
    array = np.full(3, 40000, np.float16)  # the sum of two is beyond float16
    comm.allreduce_mean_([array, np.zeros(1, np.float16)])
    np.testing.assert_array_equal(array, np.float16(40000))


@pytest.mark.parametrize("dtype", ["?", "i1", "u2", "i4", "u8", "f2", "f4", "f8", "g", "c8", "c16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_broadcast_of_every_dtype_and_layout(comm: Communicator, dtype: str, layout: str) -> None:
    root = comm.size - 1
    arrays = [lay_out((np.arange(np.prod(shape)).reshape(shape) * 3 + comm.rank).astype(dtype), layout) for shape in SHAPES]
    comm.broadcast_(arrays, root=root)
    for array, shape in zip(arrays, SHAPES, strict=True):
        np.testing.assert_array_equal(array, (np.arange(np.prod(shape)).reshape(shape) * 3 + root).astype(dtype))


def test_broadcast_keeps_every_bit(comm: Communicator) -> None:
    bits = np.array([0x7FF0000000000001, 0x8000000000000000, 0x7FF8DEADBEEF0000], np.uint64)  # NaNs with payloads, minus zero
    array = bits.view(np.float64).copy() if comm.rank == 0 else np.zeros(3)
    zero_d = np.array(5 if comm.rank == 0 else 0)
    comm.broadcast_([array, zero_d])
    np.testing.assert_array_equal(array.view(np.uint64), bits)
    assert zero_d == 5


def test_objects(comm: Communicator) -> None:
    mine = {"rank": comm.rank, "text": "é" * 1000, "array": np.arange(comm.rank)}
    for root in range(comm.size):
        assert comm.bcast_obj(("from", comm.rank), root=root) == ("from", root)
        gathered = comm.gather_obj(mine["rank"], root=root)
        assert gathered == (list(range(comm.size)) if comm.rank == root else None)
    everybody = comm.allgather_obj(mine)
    assert [len(one["array"]) for one in everybody] == list(range(comm.size))


BAD_ARRAYS: dict[str, tuple[Any, str]] = {
    "list": ([[1.0, 2.0]], "array 0 is a list"),
    "integers": ([np.zeros(2), np.zeros(2, np.int64)], "array 1 has dtype int64"),
    "objects": ([np.array([None])], "array 0 has dtype object"),
    "long_double": ([np.zeros(2, np.longdouble)], "array 0 has dtype"),
    "read_only": ([np.broadcast_to(np.zeros(1), (3,))], "array 0 is read-only"),
    "one_array": (np.zeros((2, 3)), "pass a list of arrays"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
@pytest.mark.parametrize("everywhere", [True, False])
def test_arrays_that_cannot_be_averaged_are_refused_on_all_ranks(comm: Communicator, case: str, everywhere: bool) -> None:
    bad, expected = BAD_ARRAYS[case]
    is_bad = everywhere or comm.rank == comm.size - 1
    with pytest.raises(CommunicationError, match="refused on all ranks") as caught:
        comm.allreduce_mean_(bad if is_bad else [np.zeros(2)])
    assert expected in str(caught.value)
    assert (f"ranks 0-{comm.size - 1}: " if everywhere and comm.size > 1 else f"rank {comm.size - 1}: ") in str(caught.value)
    array = np.full(2, comm.rank, np.float32)
    comm.allreduce_mean_([array])  # nothing is left half done
    np.testing.assert_array_equal(array, (comm.size - 1) / 2)


def test_broadcast_refuses_what_is_no_number_and_a_root_that_is_no_rank(comm: Communicator) -> None:
    for bad in (np.array(["text"]), np.array(["2020-01-01"], "M8[D]"), np.array([{}])):
        with pytest.raises(CommunicationError, match="array 0 has dtype"):
            comm.broadcast_([bad])
    for root in (comm.size, -1):
        with pytest.raises(CommunicationError, match=f"root={root} is not a rank; ranks are 0 to {comm.size - 1}"):
            comm.broadcast_([np.zeros(1)], root=root)
        with pytest.raises(CommunicationError, match=f"root={root} is not a rank"):
            comm.bcast_obj(1, root=root)


def differing(case: str, last: bool) -> list[np.ndarray]:
    same = np.zeros((3, 2), np.float32)
    return {
        "shape": [same, np.zeros((3, 4) if last else (4, 3), np.float32)],
        "dtype": [same, np.zeros((4, 3), np.float64 if last else np.float32)],
        "count": [same] * (2 if last else 3),
        "none": [] if last else [same],
    }[case]


MESSAGES = {
    "shape": "array 1 is (4, 3) float32 on {others}, (3, 4) float32 on rank {last}",
    "dtype": "array 1 is (4, 3) float32 on {others}, (4, 3) float64 on rank {last}",
    "count": "{others} passed 3 arrays; rank {last} passed 2 arrays",
    "none": "{others} passed 1 arrays; rank {last} passed 0 arrays",
}


@pytest.mark.parametrize("case", MESSAGES)
@pytest.mark.parametrize("method", ["allreduce_mean_", "broadcast_"])
def test_ranks_that_differ_are_named_on_all_ranks(comm: Communicator, case: str, method: str) -> None:
    if comm.size == 1:
        return  # one rank agrees with itself: that it is not refused is tested above
    last = comm.size - 1
    others = "rank 0" if comm.size == 2 else f"ranks 0-{comm.size - 2}"
    arrays = differing(case, comm.rank == last)
    with pytest.raises(CommunicationError) as caught:
        getattr(comm, method)(arrays)
    assert MESSAGES[case].format(others=others, last=last) in str(caught.value)
    assert len(set(comm.allgather_obj(str(caught.value)))) == 1
    assert all((array == 0).all() for array in arrays)


def test_different_calls_are_told(comm: Communicator) -> None:
    if comm.size == 1:
        return
    call = comm.broadcast_ if comm.rank == 0 else comm.allreduce_mean_
    with pytest.raises(CommunicationError, match="called different collectives") as caught:
        call([np.zeros(2)])
    assert "rank 0 called broadcast_(root=0)" in str(caught.value)
    with pytest.raises(CommunicationError, match=r"rank 0 called broadcast_\(root=0\)"):
        comm.broadcast_([np.zeros(2)], root=min(comm.rank, 1))


def test_an_object_that_cannot_be_pickled_raises_on_all_ranks(comm: Communicator) -> None:
    if comm.size == 1:
        return  # nothing is pickled for one rank
    lock = threading.Lock()
    with pytest.raises(CommunicationError, match="rank 0: lock"):
        comm.bcast_obj(lock if comm.rank == 0 else None)
    with pytest.raises(CommunicationError, match="rank 1: lock"):
        comm.allgather_obj(lock if comm.rank == 1 else 3)
    assert comm.allgather_obj(comm.rank) == list(range(comm.size))


def test_two_communicators_are_apart(make_comm: Callable[[], Communicator]) -> None:
    first, second = make_comm(), make_comm()
    array = np.full(2, first.rank, np.float64)
    first.allreduce_mean_([array])
    first.close()
    second.broadcast_([array])
    assert second.allgather_obj(array[0]) == [(second.size - 1) / 2] * second.size
    second.close()


def test_a_closed_communicator_says_so(make_comm: Callable[[], Communicator]) -> None:
    comm = make_comm()
    comm.close()
    comm.close()
    for call in (comm.barrier, lambda: comm.allreduce_mean_([]), lambda: comm.allgather_obj(1), lambda: comm.bcast_obj(1)):
        with pytest.raises(CommunicationError, match="closed"):
            call()
