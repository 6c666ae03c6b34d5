"""Paths, whole files, and finding a run again."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from dtrain.errors import UsageError, WorkspaceError
from dtrain.files import atomic_write, read_json, write_json
from dtrain.layout import RunLayout, Workspace


def make(workspace: Workspace, experiment: str) -> RunLayout:
    run = workspace.create_run(experiment)
    write_json(run.spec, {})
    return run


def test_a_run_is_found_by_id_beginning_latest_and_path(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "w")
    first, second = make(workspace, "one"), make(workspace, "two-b")
    assert workspace.list_runs() == [first, second]
    assert workspace.find_run("latest") == second
    assert workspace.find_run("one") == first
    assert workspace.find_run(second.id) == second
    assert workspace.find_run(str(first.root)) == first
    assert second.workspace.root == workspace.root


def test_latest_is_by_time_whatever_the_experiments_are_called(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    make(workspace, "z-1-2")
    time.sleep(0.01)
    newest = make(workspace, "a")
    assert workspace.find_run("latest") == newest


def test_a_folder_that_is_named_otherwise_is_never_the_latest(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    named = make(workspace, "a")
    by_hand = RunLayout(workspace.runs / "a-dry-run")
    by_hand.root.mkdir()
    write_json(by_hand.spec, {})
    assert workspace.list_runs() == [by_hand, named]


def test_a_run_that_is_not_there_or_not_unique(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    with pytest.raises(WorkspaceError, match="no run in workspace"):
        workspace.find_run("latest")
    make(workspace, "same")
    make(workspace, "same")
    with pytest.raises(WorkspaceError, match="not unique: 2 runs begin so"):
        workspace.find_run("same")
    with pytest.raises(WorkspaceError, match="no run 'other'"):
        workspace.find_run("other")
    with pytest.raises(WorkspaceError, match="not a run folder"):
        workspace.find_run("./other")


@pytest.mark.parametrize("name", ["", "a/b", "..", ".a", "-a", "a b", "ä", "a" * 65, "a:1"])
def test_names_that_are_no_path_component(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="is not allowed"):
        Workspace(tmp_path).create_run(name)


def test_workspace_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "w").write_text("")
    with pytest.raises(WorkspaceError, match="cannot be"):
        Workspace(tmp_path / "w").create_run("x")


def test_what_a_script_writes_to_outputs_and_logs_is_in_the_run(tmp_path: Path) -> None:
    run = Workspace(tmp_path).create_run("x")
    run.make_folders(2)
    (run.code / "outputs" / "a").write_text("1")
    (run.code / "logs" / "b").write_text("2")
    assert (run.outputs / "a").read_text() == "1"
    assert (run.logs / "b").read_text() == "2"
    run.make_folders(2)


def test_atomic_write_replaces_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    atomic_write(path, b"old")
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()

    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        atomic_write(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_damaged_record_is_not_forgiven(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    with pytest.raises(FileNotFoundError):
        read_json(path)
    path.write_text('{"state": "comp')
    with pytest.raises(WorkspaceError, match=r"status.json is damaged"):
        read_json(path)


def test_the_newest_attempt_of_a_run_and_of_its_copy(tmp_path: Path) -> None:
    run = RunLayout(tmp_path / "run")
    run.make_folders(1)
    run.begin_attempt(1, 1)
    assert run.newest_attempt().attempt == 1
    assert run.rank(0).root.resolve() == RunLayout(run.root, 1).rank(0).root
    shutil.copytree(run.root, tmp_path / "copy")  # follows links
    assert RunLayout(tmp_path / "copy").newest_attempt().rank(0).root.is_dir()
