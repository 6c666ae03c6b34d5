"""What a run's copy of its source holds."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dtrain import snapshot
from dtrain.errors import UsageError
from dtrain.snapshot import list_files, take_snapshot


def fill(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


def names(folder: Path, **options: Path) -> list[str]:
    return [file.path for file in list_files(folder, **options)]


def test_what_is_never_copied(tmp_path: Path) -> None:
    fill(tmp_path, "train.py", "lib/a.py", ".git/x", "lib/__pycache__/a.pyc", "outputs/old", "logs/old", "lib/outputs/kept")
    fill(tmp_path, "venv/pyvenv.cfg", "venv/lib/big.py", "workspace/runs/x/spec.json", ".hidden")
    assert names(tmp_path, excluded=tmp_path / "workspace") == [".hidden", "lib/a.py", "lib/outputs/kept", "train.py"]


@pytest.mark.parametrize(
    "present", [(".gitignore",), (".amlignore", ".gitignore"), (".dtrainignore", ".amlignore", ".gitignore")]
)
def test_the_first_ignore_file_counts(tmp_path: Path, present: tuple[str, ...]) -> None:
    fill(tmp_path, "train.py", "data/1", "data/keep", *(f"only{name}" for name in present))
    for name in present:
        (tmp_path / name).write_text(f"only{name}\n/data/*\n!/data/keep\n")
    expected = {"train.py", "data/keep", *present} | {f"only{name}" for name in present[1:]}
    assert set(names(tmp_path)) == expected


def test_no_workspace_is_copied_wherever_it_is(tmp_path: Path) -> None:
    fill(tmp_path, "train.py", "runs/a/spec.json", "registry/models/x/1.json", "old/runs/b/spec.json", "old/other")
    assert names(tmp_path, excluded=tmp_path) == ["train.py"]


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """Through the copy itself: root may read what others may not."""
    fill(tmp_path / "s", "train.py")
    (tmp_path / "c").mkdir()
    real = list_files(tmp_path / "s")
    (tmp_path / "s" / "train.py").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(snapshot, "list_files", lambda *_args, **_options: real)
        with pytest.raises(UsageError, match=r"train.py cannot be read .*\.dtrainignore"):
            take_snapshot(tmp_path / "s", tmp_path / "c")


def test_links_lead_where_they_led(tmp_path: Path) -> None:
    source, elsewhere, copy = tmp_path / "source", tmp_path / "elsewhere", tmp_path / "copy"
    fill(source, "a.py")
    fill(elsewhere, "data.bin")
    (source / "inner.py").symlink_to("a.py")
    (source / "data").symlink_to("../elsewhere")
    (source / "dangling").symlink_to("nowhere")
    copy.mkdir()
    take_snapshot(source, copy)
    assert os.readlink(copy / "inner.py") == "a.py"
    assert (copy / "data" / "data.bin").read_text() == "data.bin"
    assert os.readlink(copy / "dangling") == "nowhere"


def test_too_many_files_and_too_many_bytes_name_the_biggest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, *(f"{number:02d}.py" for number in range(20)))
    with open(tmp_path / "huge.bin", "wb") as file:
        file.truncate(snapshot.MAX_BYTES)
    with pytest.raises(UsageError, match=r"21 files, 300 MB.*\.dtrainignore") as caught:
        list_files(tmp_path)
    listing = str(caught.value).splitlines()[1:]
    assert len(listing) == 10
    assert listing[0].endswith("300.0 MB  huge.bin")
    (tmp_path / "huge.bin").unlink()
    monkeypatch.setattr(snapshot, "MAX_FILES", 19)
    with pytest.raises(UsageError, match="20 files"):
        list_files(tmp_path)


def test_file_modes_stay(tmp_path: Path) -> None:
    fill(tmp_path / "s", "run.sh")
    (tmp_path / "s" / "run.sh").chmod(0o755)
    (tmp_path / "c").mkdir()
    take_snapshot(tmp_path / "s", tmp_path / "c")
    assert os.access(tmp_path / "c" / "run.sh", os.X_OK)
