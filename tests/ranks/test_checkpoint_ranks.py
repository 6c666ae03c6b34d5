"""Checkpoints over several ranks: other sizes, and faults of one rank that all must learn of."""

from __future__ import annotations

import ctypes
import errno
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dtrain import _shard_passing, _shards
from dtrain.checkpoint import Checkpointer, verify_step
from dtrain.comm import Communicator
from dtrain.errors import CheckpointError

pytestmark = pytest.mark.mpi


def make_shared(step: int) -> dict[str, np.ndarray]:
    return {f"layer{index}/W": np.arange(index * 7.0, dtype=np.float32).reshape(index, 7) + step for index in range(6)}


def save(comm: Communicator, folder: Path, step: int, keep: int = 3) -> None:
    Checkpointer(folder, comm, keep=keep).save(
        step, make_shared(step), {"position": np.array(comm.rank * 10 + step)}, meta={"writer": comm.rank}, own_meta=[comm.rank]
    )


def check(comm: Communicator, folder: Path, step: int, writers: int) -> None:
    restored = Checkpointer(folder, comm).restore()
    assert restored is not None
    assert (restored.step, restored.world_size, restored.meta) == (step, writers, {"writer": 0})
    assert list(restored.shared) == list(make_shared(step))
    for name, expected in make_shared(step).items():
        np.testing.assert_array_equal(restored.shared[name], expected)
        assert restored.shared[name].dtype == expected.dtype
        restored.shared[name] += 1  # writable
    if writers == comm.size:
        assert restored.own is not None
        assert restored.own["position"] == comm.rank * 10 + step
        assert restored.own_meta == [comm.rank]
    else:
        assert restored.own is None
        assert restored.own_meta is None


@pytest.mark.parametrize(("writers", "readers"), itertools.product([1, 2, 4], repeat=2))
def test_any_number_of_ranks_restores_what_any_other_saved(
    comm: Communicator, first_ranks: Callable[[int], Communicator | None], shared_path: Path, writers: int, readers: int
) -> None:
    if max(writers, readers) > comm.size:
        pytest.skip(f"needs {max(writers, readers)} ranks")
    if (saving := first_ranks(writers)) is not None:
        save(saving, shared_path, 8)
    comm.barrier()
    if (restoring := first_ranks(readers)) is not None:
        check(restoring, shared_path, 8, writers)


def test_the_ranks_share_the_writing(comm: Communicator, shared_path: Path) -> None:
    Checkpointer(shared_path, comm).save(1, {str(index): np.zeros(1000) for index in range(4 * comm.size)})
    sizes = [path.stat().st_size for path in sorted((shared_path / "step-000000001").glob("rank-*"))]
    assert len(sizes) == comm.size
    assert max(sizes) < 1.1 * min(sizes)


@pytest.mark.parametrize("phase", ["shard", "manifest"])
def test_a_full_disk_on_one_rank_is_told_to_all(
    comm: Communicator, shared_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    save(comm, shared_path, 1)
    culprit = comm.size - 1 if phase == "shard" else 0

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if comm.rank == culprit:
        monkeypatch.setattr(_shards, {"shard": "write_shard", "manifest": "write_manifest"}[phase], full)
    with pytest.raises(CheckpointError, match=f"step 2 was not saved: rank {culprit}: .*No space left"):
        save(comm, shared_path, 2)
    assert sorted(path.name for path in shared_path.iterdir()) == ["step-000000001"]
    comm.barrier()
    monkeypatch.undo()
    check(comm, shared_path, 1, comm.size)
    save(comm, shared_path, 2)
    check(comm, shared_path, 2, comm.size)


def test_what_one_rank_cannot_save_is_refused_on_all(comm: Communicator, shared_path: Path) -> None:
    last = comm.size - 1
    own = {"bad": np.zeros(2, np.complex128)} if comm.rank == last else {}
    with pytest.raises(CheckpointError, match=f"rank {last}: own tensor 'bad' has dtype complex128"):
        Checkpointer(shared_path, comm).save(1, {}, own)
    assert list(shared_path.iterdir()) == []


def test_ranks_that_do_not_save_the_same_are_told(comm: Communicator, shared_path: Path) -> None:
    checkpointer = Checkpointer(shared_path, comm)
    with pytest.raises(CheckpointError, match=r"different steps: \[0, 1"):
        checkpointer.save(comm.rank, {})
    with pytest.raises(
        CheckpointError, match=r"'w' is not the same on all ranks \(rank 0: \(1,\) float64, rank 1: \(2,\) float64"
    ):
        checkpointer.save(3, {"same": np.zeros(1), "w": np.zeros(comm.rank + 1)})
    with pytest.raises(CheckpointError, match=r"'r0' is not the same on all ranks .*rank 1: absent"):
        checkpointer.save(3, {f"r{comm.rank}": np.zeros(1)})


def test_all_fall_back_to_the_same_step(comm: Communicator, shared_path: Path) -> None:
    for step in (1, 2, 3):
        save(comm, shared_path, step)
    if comm.rank == 0:
        damaged = shared_path / "step-000000003" / f"rank-{comm.size - 1:05d}.safetensors"
        data = bytearray(damaged.read_bytes())
        data[-1] ^= 1
        damaged.write_bytes(data)
        (shared_path / "step-000000002" / "rank-00000.safetensors").unlink()
        assert len(verify_step(damaged.parent)) == 1
    comm.barrier()
    check(comm, shared_path, 1, comm.size)
    save(comm, shared_path, 3)  # a damaged step is passed again
    check(comm, shared_path, 3, comm.size)
    comm.barrier()


def test_a_leftover_of_more_ranks_is_cleared(comm: Communicator, shared_path: Path) -> None:
    folder = shared_path / "step-000000005"
    if comm.rank == 0:
        folder.mkdir()
        for name in ("rank-00031.safetensors", ".rank-00030.safetensors.tmp", "notes.txt"):
            (folder / name).write_text("half")
    comm.barrier()
    save(comm, shared_path, 5)
    check(comm, shared_path, 5, comm.size)
    expected = ["manifest.json", "notes.txt", *(f"rank-{rank:05d}.safetensors" for rank in range(comm.size))]
    assert sorted(path.name for path in folder.iterdir()) == expected
    comm.barrier()


@pytest.mark.needs("netcluster")
def test_ranks_that_do_not_see_the_folder_of_rank_0(
    comm: Communicator, shared_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on hosts without a shared file system: what they save is with rank 0, and what they restore comes from there."""
    monkeypatch.setattr(_shard_passing, "PIECE_BYTES", 100)
    if comm.rank % 2:
        hide(shared_path)
    save(comm, shared_path, 1)
    save(comm, shared_path, 1)
    save(comm, shared_path, 2)
    assert len(list(shared_path.iterdir())) == (0 if comm.rank % 2 else 2)
    assert comm.rank % 2 or verify_step(shared_path / "step-000000001") == []
    check(comm, shared_path, 2, comm.size)
    if comm.rank == 0:
        damaged = shared_path / "step-000000002" / f"rank-{comm.size - 1:05d}.safetensors"
        damaged.write_bytes(damaged.read_bytes()[:-1])
    comm.barrier()
    check(comm, shared_path, 1, comm.size)


@pytest.mark.mpi(min_size=2)
@pytest.mark.needs("netcluster")
def test_a_full_disk_of_rank_0_is_told_to_ranks_that_do_not_see_its_folder(
    comm: Communicator, shared_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if comm.rank == 1:
        hide(shared_path)
    save(comm, shared_path, 1)
    if comm.rank == 0:
        write = _shards.write_shard

        def full(path: Path, pieces: list[bytes], staging: Path) -> None:
            write(path, pieces, staging)
            if path.name.startswith("rank-00001"):
                raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(_shards, "write_shard", full)
    with pytest.raises(CheckpointError, match=r"step 2 was not saved: rank 0: .*No space left"):
        save(comm, shared_path, 2)
    check(comm, shared_path, 1, comm.size)


def hide(folder: Path) -> None:
    """From here on this process sees an empty folder there; the others, what was in it."""
    libc, new_mounts, own_and_below = ctypes.CDLL(None, use_errno=True), 0x20000, 0x44000
    assert libc.unshare(new_mounts) == 0, ctypes.get_errno()
    assert libc.mount(b"none", b"/", None, own_and_below, None) == 0, ctypes.get_errno()
    assert libc.mount(b"tmpfs", bytes(folder), b"tmpfs", 0, None) == 0, ctypes.get_errno()
