"""Checkpoints of one rank: what is damaged is noticed, and no crash or full disk costs an older one."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import resource
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from dtrain import _shards
from dtrain._shards import DTYPES
from dtrain.checkpoint import Checkpointer, committed_steps, verify_step
from dtrain.comm.local import LocalCommunicator
from dtrain.errors import CheckpointError, UsageError
from dtrain.layout import RunLayout, StepFolder, staging_folder


def make(folder: Path, **options: Any) -> Checkpointer:
    return Checkpointer(folder, LocalCommunicator(), **options)


def save(folder: Path, *steps: int, **options: Any) -> None:
    for step in steps:
        make(folder, **options).save(step, {"w": np.full((3, 2), step, np.float32)}, {"position": np.array(step)}, meta=step)


def restored_step(folder: Path) -> int | None:
    restored = make(folder).restore()
    if restored is None:
        return None
    np.testing.assert_array_equal(restored.shared["w"], np.full((3, 2), restored.step))
    assert restored.own is not None
    assert (restored.own["position"], restored.meta) == (restored.step, restored.step)
    return restored.step


def step_folder(folder: Path, step: int) -> Path:
    return folder / f"step-{step:09d}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_shape_and_layout_comes_back(tmp_path: Path, dtype: str) -> None:
    values = np.arange(24).reshape(2, 3, 4).astype(dtype)
    layouts = {
        "": values, "scalar": values[1, 2, 3], "0-d": np.array(values[0, 1, 2]), "empty": values[:, :0], "transposed": values.T,
        "strided": values[:, ::2, ::-1], "swapped": values.astype(values.dtype.newbyteorder()), "é/\n\"__metadata__": values[0],
        "__metadata__": values[1],
    }  # fmt: skip
    path = make(tmp_path).save(3, layouts, layouts)
    restored = make(tmp_path).restore(3)
    assert restored is not None
    assert restored.own is not None
    for tensors in (restored.shared, restored.own):
        assert list(tensors) == list(layouts)
        for name, expected in layouts.items():
            np.testing.assert_array_equal(tensors[name], expected)
            assert (tensors[name].shape, tensors[name].dtype) == (expected.shape, np.dtype(dtype))
            assert tensors[name].flags.writeable
    # the library itself reads the same
    others = safetensors.numpy.load_file(path / "rank-00000.safetensors")
    assert set(others) == {f"{kind}/{name}" for kind in ("shared", "own") for name in layouts}
    np.testing.assert_array_equal(others["own/transposed"], values.T)


def test_meta_comes_back_exactly(tmp_path: Path) -> None:
    meta = {"best": math.inf, "state": 2**127 + 1, "nan": math.nan, "list": [1, None, True, "é\n"], "pi": 3.141592653589793}
    make(tmp_path).save(0, {}, meta=meta | {"scalar": np.int64(3)}, own_meta=meta)
    restored = make(tmp_path).restore()
    assert restored is not None
    assert repr(restored.meta) == repr(meta | {"scalar": 3})
    assert repr(restored.own_meta) == repr(meta)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"shared": {"w": np.zeros(2, np.complex128)}}, "shared tensor 'w' has dtype complex128; a checkpoint holds bool, int8"),
        ({"shared": {"w": np.array(["a"])}}, "shared tensor 'w' has dtype <U1"),
        ({"own": {"w": [1.0]}}, "own tensor 'w' is a list"),
        ({"own": {"\ud800": np.zeros(1)}}, "own tensor name '\\ud800' is not allowed"),
        ({"meta": {1, 2}}, "meta cannot be saved (it holds a set)"),
        ({"own_meta": object()}, "own_meta cannot be saved"),
        ({"step": -1}, "step -1 is not allowed"),
        ({"step": 1.5}, "step 1.5 is not allowed"),
    ],
)
def test_what_cannot_be_saved_is_refused(tmp_path: Path, arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        make(tmp_path).save(**({"step": 1, "shared": {}} | arguments))
    assert told in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_bad_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="keep=0"):
        make(tmp_path, keep=0)
    with pytest.raises(UsageError, match=r"restore\('latest'\) is not known"):
        make(tmp_path).restore("latest")


def test_nothing_saved_is_nothing_restored(tmp_path: Path) -> None:
    assert make(tmp_path / "absent").restore() is None
    assert make(tmp_path / "absent").steps() == []
    (tmp_path / "step-000000001").mkdir()  # no manifest: does not exist
    assert make(tmp_path).restore() is None


def test_every_flipped_bit_is_noticed_or_changes_nothing(tmp_path: Path) -> None:
    save(tmp_path, 1)
    original = make(tmp_path).restore()
    for path in step_folder(tmp_path, 1).iterdir():
        data = path.read_bytes()
        for position in range(len(data)):
            path.write_bytes(data[:position] + bytes([data[position] ^ (1 << position % 8)]) + data[position + 1 :])
            problems = verify_step(path.parent)
            assert problems or path.suffix == ".json", f"byte {position} of {path.name}"
            if not problems:  # white space between the manifest's values
                assert repr(make(tmp_path).restore()) == repr(original)
                assert data[position : position + 1].isspace()
        path.write_bytes(data)
        assert verify_step(path.parent) == []


DAMAGE = {
    "flipped": lambda path: path.write_bytes(path.read_bytes().replace(b"w", b"v", 1)),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-2]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["rank-00000.safetensors", "manifest.json"])
def test_a_damaged_step_is_told_and_the_next_older_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str, name: str
) -> None:
    save(tmp_path, 1, 2)
    DAMAGE[damage](step_folder(tmp_path, 2) / name)
    assert verify_step(step_folder(tmp_path, 2))
    with caplog.at_level(logging.WARNING):
        assert restored_step(tmp_path) == 1
    if (damage, name) != ("missing", "manifest.json"):  # that one is no step at all
        assert str(step_folder(tmp_path, 2) / name) in caplog.text
        with pytest.raises(CheckpointError, match=name):
            make(tmp_path).restore(2)
    save(tmp_path, 2)
    assert restored_step(tmp_path) == 2
    assert verify_step(step_folder(tmp_path, 2)) == []


def test_no_step_that_verifies_is_an_error_and_not_a_new_beginning(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (step_folder(tmp_path, 1) / "rank-00000.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint verifies .*rank-00000.*move these folders away"):
        make(tmp_path).restore()


def test_a_step_that_does_not_exist_is_told_with_those_that_do(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 7; there is: .*step-000000002, .*step-000000001"):
        make(tmp_path).restore(7)


def test_own_folder_first_then_the_earlier_run(tmp_path: Path) -> None:
    earlier, own = tmp_path / "earlier", tmp_path / "own"
    save(earlier, 5, 10)
    resumed = make(own, resume_from=earlier)
    assert resumed.restore().step == 10
    save(own, 7)
    assert resumed.restore().step == 7
    assert resumed.restore(5).path.parent == earlier
    assert resumed.steps() == [7]
    (step_folder(own, 7) / "rank-00000.safetensors").write_bytes(b"")
    assert resumed.restore().step == 10


def test_an_evaluator_follows_while_older_steps_are_deleted(tmp_path: Path) -> None:
    job, earlier = tmp_path / "job", tmp_path / "earlier"
    save(earlier, 100)
    evaluator = make(job, resume_from=earlier)
    writer = threading.Thread(target=lambda: save(job, *range(101, 181), keep=1))
    seen = []
    for saved in evaluator.follow(evaluator.restore()):
        if not seen:
            writer.start()
        np.testing.assert_array_equal(saved.shared["w"], np.full((3, 2), saved.step))
        seen.append(saved.step)
        if saved.step == 180:
            break
    writer.join()
    assert seen[0] == 100
    assert seen == sorted(set(seen))


def test_an_evaluator_passes_over_what_does_not_verify(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 1, 2)
    following = make(tmp_path).follow()
    assert next(following).step == 2
    save(tmp_path, 3, 4)
    next(step_folder(tmp_path, 4).glob("*.safetensors")).write_bytes(b"")
    assert next(following).step == 3
    save(tmp_path, 5)
    assert next(following).step == 5
    assert ["000000004 is not used" in record.message for record in caplog.records] == [True]


def test_an_evaluator_ends_with_the_job_and_misses_no_step(tmp_path: Path) -> None:
    save(tmp_path, 1)
    answers = iter([False, True, True])

    def is_done() -> bool:
        save(tmp_path, 2)  # at the last moment
        return next(answers)

    assert [saved.step for saved in make(tmp_path).follow(until=is_done)] == [2]
    assert list(make(tmp_path / "empty").follow(until=lambda: True)) == []


def test_older_steps_go_and_foreign_files_stay(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3, keep=3)
    (step_folder(tmp_path, 1) / "mine.txt").write_text("a user's")
    foreign = step_folder(tmp_path, 0)
    foreign.mkdir()
    (foreign / "manifest.json").write_text('{"step": 0}')
    (tmp_path / "step-1").mkdir()
    save(tmp_path, 4, 5, keep=2)
    assert list(committed_steps(tmp_path)) == [0, 4, 5]
    assert [path.name for path in step_folder(tmp_path, 1).iterdir()] == ["mine.txt"]
    assert not step_folder(tmp_path, 2).exists()
    save(tmp_path, 3, keep=1)  # gone back by hand: what is newer stays
    assert list(committed_steps(tmp_path)) == [0, 3, 4, 5]


def test_a_step_saved_again_is_replaced_at_once(tmp_path: Path) -> None:
    save(tmp_path, 4)
    for value in (1, 2):
        make(tmp_path).save(4, {"w": np.full(2, value)})
        restored = make(tmp_path).restore()
        assert (restored.shared["w"] == value).all()
        assert len(list(step_folder(tmp_path, 4).iterdir())) == 2
        assert verify_step(step_folder(tmp_path, 4)) == []


def test_an_attempt_that_is_over_saves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank of it may still be alive somewhere: before a save, and in the midst of one."""
    run = RunLayout(tmp_path / "run")
    run.make_folders(1)
    old = Checkpointer(run.checkpoints, LocalCommunicator(), attempt=0)
    old.save(1, {"w": np.ones(2)})

    def overtaken(folder: StepFolder, *args: Any) -> None:
        run.end_attempt()
        run.begin_attempt(1, 1)
        new = Checkpointer(run.checkpoints, LocalCommunicator(), attempt=1)
        new.save(2, {"w": np.full(2, 7.0)})
        write_manifest(folder, *args)

    write_manifest = _shards.write_manifest
    monkeypatch.setattr(_shards, "write_manifest", lambda *args: (monkeypatch.undo(), overtaken(*args)))
    with pytest.raises(CheckpointError, match="step 2 was not saved"):
        old.save(2, {"w": np.zeros(2)})
    with pytest.raises(CheckpointError, match="attempt 0 of this run is over"):
        old.save(3, {"w": np.zeros(2)})
    assert old.steps() == [1, 2]
    assert verify_step(step_folder(run.checkpoints, 2)) == []
    newest = old.restore()
    assert newest is not None
    assert (newest.shared["w"] == 7).all()
    assert [path.name for path in run.checkpoints.iterdir() if path.name.startswith(".")] == [".attempt-1"]


def test_a_worker_that_the_others_go_on_without_saves_nothing(tmp_path: Path) -> None:
    run = RunLayout(tmp_path / "run", 0)
    run.make_folders(0)
    old, other = (Checkpointer(run.checkpoints, LocalCommunicator(), attempt=0) for _ in range(2))
    for number, checkpointer in enumerate((old, other)):
        run.worker_staging(number).mkdir()
        checkpointer.stage_in(run.worker_staging(number))
        checkpointer.save(number, {"w": np.ones(2)})
    run.end_worker(0)
    run.end_worker(0)
    with pytest.raises(CheckpointError, match="attempt 0 of this run is over, or goes on without this process"):
        old.save(2, {"w": np.zeros(2)})
    other.save(3, {"w": np.ones(2)})
    assert other.steps() == [0, 1, 3]


def test_the_manifest_says_what_is_where(tmp_path: Path) -> None:
    tensor = np.arange(6, dtype=np.float32).reshape(2, 3)
    staging_folder(tmp_path, 2).mkdir()
    path = Checkpointer(tmp_path, LocalCommunicator(), attempt=2).save(9, {"a/W": tensor})
    manifest = json.loads((path / "manifest.json").read_text())
    assert (manifest["step"], manifest["world_size"], manifest["attempt"]) == (9, 1, 2)
    (entry,) = manifest["tensors"]
    assert (entry["name"], entry["dtype"], entry["shape"]) == ("a/W", "float32", [2, 3])
    start, stop = entry["byte_range"]
    assert (path / entry["file"]).read_bytes()[start:stop] == tensor.tobytes()


WATCHED = ("replace", "rename", "unlink", "rmdir", "mkdir", "fsync", "write", "open")


def die_at(call: int) -> None:
    """Make this process die, without any clean-up, just before its ``call``-th change of the file system."""
    seen = 0

    def wrap(real: Any) -> Any:
        def watched(*arguments: Any, **options: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen == call:
                os._exit(77)
            return real(*arguments, **options)

        return watched

    for name in WATCHED:
        setattr(os, name, wrap(getattr(os, name)))


def crash_while_saving(folder: Path, call: int, step: int) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        with contextlib.suppress(BaseException):
            die_at(call)
            save(folder, step, keep=2)
            code = 0
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("step", [3, 2], ids=["a_new_step", "a_step_saved_again"])
def test_a_crash_at_any_moment_leaves_whole_checkpoints(tmp_path: Path, step: int) -> None:
    """Before each single change of the file system in turn; at keep=2 the crash may also fall into the deletion of step 1."""
    for call in range(1, 100):
        folder = tmp_path / str(call)
        save(folder, 1, 2)
        code = crash_while_saving(folder, call, step)
        assert code in (0, 77)
        assert all(verify_step(path) == [] for path in committed_steps(folder).values()), call
        assert restored_step(folder) in {2, step}, call
        if code == 0:
            break
        save(folder, step, keep=2)  # the restarted job passes the same step again, and clears what was left
        assert restored_step(folder) == step
        assert sorted(path.name for path in folder.iterdir()) == [path.name for path in committed_steps(folder).values()], call
        assert all(len(list(path.iterdir())) == 2 for path in committed_steps(folder).values()), call
    assert 10 < call < 99


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip("a file system cannot be mounted here; the limit on file sizes below stands for it")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def fails_as_full(folder: Path, told: str) -> None:
    with pytest.raises(CheckpointError, match=f"step 2 was not saved: rank 0: .*{told}.*older checkpoints in .* are untouched"):
        make(folder).save(2, {"w": np.zeros(2**20)})
    assert [path.name for path in folder.iterdir()] == ["step-000000001"]
    assert restored_step(folder) == 1


def test_a_full_disk_leaves_the_older_step(small_disk: Path) -> None:
    save(small_disk, 1)
    fails_as_full(small_disk, "No space left on device")
    save(small_disk, 2)
    assert restored_step(small_disk) == 2


def test_a_limit_on_file_sizes_leaves_the_older_step(tmp_path: Path) -> None:
    save(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        fails_as_full(tmp_path, "File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
