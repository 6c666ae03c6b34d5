"""The files of a run under the names that the SDK shows: outputs, logs, uploads, and each rank's log."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import secrets
import shutil
from pathlib import Path, PurePosixPath
from typing import IO

from dtrain.azureml.errors import UserErrorException
from dtrain.azureml.records import AzureLayout
from dtrain.errors import did_you_mean
from dtrain.files import link_new, read_json
from dtrain.layout import RunLayout
from dtrain.snapshot import list_files

BUILD_LOG = "azureml-logs/20_image_build_log.txt"
DRIVER_LOG = "azureml-logs/70_driver_log.txt"
_SHOWN = 12


def run_files(run: RunLayout) -> dict[str, Path]:
    """Every file of the run by its name, sorted; of outputs/ not dtrain's own metrics, which get_metrics() reads."""
    found = {
        **{str(PurePosixPath("outputs") / name): path for name, path in _outputs(run).items()},
        **{str(PurePosixPath("logs") / name): path for name, path in _below(run.logs).items()},
        **_below(AzureLayout(run).uploads),
        **log_files(run),
    }
    return dict(sorted(found.items()))


def log_name(rank: int) -> str:
    """The name of a rank's log, as Azure's newer generation has it."""
    return f"user_logs/std_log_process_{rank:02d}.txt"


def rank_logs(run: RunLayout) -> dict[str, Path]:
    """The ranks' logs, by :func:`log_name`."""
    return {log_name(int(path.parent.name)): path for path in sorted(run.ranks.glob("[0-9]*/output.log"))}


def log_files(run: RunLayout) -> dict[str, Path]:
    """The ranks' logs by the names of Azure's two generations, and what pip said."""
    found = rank_logs(run)
    logs = list(found.values())
    if len(logs) == 1:
        found[DRIVER_LOG] = logs[0]
    else:
        found.update({f"azureml-logs/70_driver_log_{int(path.parent.name)}.txt": path for path in logs})
        if logs:
            found[DRIVER_LOG] = logs[0]
    if (build := AzureLayout(run).build_log).exists():
        found[BUILD_LOG] = build
    return found


def _outputs(run: RunLayout) -> dict[str, Path]:
    """What the script itself left in outputs/, also where dtrain keeps its own."""
    own = {path for paths in run.metrics_files().values() for path in paths}
    folders = (AzureLayout(run).uploads, *run.checkpoints.glob(".attempt-*"))
    found = _below(run.outputs).items()
    return {name: path for name, path in found if path not in own and not any(folder in path.parents for folder in folders)}


def _below(folder: Path) -> dict[str, Path]:
    paths = (Path(parent, name) for parent, _, names in os.walk(folder, followlinks=False) for name in names)
    return {path.relative_to(folder).as_posix(): path for path in paths}


def find_file(run: RunLayout, name: str) -> Path:
    """The file of that name. Raises UserErrorException with the names that there are."""
    files = run_files(run)
    if name in files:
        return files[name]
    some = ", ".join(list(files)[:_SHOWN]) + (f" and {len(files) - _SHOWN} more" if len(files) > _SHOWN else "")
    raise UserErrorException(f"run {run.id} has no file {name!r}{did_you_mean(name, files)}; it has {some or 'none'}")


def target_of(run: RunLayout, name: str) -> Path:
    """Where a file that is uploaded as ``name`` is kept. Raises UserErrorException for a name that leads out of the run."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if not parts or ".." in parts or parts[0] == "/":
        raise UserErrorException(f"file name {name!r} does not stay in the run; use one as outputs/model.npz")
    if parts[0] in ("outputs", "logs") and len(parts) > 1:
        return (run.outputs if parts[0] == "outputs" else run.logs).joinpath(*parts[1:])
    return AzureLayout(run).uploads.joinpath(*parts)


def upload(run: RunLayout, name: str, source: Path) -> None:
    """Copy a local file into the run as ``name``. Raises UserErrorException when it is absent, or the name is taken."""
    if not source.is_file():
        raise UserErrorException(f"there is no file {str(source)!r} to upload (from {Path.cwd()})")
    target = target_of(run, name)
    if target.exists() and target.samefile(source):
        return  # the script wrote it there itself
    with open(source, "rb") as data:
        keep(run, name, data)


def keep(run: RunLayout, name: str, data: IO[bytes]) -> None:
    """Copy what a stream holds into the run as ``name``, whole. UserErrorException when it is taken, by another rank now, say."""
    target = target_of(run, name)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as copy:
            shutil.copyfileobj(data, copy)
        if not link_new(temporary, target):
            raise UserErrorException(
                f"run {run.id} has a file {name!r} already; files of a run are not replaced, use another name"
            )
    finally:
        temporary.unlink(missing_ok=True)


def new_file(run: RunLayout, name: str, suffix: str, rank: int) -> Path:
    """An empty file of the run whose name begins with ``name``, as a file's can, and with the rank where that is not 0.

    It is numbered by the files that this rank has made of that name; no other rank has it.
    """
    plain = re.sub(r"[^\w.-]", "_", name) + (f"_rank{rank}" if rank else "")
    for number in itertools.count():
        target = target_of(run, f"{plain}_{number}{suffix}")
        target.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            target.touch(exist_ok=False)
            return target
    raise AssertionError


def list_source(run: RunLayout) -> list[str]:
    """The names of the files and links in the ranks' working folder as of now, but ./outputs and ./logs."""
    return [file.path for file in list_files(run.code)]


def copy_source(run: RunLayout, target: Path) -> None:
    """Copy what a job's folder began with to a folder, which is made; where that is not recorded, what is there."""
    try:
        names: list[str] = read_json(AzureLayout(run).source)
    except FileNotFoundError:
        names = list_source(run)
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # the job has removed it
            shutil.copy2(run.code / name, target / name, follow_symlinks=False)


def list_code(run: RunLayout) -> dict[str, tuple[int, int]]:
    """Size and time of every file in the ranks' working folder but ./outputs, ./logs and Python's caches."""
    return list_folder(run.code)


def list_folder(root: Path) -> dict[str, tuple[int, int]]:
    """Size in bytes, and time of change in nanoseconds, of every file below ``root`` but links and Python's caches."""
    found = {}
    for name, folders, files in os.walk(root, followlinks=False):
        folders[:] = [child for child in folders if child != "__pycache__" and not (Path(name) / child).is_symlink()]
        for child in files:
            path = Path(name) / child
            if not path.is_symlink():
                status = path.stat()
                found[path.relative_to(root).as_posix()] = (status.st_size, status.st_mtime_ns)
    return found


def files_elsewhere(run: RunLayout, before: dict[str, tuple[int, int]]) -> list[str]:
    """The files and folders that a job made or changed in its working folder, where nobody looks for results."""
    changed = [path for path, state in list_code(run).items() if before.get(path) != state]
    folders = {path.partition("/")[0] + "/" for path in changed if "/" in path}
    known = {path.partition("/")[0] + "/" for path in before if "/" in path}
    named = {path for path in changed if path.partition("/")[0] + "/" in known or "/" not in path}
    shown = sorted({*named, *(folders - known)})
    return shown[:_SHOWN] + ([f"and {len(shown) - _SHOWN} more"] if len(shown) > _SHOWN else [])
