"""The registry in one process: what may be registered, what is refused, and what comes back."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from dtrain.errors import RegistryError, UsageError
from dtrain.layout import RunLayout, Workspace
from dtrain.registry import Registry
from dtrain.registry import registry as registry_module
from dtrain.status import State
from tests.registry_cases import MODEL, blob_of, content, flip_bit, make_run, save_checkpoint


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(Workspace(tmp_path).registry)


@pytest.fixture
def run(tmp_path: Path) -> RunLayout:
    return make_run(tmp_path)


def test_versions_count_up_and_share_blobs(registry: Registry, run: RunLayout, tmp_path: Path) -> None:
    first = registry.register(run, "digits", tags={"stage": "test"}, description="ein Modell - 手書き")
    second = registry.register(run, "digits")
    assert (first.id, second.id) == ("digits:1", "digits:2")
    assert registry.versions("digits") == [first, second] == [registry.get("digits:1"), registry.get("digits")]
    assert registry.get("digits:latest") == second
    assert registry.names() == ["digits"]
    assert (first.run, first.run_state, first.run_size, first.size_bytes) == (run.id, "completed", 2, len(MODEL))
    assert first.to_json()["files"] == [{"path": "model.npz", "size_bytes": len(MODEL), "blake3": blake3(MODEL).hexdigest()}]
    assert len([p for p in registry.layout.blobs.rglob("*") if p.is_file()]) == 1
    assert not list(registry.layout.incoming.iterdir())
    assert registry.verify() == []
    for file in (blob_of(registry, MODEL), registry.layout.record("digits", 1)):
        assert file.stat().st_mode & 0o222 == 0
    assert content(registry.pull("digits:1", tmp_path / "a" / "b")) == {"model.npz": MODEL}


FILES = {
    "model.npz": MODEL,
    "empty": b"",
    "also-empty": b"",
    "sub/deep/er/vocab.txt": b"a b c",
    "日本語/grüße 🙂.bin": b"\0" * 70000,
    'odd "name"\n\\x': b"x",
    ".hidden": b"h",
}


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (None, FILES),
        ("outputs/model.npz", {"model.npz": MODEL}),
        ("./outputs//sub/", {"deep/er/vocab.txt": b"a b c"}),
        ("outputs/sub/deep/er/vocab.txt", {"vocab.txt": b"a b c"}),
        ("outputs/日本語", {"grüße 🙂.bin": b"\0" * 70000}),
        ("outputs/metrics", {"rank-00000.jsonl": b"{}\n"}),
    ],
)
def test_what_was_selected_comes_back(registry: Registry, tmp_path: Path, path: str | None, expected: dict[str, bytes]) -> None:
    run = make_run(tmp_path, files=FILES)
    save_checkpoint(run)
    registered = registry.register(run, "digits", path=path)
    assert [file.path for file in registered.files] == sorted(expected)
    assert registered.source == path
    assert content(registry.pull("digits", tmp_path / "there")) == expected


@pytest.mark.parametrize(
    "path", ["outputs/checkpoints/step-000000200", "outputs/checkpoints/step-000000200/manifest.json", "outputs"]
)
def test_checkpoint_must_verify_as_a_whole(registry: Registry, run: RunLayout, path: str) -> None:
    folder = save_checkpoint(run)
    assert folder == run.root / "outputs/checkpoints/step-000000200"
    assert registry.register(run, "digits", path=path).version == 1
    (shard,) = folder.glob("*.safetensors")
    flip_bit(shard, -3)
    with pytest.raises(RegistryError, match=r"step-000000200.*does not verify"):
        registry.register(run, "digits", path=path)
    flip_bit(shard, -3)
    shutil.copytree(folder, run.checkpoints / "step-000000300", ignore=lambda *_: ["manifest.json"])
    with pytest.raises(RegistryError, match=r"step-000000300.*does not verify"):
        registry.register(run, "digits", path="outputs/checkpoints/step-000000300")
    assert len(registry.versions("digits")) == 1


def test_checkpoint_reached_by_a_link_is_verified(registry: Registry, run: RunLayout) -> None:
    shard = next(save_checkpoint(run).glob("*.safetensors"))
    (run.outputs / "best.safetensors").symlink_to(shard)
    flip_bit(shard, -3)
    with pytest.raises(RegistryError, match="does not verify"):
        registry.register(run, "digits", path="outputs/best.safetensors")


def test_nothing_but_checkpoints_names_the_newest(registry: Registry, tmp_path: Path) -> None:
    run = make_run(tmp_path, files={})
    with pytest.raises(RegistryError, match="no file to register"):
        registry.register(run, "digits")
    save_checkpoint(run)
    with pytest.raises(RegistryError, match="--path outputs/checkpoints/step-000000200"):
        registry.register(run, "digits")
    assert registry.names() == []


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("outputs/modle.npz", "has no outputs/modle.npz; its outputs/ holds .*outputs/model.npz.*, outputs/metrics/$"),
        ("model.npz", r"not in the outputs.*outputs/model.npz"),
        ("outputs/../spec.json", "not in the outputs"),
        ("/etc/passwd", "not in the outputs"),
        ("", "not in the outputs"),
        ("outputs/nothing", "empty folder"),
        ("outputs/out", "leads out"),
        ("outputs/etc", "leads out"),
        ("outputs/etc/passwd", "leads out"),
        ("outputs/folder", "link to a folder"),
        ("outputs/lost", "leads nowhere"),
        ("outputs/circle", "leads nowhere"),
        ("outputs/pipe", "neither a file"),
    ],
)
def test_paths_that_are_refused(registry: Registry, run: RunLayout, path: str, message: str) -> None:
    (run.outputs / "nothing").mkdir()
    (run.outputs / "folder").mkdir()
    for link, target in (
        ("out", "/etc/passwd"),
        ("etc", "/etc"),
        ("folder/round", ".."),
        ("lost", "nowhere"),
        ("circle", "circle"),
    ):
        (run.outputs / link).symlink_to(target)
    os.mkfifo(run.outputs / "pipe")
    with pytest.raises(RegistryError, match=message):
        registry.register(run, "digits", path=path)
    with pytest.raises(RegistryError):
        registry.register(run, "digits")
    assert not registry.layout.root.exists()


def test_link_inside_outputs_is_registered_as_its_file(registry: Registry, run: RunLayout, tmp_path: Path) -> None:
    (run.outputs / "best.npz").symlink_to("model.npz")
    registry.register(run, "digits", path="outputs/best.npz")
    pulled = registry.pull("digits", tmp_path / "there")
    assert content(pulled) == {"best.npz": MODEL}
    assert not (pulled / "best.npz").is_symlink()


def test_file_name_that_is_no_utf8(registry: Registry, run: RunLayout) -> None:
    (run.outputs / os.fsdecode(b"\xff.bin")).write_bytes(b"x")
    with pytest.raises(RegistryError, match="not valid UTF-8"):
        registry.register(run, "digits")


@pytest.mark.parametrize("state", ["running", "failed", "canceled"])
def test_state_of_the_run(registry: Registry, tmp_path: Path, state: State) -> None:
    run = make_run(tmp_path, state)
    with pytest.raises(RegistryError, match=state):
        registry.register(run, "digits")
    if state == "running":
        with pytest.raises(RegistryError, match="still running"):
            registry.register(run, "digits", any_state=True)
    else:
        assert registry.register(run, "digits", any_state=True).run_state == state


@pytest.mark.parametrize("name", ["", "a/b", "..", ".a", "a:1", "a b", "ä", "a" * 65])
def test_names_that_are_refused(registry: Registry, run: RunLayout, name: str) -> None:
    with pytest.raises(UsageError, match="not allowed"):
        registry.register(run, name)


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("digist", "no model 'digist'.*did you mean digits"),
        ("zzz:1", "no model 'zzz'.*it has digits"),
        ("digits:3", "no version 3; it has 1, 2"),
        *(
            (bad, "is not a model; write NAME")
            for bad in ("digits:", "digits:0", "digits:01", "digits:-1", "digits:x", "a:1:2", "../x", "")
        ),
        ("digits:" + "9" * 5000, "is not a model"),
    ],
)
def test_references_that_mean_nothing(registry: Registry, run: RunLayout, tmp_path: Path, ref: str, message: str) -> None:
    with pytest.raises(RegistryError, match="`dtrain register` makes the first"):
        registry.get("digits")
    for _ in range(2):
        registry.register(run, "digits")
    for ask in (registry.get, registry.verify, lambda r: registry.pull(r, tmp_path / "x"), lambda r: registry.tag(r, "k", "v")):
        with pytest.raises(RegistryError, match=message):
            ask(ref)


def test_tags_last_wins_per_key(registry: Registry, run: RunLayout) -> None:
    registry.register(run, "digits", tags={"a": "0", "b": "0"})
    for key, value in [("a", "1"), ("c", "ü=ß"), ("a", "2"), ("b", None), *(("n", str(i)) for i in range(12))]:
        registry.tag("digits:1", key, value)
    assert registry.get("digits").tags == {"a": "2", "c": "ü=ß", "n": "11"}
    assert registry.register(run, "digits").tags == {} == registry.get("digits").tags
    for key, value in [("", "x"), ("k", 3), ("k", "\udcff")]:
        with pytest.raises(RegistryError, match="tag"):
            registry.tag("digits", key, value)  # type: ignore[arg-type]


def test_version_of_a_removed_record_is_not_used_again(registry: Registry, run: RunLayout) -> None:
    for _ in range(3):
        registry.register(run, "digits")
    registry.tag("digits:3", "stage", "production")
    registry.layout.record("digits", 1).unlink()
    registry.layout.record("digits", 3).unlink()
    assert registry.register(run, "digits").id == "digits:4"
    assert registry.get("digits").tags == {}
    assert [version.version for version in registry.versions("digits")] == [2, 4]


def test_destination_must_be_absent_or_empty(
    registry: Registry, run: RunLayout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.register(run, "digits")
    empty, full, file = tmp_path / "empty", tmp_path / "full", tmp_path / "file"
    empty.mkdir()
    (full / "x").mkdir(parents=True)
    file.touch()
    for place, message in ((full, "not empty"), (file, "not a folder"), (file / "below", "cannot be copied")):
        with pytest.raises(RegistryError, match=message):
            registry.pull("digits", place)
    monkeypatch.chdir(empty)
    assert registry.pull("digits", Path(".")) == empty
    assert os.listdir(".") == ["model.npz"]


def test_thousand_small_files(registry: Registry, tmp_path: Path) -> None:
    files = {f"part-{i % 7}/{i:04d}.bin": i.to_bytes(4, "big") for i in range(1000)}
    run = make_run(tmp_path, files=files)
    registered = registry.register(run, "digits")
    assert len(registered.files) == 1000
    assert registry.verify() == []
    assert content(registry.pull("digits", tmp_path / "there")) == files


def test_a_deleted_version_is_gone_with_its_own_files(tmp_path: Path) -> None:
    """Its number stays taken; what another version has as well stays, and what nobody has goes."""
    registry = Registry(Workspace(tmp_path).registry)
    for number in (1, 2, 3):
        registry.register(make_run(tmp_path, files={"shared": b"same", "own": b"%d" % number}), "digits", tags={"a": "b"})
    registry.tag("digits:3", "stage", "production")
    assert registry.delete("digits:3").id == "digits:3"
    assert [version.id for version in registry.versions("digits")] == ["digits:1", "digits:2"]
    assert (blob_of(registry, b"same").exists(), blob_of(registry, b"3").exists()) == (True, False)
    again = registry.register(make_run(tmp_path, files={"own": b"3"}), "digits")
    assert (again.id, dict(again.tags)) == ("digits:4", {})
    for ref, words in (
        ("digits:3", "no version 3"),
        ("digits", "which version is to be deleted"),
        ("digits:latest", "digits:VERSION"),
    ):
        with pytest.raises(RegistryError, match=words):
            registry.delete(ref)
    for version in registry.versions("digits"):
        registry.delete(version.id)
    assert (registry.names(), registry.verify()) == ([], [])
    assert not [path for path in registry.layout.blobs.rglob("*") if path.is_file()]
    assert not list(registry.layout.incoming.iterdir())
    assert registry.register(make_run(tmp_path), "digits").id == "digits:5"


def test_no_file_goes_where_a_record_cannot_be_read(tmp_path: Path) -> None:
    registry = Registry(Workspace(tmp_path).registry)
    for name in ("digits", "letters"):
        registry.register(make_run(tmp_path), name)
    flip_bit(registry.layout.record("letters", 1))
    registry.delete("digits:1")
    assert registry.names() == ["letters"]
    assert blob_of(registry, MODEL).exists()


def test_a_deletion_between_the_steps_of_a_registration_takes_nothing_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once when the files are in the store and the record is not yet, once when the deletion has asked who uses them."""
    registry = Registry(Workspace(tmp_path).registry)
    run = make_run(tmp_path)
    registry.register(run, "digits")
    claim_next = registry_module.claim_next

    def delete_first(*args: Any, **given: Any) -> int:
        monkeypatch.undo()
        registry.delete("digits:1")
        assert not blob_of(registry, MODEL).exists()
        return claim_next(*args, **given)

    monkeypatch.setattr(registry_module, "claim_next", delete_first)
    assert registry.register(run, "digits").id == "digits:2"
    assert registry.verify() == []

    used_blobs, asked = registry._used_blobs, []

    def register_then() -> set[str]:
        found = used_blobs()
        if not asked:
            asked.append(registry.register(run, "letters"))
        return found

    monkeypatch.setattr(registry, "_used_blobs", register_then)
    registry.delete("digits:2")
    assert [registry.names(), registry.verify()] == [["letters"], []]
