"""The registry and damage: flipped bits, tampered records, full disks, missing rights, files that change under its hands."""

from __future__ import annotations

import errno
import itertools
import multiprocessing
import os
import resource
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from blake3 import blake3

from dtrain.errors import RegistryError
from dtrain.layout import RunLayout, Workspace
from dtrain.registry import Registry
from dtrain.registry.records import seal, unseal
from tests.registry_cases import MODEL, blob_of, content, flip_bit, make_run


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(Workspace(tmp_path).registry)


@pytest.fixture
def run(tmp_path: Path) -> RunLayout:
    return make_run(tmp_path)


@pytest.mark.parametrize("damage", ["flip", "shorten", "remove"])
def test_damaged_blob_is_named_and_mended(registry: Registry, run: RunLayout, tmp_path: Path, damage: str) -> None:
    (run.outputs / "intact.txt").write_bytes(b"intact")
    for _ in range(2):
        registry.register(run, "digits")
    blob = blob_of(registry, MODEL)
    if damage == "flip":
        flip_bit(blob)
        flipped = blob.read_bytes()
    elif damage == "shorten":
        os.chmod(blob, 0o644)
        os.truncate(blob, 5)
    else:
        blob.unlink()
    problems = registry.verify()
    assert [(p.model, p.version, p.path, p.blob) for p in problems] == [("digits", n, "model.npz", blob) for n in (1, 2)]
    with pytest.raises(RegistryError) as caught:
        registry.pull("digits:1", tmp_path / "there")
    named = ["digits:1", "model.npz", str(blob)]
    named += [blake3(MODEL).hexdigest(), blake3(flipped).hexdigest()] if damage == "flip" else []
    assert all(part in str(caught.value) for part in named)
    assert not (tmp_path / "there").exists()
    assert not list(tmp_path.glob(".*"))
    registry.register(run, "digits")
    assert registry.verify() == []


@pytest.mark.parametrize("offset", [3, 30, 120, 250, -4])
def test_damaged_record_is_a_problem_and_no_version(registry: Registry, run: RunLayout, tmp_path: Path, offset: int) -> None:
    for _ in range(2):
        registry.register(run, "digits")
    record = registry.layout.record("digits", 2)
    flip_bit(record, offset)
    for ask in (registry.get, lambda r: registry.pull(r, tmp_path / "x")):
        with pytest.raises(RegistryError, match=str(record)):
            ask("digits")
    (problem,) = registry.verify("digits")
    assert (problem.model, problem.version, problem.path, problem.blob) == ("digits", 2, None, None)
    assert str(record) in problem.what
    assert registry.get("digits:1").version == 1
    assert registry.verify("digits:1") == []
    assert registry.register(run, "digits").version == 3


def test_damaged_tag_event_is_a_problem_but_the_files_can_be_pulled(registry: Registry, run: RunLayout, tmp_path: Path) -> None:
    registry.register(run, "digits")
    registry.tag("digits", "stage", "production")
    flip_bit(registry.layout.event("digits", 1, 1), 40)
    with pytest.raises(RegistryError, match="events"):
        registry.get("digits")
    assert ["events" in problem.what for problem in registry.verify()] == [True]
    assert content(registry.pull("digits", tmp_path / "there")) == {"model.npz": MODEL}


@pytest.mark.parametrize(
    "change",
    [
        *(
            {"files": [{"path": p, "size_bytes": 7000, "blake3": blake3(MODEL).hexdigest()}]}
            for p in ("../x", "/tmp/x", "a/../../x", "", "a//b", ".", "a\0")
        ),
        {"files": [{"path": "x", "size_bytes": 7000, "blake3": "../../../../etc/passwd"}]},
        {"files": [{"path": "x", "size_bytes": True, "blake3": blake3(MODEL).hexdigest()}]},
        {"files": []},
        {"files": [{"path": p, "size_bytes": 7000, "blake3": blake3(MODEL).hexdigest()} for p in ("a", "a/b")]},
        {"files": None},
        {"version": 2},
        {"name": "other"},
        {"format": 2},
    ],
    ids=str,
)
def test_tampered_record_writes_nowhere(registry: Registry, run: RunLayout, tmp_path: Path, change: dict[str, object]) -> None:
    registry.register(run, "digits")
    record = registry.layout.record("digits", 1)
    body = unseal(record) | change
    record.unlink()
    record.write_bytes(seal(body))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RegistryError, match=str(record)):
        registry.pull("digits", tmp_path / "there")
    assert sorted(tmp_path.rglob("*")) == before
    assert len(registry.verify()) == 1


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_pull_needs_no_writing_rights() -> None:
    # Not pytest's tmp_path: its parents are closed to other users.
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        root.chmod(0o755)
        registry = Registry(root / "registry")
        registry.register(make_run(root), "digits")
        (root / "open").mkdir()
        (root / "open").chmod(0o777)

        def as_nobody() -> None:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            assert content(registry.pull("digits", root / "open" / "there")) == {"model.npz": MODEL}
            assert registry.verify() == []
            assert registry.get("digits").version == 1
            with pytest.raises(RegistryError, match="Permission denied; you need writing rights"):
                registry.tag("digits", "a", "b")

        child = multiprocessing.get_context("fork").Process(target=as_nobody)
        child.start()
        child.join()
        assert child.exitcode == 0


def test_registry_that_cannot_be_written(run: RunLayout, tmp_path: Path) -> None:
    (tmp_path / "registry").touch()
    with pytest.raises(RegistryError, match="nothing was registered"):
        Registry(tmp_path / "registry").register(run, "digits")


@pytest.mark.parametrize("how", ["append", "rewrite", "replace", "shorten"])
def test_file_that_changes_while_copied(registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    run = make_run(tmp_path, files={"big.bin": os.urandom(3 << 20)})
    big, calls, fstat = run.outputs / "big.bin", itertools.count(), os.fstat

    def change_after(descriptor: int) -> os.stat_result:
        status = fstat(descriptor)
        if os.path.samestat(status, big.stat()) and next(calls) == 0:
            if how == "append":
                with big.open("ab") as file:
                    file.write(b"x")
            elif how == "rewrite":
                big.write_bytes(b"\1" * (3 << 20))
            elif how == "replace":
                (run.root / "new").write_bytes(b"\1" * (3 << 20))
                os.replace(run.root / "new", big)
            else:
                os.truncate(big, 100)
        return status

    monkeypatch.setattr(os, "fstat", change_after)
    with pytest.raises(RegistryError, match="changed while it was copied"):
        registry.register(run, "digits", path="outputs/big.bin")
    monkeypatch.undo()
    assert registry.names() == []
    assert not list(registry.layout.incoming.iterdir())


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """The empty root of a real file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, check=False).returncode:
        pytest.skip("this user cannot mount a file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_disk_full(disk: Path, tmp_path: Path) -> None:
    """Nothing half is left, and smaller models still fit."""
    run = make_run(tmp_path, files={"big.bin": os.urandom(2 << 20), "model.npz": MODEL})
    registry, elsewhere = Registry(disk / "registry"), Registry(tmp_path / "registry")
    registry.register(run, "digits", path="outputs/model.npz")
    with pytest.raises(RegistryError, match=r"No space left.*free some space"):
        registry.register(run, "digits")
    elsewhere.register(run, "big")
    with pytest.raises(RegistryError, match=r"big:1 cannot be copied.*No space left"):
        elsewhere.pull("big", disk / "there")
    assert os.listdir(disk) == ["registry"]
    assert not list(registry.layout.incoming.iterdir())
    assert registry.verify() == []
    assert registry.register(run, "digits", path="outputs/model.npz").version == 2


def test_destination_may_be_a_mount_point(disk: Path, registry: Registry, run: RunLayout) -> None:
    registry.register(run, "digits")
    registry.pull("digits", disk)
    assert os.listdir(disk) == ["model.npz"]


def test_file_size_limit(registry: Registry, tmp_path: Path) -> None:
    """Also where no file system can be mounted: the write itself fails, in the middle of a file."""
    run = make_run(tmp_path, files={"big.bin": os.urandom(2 << 20)})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        with pytest.raises(RegistryError, match=os.strerror(errno.EFBIG)):
            registry.register(run, "digits")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert registry.names() == []
    assert not list(registry.layout.incoming.iterdir())
