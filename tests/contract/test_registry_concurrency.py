"""The registry under several real processes at once, and under processes killed at every step of their writing."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from dtrain.layout import Workspace
from dtrain.registry import Registry
from tests.registry_cases import make_run

# fork: the processes start within milliseconds of each other, and share this module's closures.
FORK = multiprocessing.get_context("fork")
WRITERS = 8


def all_at_once(work: Callable[[int], None]) -> None:
    """Run ``work(i)`` in WRITERS processes that start together; every one must end well."""
    barrier = FORK.Barrier(WRITERS)

    def body(index: int) -> None:
        barrier.wait()
        work(index)

    processes = [FORK.Process(target=body, args=(index,)) for index in range(WRITERS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * WRITERS


@pytest.mark.parametrize("contents", ["shared", "own"])
def test_registering_one_name_at_once(tmp_path: Path, contents: str) -> None:
    registry = Registry(Workspace(tmp_path).registry)
    shared = os.urandom(300_000)
    runs = [
        make_run(tmp_path, files={"a.bin": shared if contents == "shared" else os.urandom(300_000), "b": b"%d" % i})
        for i in range(WRITERS)
    ]
    rounds = 3

    def work(index: int) -> None:
        for _ in range(rounds):
            registry.register(runs[index], "digits", tags={"writer": str(index)})

    all_at_once(work)
    versions = registry.versions("digits")
    assert [version.version for version in versions] == list(range(1, WRITERS * rounds + 1))
    assert sorted(version.run for version in versions) == sorted(run.id for run in runs for _ in range(rounds))
    assert registry.verify() == []
    assert not list(registry.layout.incoming.iterdir())
    for version in versions:
        (source,) = (run for run in runs if run.id == version.run)
        pulled = registry.pull(version.id, tmp_path / version.id)
        for name in ("a.bin", "b"):
            assert (pulled / name).read_bytes() == (source.outputs / name).read_bytes()
        assert version.tags == {"writer": (source.outputs / "b").read_text()}


def test_no_tag_event_is_lost(tmp_path: Path) -> None:
    registry = Registry(Workspace(tmp_path).registry)
    registry.register(make_run(tmp_path, files={"model": b"x"}), "digits")

    def work(index: int) -> None:
        for turn in range(10):
            registry.tag("digits:1", f"writer-{index}", str(turn))
            registry.tag("digits:1", f"key-{index}-{turn}", "there")
            assert registry.get("digits").tags[f"writer-{index}"] == str(turn)

    all_at_once(work)
    expected = {f"key-{index}-{turn}": "there" for index in range(WRITERS) for turn in range(10)}
    assert registry.get("digits").tags == expected | {f"writer-{index}": "9" for index in range(WRITERS)}


def test_mending_a_damaged_blob_at_once(tmp_path: Path) -> None:
    registry = Registry(Workspace(tmp_path).registry)
    run = make_run(tmp_path, files={"model": os.urandom(300_000)})
    blob = registry.layout.blob(registry.register(run, "digits").files[0].blake3)
    blob.chmod(0o644)
    blob.write_bytes(b"")
    all_at_once(lambda index: registry.register(run, "digits") and None)
    assert len(registry.versions("digits")) == WRITERS + 1
    assert registry.verify() == []


STEPS = ("open", "mkdir", "fsync", "link", "replace", "rename", "unlink", "rmdir")


def killed_at(step: int, work: Callable[[], object]) -> bool:
    """Run ``work`` in a process that kills itself before its ``step``-th call of STEPS; False when it ended before that."""

    def body() -> None:
        left = step

        def counted(call: Callable[..., object]) -> Callable[..., object]:
            def before(*args: object, **options: object) -> object:
                nonlocal left
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **options)

            return before

        for name in STEPS:
            setattr(os, name, counted(getattr(os, name)))
        work()

    process = FORK.Process(target=body)
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def test_killed_while_registering(tmp_path: Path) -> None:
    run = make_run(tmp_path, files={"a": os.urandom(5000), "b": b""})
    for step in range(1000):
        # A new registry each time, so that the making of its folders is interrupted too.
        registry = Registry(tmp_path / f"registry-{step}")
        killed = killed_at(step, lambda registry=registry: registry.register(run, "digits"))
        found = registry.names()
        assert registry.verify() == []
        assert found in ([], ["digits"])
        if found:
            registry.pull("digits:1", tmp_path / f"pulled-{step}")
        assert registry.register(run, "digits").version == len(found) + 1
        assert registry.verify() == []
        if not killed:
            break
    assert not killed
    assert step > 15


def test_killed_while_pulling(tmp_path: Path) -> None:
    registry = Registry(Workspace(tmp_path).registry)
    registry.register(make_run(tmp_path, files={"a": os.urandom(5000), "b": b"bb"}), "digits")
    for step in range(1000):
        there = tmp_path / f"there-{step}"
        killed = killed_at(step, lambda there=there: registry.pull("digits", there))
        assert not there.exists() or sorted(os.listdir(there)) == ["a", "b"]
        if not killed:
            break
    assert not killed
    assert there.exists()
    assert step > 3


def test_killed_while_tagging(tmp_path: Path) -> None:
    registry = Registry(Workspace(tmp_path).registry)
    registry.register(make_run(tmp_path, files={"a": b"a"}), "digits", tags={"stage": "0"})
    for step in range(1000):
        before = registry.get("digits").tags["stage"]
        killed = killed_at(step, lambda value=str(step + 1): registry.tag("digits", "stage", value))
        assert registry.get("digits").tags["stage"] in (before, str(step + 1))
        if not killed:
            break
    assert registry.get("digits").tags["stage"] == str(step + 1)
    assert registry.verify() == []


def test_killed_at_any_moment(tmp_path: Path) -> None:
    """SIGKILL from outside, at moments spread over one registration."""
    registry = Registry(Workspace(tmp_path).registry)
    run = make_run(tmp_path, files={f"{i}": os.urandom(20_000) for i in range(20)})

    def register_for_ever() -> None:
        while True:
            registry.register(run, "digits")

    for turn in range(10):
        process = FORK.Process(target=register_for_ever)
        process.start()
        process.join(0.02 + 0.011 * turn)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert registry.verify() == []
    count = registry.register(run, "digits").version
    assert [version.version for version in registry.versions("digits")] == list(range(1, count + 1))
    assert all(len(version.files) == 20 for version in registry.versions("digits"))


def test_versions_with_the_same_files_come_and_go_at_once(tmp_path: Path) -> None:
    """Whoever deletes takes no file from a version that comes meanwhile, and no number is used twice."""
    registry = Registry(Workspace(tmp_path).registry)
    run = make_run(tmp_path, files={"a.bin": os.urandom(50_000), "b": b"b"})
    taken = tmp_path / "taken"
    taken.mkdir()

    def work(index: int) -> None:
        for count in range(12):
            version = registry.register(run, "digits")
            (taken / str(version.version)).mkdir()  # raises where another had the number
            if count % 3 != index % 3:
                registry.delete(version.id)

    all_at_once(work)
    assert registry.verify() == []
    assert len(list(taken.iterdir())) == WRITERS * 12
    assert len(registry.versions("digits")) == WRITERS * 4
    assert not list(registry.layout.incoming.iterdir())
