"""Which files of a run are registered: those of its ``outputs/``, whole and nothing else."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from dtrain.checkpoint import committed_steps, verify_step
from dtrain.errors import RegistryError
from dtrain.layout import RunLayout
from dtrain.registry.records import check_text

LISTED = 12


@dataclass(frozen=True)
class Selected:
    """``source`` is the file to copy, with links resolved; ``path`` its name in the model, relative to what was asked for."""

    source: Path
    path: str


def select_files(run: RunLayout, path: str | None) -> list[Selected]:
    """The files that ``path`` (relative to the run folder: a file or folder in ``outputs/``) means, in the order of their names.

    None means all outputs but metrics and checkpoints. A file is named in the model by its last name, those of a folder by
    their path in it; empty folders are not kept. Every checkpoint step of which a file is chosen is verified as a whole.
    Raises RegistryError.
    """
    if path is None:
        if not (selected := _files_below(run, run.outputs, leave_out=(run.metrics, run.checkpoints))):
            raise _only_checkpoints(run)
    else:
        start = _locate(run, path)
        selected = _files_below(run, start) if start.is_dir() else [_selected(run, start, start.parent)]
        if not selected:
            raise RegistryError(f"{path} of run {run.id} is an empty folder; there is nothing to register{_holding(run)}")
    _verify_steps(run, selected)
    return selected


def _locate(run: RunLayout, path: str) -> Path:
    parts = PurePosixPath(path).parts
    if parts[:1] != (run.outputs.name,) or ".." in parts:
        raise RegistryError(
            f"path {path!r} is not in the outputs of run {run.id}; give it relative to the run folder, as in outputs/model.npz, "
            f"without '..'{_holding(run)}"
        )
    start = run.root.joinpath(*parts)
    if not os.path.lexists(start):
        raise RegistryError(f"run {run.id} has no {path}{_holding(run)}")
    return _resolve(run, start) if start.is_dir() else start


def _files_below(run: RunLayout, folder: Path, leave_out: tuple[Path, ...] = ()) -> list[Selected]:
    found: list[Selected] = []
    for name, folders, files in os.walk(folder, onerror=_unreadable):
        parent = Path(name)
        folders[:] = sorted(child for child in folders if parent / child not in leave_out)
        for child in folders:
            # Following could go in circles, leaving it out silently would register half a model.
            if (parent / child).is_symlink():
                raise RegistryError(
                    f"{parent / child} is a link to a folder; name with --path the folder that is meant, or remove the link"
                )
        found += [_selected(run, parent / child, folder) for child in sorted(files)]
    return sorted(found, key=lambda selected: selected.path)


def _unreadable(error: OSError) -> None:
    raise RegistryError(f"{error.filename} cannot be read: {error.strerror}") from error


def _selected(run: RunLayout, file: Path, base: Path) -> Selected:
    source = _resolve(run, file)
    if not source.is_file():
        raise RegistryError(f"{file} is neither a file nor a folder; remove it, or register another path of outputs/ with --path")
    return Selected(source, check_text("the file name", file.relative_to(base).as_posix()))


def _resolve(run: RunLayout, path: Path) -> Path:
    try:
        resolved = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, before Python 3.13
        raise RegistryError(
            f"{path} is a link that leads nowhere, or cannot be read; remove it, or copy the file there"
        ) from error
    if not resolved.is_relative_to(run.outputs.resolve()):
        raise RegistryError(f"{path} leads out of the run's outputs, to {resolved}; copy that file into outputs/ instead")
    return resolved


def _verify_steps(run: RunLayout, selected: Iterable[Selected]) -> None:
    checkpoints = run.checkpoints.resolve()
    inside = [s.source.relative_to(checkpoints).parts for s in selected if s.source.is_relative_to(checkpoints)]
    newest = [folder.name for folder in committed_steps(run.checkpoints).values()][-1:]  # its damage is a damaged run's
    for step in sorted({parts[0] for parts in inside if len(parts) > 1} | set(newest)):
        problems = verify_step(checkpoints / step)
        if problems:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise RegistryError(
                f"checkpoint {step} of run {run.id} does not verify: {problems[0]}{more}; register another step{_steps(run)}"
            )


def _steps(run: RunLayout) -> str:
    known = [folder.relative_to(run.root).as_posix() for _, folder in sorted(committed_steps(run.checkpoints).items())]
    return f"; it has {', '.join(known[-LISTED:])}" if known else "; it has no whole one"


def _only_checkpoints(run: RunLayout) -> RegistryError:
    if not run.outputs.is_dir():
        return RegistryError(f"run {run.id} has no outputs folder ({run.outputs}); there is nothing to register")
    steps = sorted(committed_steps(run.checkpoints).items())
    if not steps:
        return RegistryError(f"the outputs of run {run.id} hold no file to register; let the script write its model to ./outputs")
    newest = steps[-1][1].relative_to(run.root).as_posix()
    return RegistryError(
        f"the outputs of run {run.id} hold nothing but metrics and checkpoints; `--path {newest}` registers its newest checkpoint"
    )


def _holding(run: RunLayout) -> str:
    """What the outputs hold, as the end of a message: the files, then checkpoints and metrics as one folder each."""
    files: list[str] = []
    folders: list[str] = []
    for name, inner, found in os.walk(run.outputs):
        parent = Path(name)
        closed = {child for child in inner if parent == run.checkpoints or parent / child == run.metrics}
        if parent == run.checkpoints:
            closed -= {child for child in closed if child.startswith(".")}  # what is being made
            inner.clear()
        files += [(parent / child).relative_to(run.root).as_posix() for child in sorted(found)]
        folders += [(parent / child).relative_to(run.root).as_posix() + "/" for child in sorted(closed)]
        inner[:] = sorted(set(inner) - closed)
    held = files + folders
    if not held:
        return "; its outputs/ is empty"
    more = f" and {len(held) - LISTED} more" if len(held) > LISTED else ""
    return f"; its outputs/ holds {', '.join(held[:LISTED])}{more}"
