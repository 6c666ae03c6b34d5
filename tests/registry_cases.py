"""Ended runs to register, and damage to do to a registry; for the registry's unit and contract tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from blake3 import blake3

from dtrain.checkpoint import Checkpointer
from dtrain.comm.local import LocalCommunicator
from dtrain.layout import RunLayout, Workspace
from dtrain.registry import Registry
from dtrain.status import RunStatus, State, write_record

MODEL = b"weights" * 1000


def make_run(workspace: Path, state: State = "completed", files: dict[str, bytes] | None = None) -> RunLayout:
    run = Workspace(workspace).create_run("digits")
    run.make_folders(2)
    run.metrics_file(0).write_bytes(b"{}\n")
    for name, data in (files if files is not None else {"model.npz": MODEL}).items():
        target = run.outputs / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    write_record(run.status, RunStatus(state=state, size=2, started=1.0, ended=None if state == "running" else 2.0))
    return run


def save_checkpoint(run: RunLayout, step: int = 200) -> Path:
    return Checkpointer(run.checkpoints, LocalCommunicator()).save(step, {"w": np.arange(5000, dtype=np.float32)})


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def flip_bit(path: Path, offset: int = 10) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)


def blob_of(registry: Registry, data: bytes) -> Path:
    return registry.layout.blob(blake3(data).hexdigest())
