"""Checkpoints of a job of any number of ranks: whole or absent at every instant, and verified before they are used.

How a step is saved (all ranks, in the foreground):

1. The ranks exchange what they are about to save; a rank that cannot save its part makes all of them refuse.
2. Rank 0 clears what an interrupted save of the same step left behind.
3. Every rank writes its shard under a temporary name, syncs it, renames it; the exchange of the results is the barrier. One that
   does not see rank 0's folder, on a host without a shared file system, gives its shard to rank 0, which writes it.
4. Rank 0 writes ``manifest.json``: the step exists. Then older steps beyond ``keep`` are deleted.

Whatever fails on whichever rank before 4 is told to all, the step's files are removed, and older steps are as they were.
A step that is saved again (a restarted job passes a step whose checkpoint was damaged, or a script saves twice) is written
under new file names beside the old ones; replacing the manifest changes from all of the old to all of the new at once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from dtrain import _shard_passing, _shards
from dtrain._shards import Array, Manifest, TensorRecord, Written
from dtrain.comm.base import Communicator
from dtrain.errors import CheckpointError, UsageError
from dtrain.files import fsync_folder
from dtrain.layout import StepFolder, staging_folder

T = TypeVar("T")

logger = logging.getLogger(__name__)

FOLLOW_EVERY_S = 0.5
"""How often :meth:`Checkpointer.follow` looks for a newer step."""


@dataclass(frozen=True, kw_only=True)
class Restored:
    """What a checkpoint held. Arrays are new and writable."""

    step: int
    world_size: int
    """Of the job that saved it."""
    shared: dict[str, Array]
    """The same on all ranks, in the order in which rank 0 gave them."""
    own: dict[str, Array] | None
    """What this rank saved for itself; None when the number of ranks differs, for nobody's share is this rank's then."""
    meta: Any
    own_meta: Any
    """None when the number of ranks differs."""
    path: Path


class Checkpointer:
    """Saves and restores the state of a job in one folder, that of rank 0's host. All ranks make one, over the same path."""

    def __init__(
        self,
        folder: Path,
        comm: Communicator,
        *,
        keep: int = 3,
        resume_from: Path | None = None,
        attempt: int | None = None,
        read_only: Callable[[], str] = str,
    ) -> None:
        """``keep`` steps are kept; ``resume_from`` is the checkpoints folder of an earlier run, which is only read.

        ``attempt`` is that of the run: files are made in its staging folder, and when that is gone, so is this process's right to
        save. None: they are made in the steps' own folders.
        ``read_only`` says why this process may not save now (another one does), and makes :meth:`save` raise UsageError with it.
        """
        if keep < 1:
            raise UsageError(f"keep={keep} checkpoints cannot be; keep 1 or more")
        self.folder = folder
        self._comm = comm
        self._keep = keep
        self._resume_from = resume_from
        self._attempt = attempt or 0
        self._staging = None if attempt is None else staging_folder(folder, attempt)
        self._read_only = read_only
        self._sees: list[bool] | None = None
        """By rank, whether it sees rank 0's folder; asked at the first save."""

    def stage_in(self, folder: Path) -> None:
        """Make files in this folder from now on; when it is gone, so is this process's right to save."""
        self._staging = folder

    def save(
        self,
        step: int,
        shared: Mapping[str, Array],
        own: Mapping[str, Array] | None = None,
        meta: Any = None,
        own_meta: Any = None,
    ) -> Path:
        """Save a step and return its folder. Collective; blocks until the step is committed on disk.

        ``shared`` holds what is the same on all ranks (each tensor is written once, by one of them; the values are not
        compared), ``own`` what is this rank's. ``meta`` (rank 0's counts) and ``own_meta`` are values that JSON can hold,
        NaN, infinity and long integers included. Raises CheckpointError on all ranks, with older checkpoints untouched,
        and UsageError when it is not this process that saves.
        """
        if why := self._read_only():
            raise UsageError(why)
        comm = self._comm
        tensors, own_tensors, metas = self._agree(step, shared, own or {}, (meta, own_meta))
        folder = StepFolder.of(self.folder, step)
        generation = self._on_all(step, lambda: _shards.prepare_step(folder) if comm.rank == 0 else 0)[0]
        assigned = _shards.assign_tensors({name: tensor.nbytes for name, tensor in tensors.items()}, comm.size)
        mine = {name: tensor for name, tensor in tensors.items() if assigned[name] == comm.rank}

        written, trouble = self._write(step, folder.shard(comm.rank, generation), mine, own_tensors)

        def commit() -> None:
            if trouble is not None:
                raise trouble
            if comm.rank == 0:
                _shards.wait_visible(folder, [file for file, _ in written])
                fsync_folder(self.folder)
                manifest = self._manifest(step, list(tensors), written, metas)
                _shards.write_manifest(folder, manifest, self._staging or folder.root)

        self._on_all(step, commit, undo=folder)
        if comm.rank == 0:
            self._clean_up(step, folder)
        return folder.root

    def _write(
        self, step: int, path: Path, shared: Mapping[str, Array], own: Mapping[str, Array]
    ) -> tuple[list[Written], OSError | None]:
        """Write every rank's shard, this one's to ``path``. What was written, by rank, and why rank 0 could not write others'."""
        comm, folder = self._comm, StepFolder(path.parent)
        sees = self._sees = self._sees or _shard_passing.who_sees(self.folder, comm)
        staging = self._staging or folder.root
        to_pass: list[bytes] = []

        def write() -> Written:
            data, what = _shards.make_shard(path.name, comm.rank, shared, own)
            if sees[comm.rank]:
                folder.root.mkdir(parents=True, exist_ok=True)  # where rank 0's folder is not visible here yet
                _shards.write_shard(path, [data], staging)
            else:
                to_pass.append(data)
            return what

        written = self._on_all(step, write, undo=folder)
        passed = {rank: file for rank, (file, _) in enumerate(written) if not sees[rank]}
        return written, _shard_passing.gather_shards(comm, to_pass, passed, folder, staging)

    def restore(self, which: Literal["newest"] | int | Path = "newest") -> Restored | None:
        """Read the newest step that verifies, or step ``which`` (a Path: in that folder). Collective; all ranks get the same.

        This run's folder is searched first, then ``resume_from``. A newest step that is damaged is warned about and the next
        older one taken. Returns None when there is no checkpoint at all; raises CheckpointError when there are some and none
        verifies (to begin from nothing must be somebody's decision), or when there is no step ``which``. Any number of
        ranks restores what any other saved.
        """
        comm = self._comm
        candidates: list[Path] = comm.bcast_obj(self._candidates() if comm.rank == 0 else None)
        if which == "newest":
            chosen = candidates
        elif isinstance(which, (int, np.integer)):
            chosen = [path for path in candidates if path == StepFolder.of(path.parent, which).root]
        elif isinstance(which, Path):
            chosen = [path for path in candidates if path == which]
        else:
            raise UsageError(f"restore({which!r}) is not known; use 'newest' or the number of a step")
        if not chosen and which == "newest":
            return None
        problems = []
        for path in chosen:
            try:
                return self._load(StepFolder(path))
            except CheckpointError as error:
                problems.append(str(error))
                if comm.rank == 0:
                    logger.warning("checkpoint %s is not used: %s", path, error)
        existing = ", ".join(str(path) for path in candidates) or "none"
        if not problems:
            raise CheckpointError(f"there is no checkpoint of step {which}; there is: {existing}")
        raise CheckpointError(
            f"no checkpoint verifies that could be restored ({'; '.join(problems)}); there is: {existing}; restore another step, "
            "or move these folders away to begin without a checkpoint"
        )

    def follow(self, restored: Restored | None = None, *, until: Callable[[], bool] | None = None) -> Iterator[Restored]:
        """For an evaluator beside the job: ``restored`` (what it began with), then the newest step whenever this run commits a
        newer one, verified. Collective; waits in between, and ends with the newest step that is there once ``until()``
        (``run.is_done``: the job may end before the step you expect), asked on rank 0, is true; without it, never.

        Steps that come and go while one is at work are left out, and so are those that do not verify.
        """
        if restored is not None:
            yield restored
        last = restored.step if restored is not None else -1
        warned: set[Path] = set()
        while True:
            is_last = self._comm.bcast_obj(until is not None and until())  # before looking: what was saved until then is seen
            for path in self._comm.bcast_obj([path for step, path in committed_steps(self.folder).items() if step > last][::-1]):
                try:
                    newest = self._load(StepFolder(path))
                except CheckpointError as error:
                    # Also one that was deleted, or saved again, while it was read.
                    if path not in warned and StepFolder(path).manifest.is_file():
                        logger.warning("checkpoint %s is not used: %s", path, error)
                        warned.add(path)
                    continue
                last = newest.step
                yield newest
                break
            else:
                if is_last:
                    return
                time.sleep(FOLLOW_EVERY_S)

    def steps(self) -> list[int]:
        """The steps that this run's folder holds now, rising. Not collective; they are not verified."""
        return list(committed_steps(self.folder))

    def _agree(
        self, step: int, shared: Mapping[str, Array], own: Mapping[str, Array], metas: tuple[Any, Any]
    ) -> tuple[dict[str, Array], dict[str, Array], list[tuple[str, str]]]:
        """Check this rank's part, and that all ranks save the same step and the same shared tensors.

        Returns both kinds of tensors, checked, and (meta, own_meta) of all ranks as text.
        """
        tensors: dict[str, Array] = {}
        own_tensors: dict[str, Array] = {}

        def check() -> tuple[int, str, tuple[str, str]]:
            if not self._may_save():
                raise CheckpointError(
                    f"attempt {self._attempt} of this run is over, or goes on without this process (there is no "
                    f"{self._staging}); what is left of it saves nothing"
                )
            if isinstance(step, bool) or not isinstance(step, (int, np.integer)) or step < 0:
                raise CheckpointError(f"step {step!r} is not allowed; steps are whole numbers from 0")
            tensors.update(_shards.check_tensors("shared", shared))
            own_tensors.update(_shards.check_tensors("own", own))
            texts = _shards.encode_meta("meta", metas[0]), _shards.encode_meta("own_meta", metas[1])
            described = sorted((name, tensor.dtype.name, tensor.shape) for name, tensor in tensors.items())
            return int(step), hashlib.blake2b(json.dumps(described).encode(), digest_size=16).hexdigest(), texts

        seen = self._on_all(step, check)
        numbers = [number for number, _, _ in seen]
        if len(set(numbers)) > 1:
            raise CheckpointError(f"the ranks save different steps: {numbers} by rank; save at the same step")
        if len({digest for _, digest, _ in seen}) > 1:
            by_rank = self._comm.allgather_obj({name: (tensor.shape, tensor.dtype.name) for name, tensor in tensors.items()})
            raise CheckpointError(_shards.explain_difference(step, by_rank))
        return tensors, own_tensors, [texts for _, _, texts in seen]

    def _on_all(self, step: int, action: Callable[[], T], *, undo: StepFolder | None = None) -> list[T]:
        """Run ``action`` on every rank and return all results by rank; when it fails on any, all raise. Collective.

        ``undo`` is the folder that rank 0 then clears of this save, before any rank goes on.
        """
        outcomes, failed, cause = self._exchange(action)
        if not failed:
            return outcomes
        if undo is not None:
            if self._comm.rank == 0 and self._may_save():  # else what lies there is the next attempt's
                _shards.undo_step(undo)
            self._comm.barrier()
        reasons = "; ".join(f"rank {rank}: {reason}" for rank, reason in failed.items())
        error = CheckpointError(
            f"the checkpoint of step {step} was not saved: {reasons}; older checkpoints in {self.folder} are untouched"
        )
        error.of_rank = min(failed)
        raise error from cause

    def _may_save(self) -> bool:
        return self._staging is None or self._staging.is_dir()

    def _exchange(self, action: Callable[[], T]) -> tuple[list[T], dict[int, str], Exception | None]:
        """Run ``action`` on every rank; return all results, the reasons of those ranks that failed, and this rank's own."""
        cause: Exception | None = None
        outcome: tuple[T | None, str | None]
        try:
            outcome = (action(), None)
        except (OSError, MemoryError, CheckpointError) as error:
            cause = error
            outcome = (None, str(error) or type(error).__name__)
        outcomes = self._comm.allgather_obj(outcome)
        failed = {rank: reason for rank, (_, reason) in enumerate(outcomes) if reason is not None}
        return [result for result, _ in outcomes], failed, cause

    def _manifest(self, step: int, shared_order: list[str], written: list[Written], metas: list[tuple[str, str]]) -> Manifest:
        tensors = [tensor for _, members in written for tensor in members]
        place = {name: index for index, name in enumerate(shared_order)}
        shared = sorted((t for t in tensors if t.kind == "shared"), key=lambda t: place[t.name])
        return Manifest(
            step=int(step),
            world_size=self._comm.size,
            attempt=self._attempt,
            time=time.time(),
            tensors=shared + [t for t in tensors if t.kind == "own"],
            files=[file for file, _ in written],
            meta=metas[0][0],
            own_meta=[own for _, own in metas],
        )

    def _clean_up(self, step: int, folder: StepFolder) -> None:
        """Delete, on rank 0, what the new commit makes superfluous. It is saved: trouble here is only warned about.

        Only steps before this one count for ``keep``: after going back to an older step by hand, the newer ones stay.
        """
        superfluous = [path for other, path in committed_steps(self.folder).items() if other < step]
        superfluous = superfluous[: len(superfluous) - (self._keep - 1)] if len(superfluous) >= self._keep else []
        interrupted = [other for other in StepFolder.list(self.folder).values() if other.retired.is_file()]
        try:
            _shards.clear_leftovers(folder)
        except OSError as error:
            logger.warning("files of an earlier save of step %d stay in %s: %s", step, folder.root, error)
        for old in [*interrupted, *(StepFolder(path) for path in superfluous)]:
            try:
                _shards.remove_step(old)
            except (OSError, CheckpointError) as error:
                logger.warning("old checkpoint %s is not deleted: %s", old.root, error)
        for other, old in StepFolder.list(self.folder).items():
            if other < step and not old.manifest.is_file():
                _shards.remove_if_empty(old)  # a deletion was interrupted at its last moment

    def _candidates(self) -> list[Path]:
        folders = [self.folder] if self._resume_from is None else [self.folder, self._resume_from]
        return [path for folder in folders for path in reversed(committed_steps(folder).values())]

    def _load(self, folder: StepFolder) -> Restored:
        """Verify a step, its files shared out over the ranks, and read it. Raises CheckpointError on all ranks or on none."""
        comm = self._comm
        manifest = self._all_or_none(lambda: _shards.read_manifest(folder.manifest) if comm.rank == 0 else None)[0]
        assert manifest is not None
        sees = self._all_or_none(lambda: _shard_passing.holds(folder, manifest))
        if not sees[0]:
            raise CheckpointError(f"{folder.root} was deleted, or saved again, while it was read")
        here = [rank for rank, there in enumerate(sees) if there]
        by_size = sorted(manifest.files, key=lambda file: -file.size_bytes)
        share = by_size[here.index(comm.rank) :: len(here)] if comm.rank in here else []
        self._all_or_none(lambda: _shards.check_files(folder, share))
        same_size = manifest.world_size == comm.size
        shared_records = [t for t in manifest.tensors if t.kind == "shared"]
        own_records = [[t for t in manifest.tensors if same_size and t.rank == rank] for rank in range(comm.size)]
        shared = self._read(folder, shared_records if sees[comm.rank] else [])
        own = self._read(folder, own_records[comm.rank] if sees[comm.rank] else [])
        if not all(sees):
            shared = _shard_passing.broadcast_tensors(comm, shared_records, shared)
        for rank in (rank for rank, there in enumerate(sees) if not there):
            theirs = self._read(folder, own_records[rank] if comm.rank == 0 else [])
            sent = _shard_passing.send_tensors(comm, own_records[rank], theirs, rank)
            own = sent if comm.rank == rank else own
        return Restored(
            step=manifest.step,
            world_size=manifest.world_size,
            shared=shared,
            own=own if same_size else None,
            meta=json.loads(manifest.meta),
            own_meta=json.loads(manifest.own_meta[comm.rank]) if same_size else None,
            path=folder.root,
        )

    def _read(self, folder: StepFolder, records: list[TensorRecord]) -> dict[str, Array]:
        """Each rank its tensors, of a step that it sees. Collective; raises CheckpointError on all ranks or on none."""
        read: dict[str, Array] = {}
        self._all_or_none(lambda: read.update(_shards.read_tensors(folder, records)))
        return read

    def _all_or_none(self, action: Callable[[], T]) -> list[T]:
        outcomes, failed, _ = self._exchange(action)
        if failed:
            raise CheckpointError("; ".join(dict.fromkeys(failed.values())))
        return outcomes


def committed_steps(checkpoints: Path) -> dict[int, Path]:
    """The steps in a checkpoints folder that have a manifest, rising, and their folders. They are not verified."""
    return {step: folder.root for step, folder in StepFolder.committed(checkpoints).items()}


def verify_step(folder: Path) -> list[str]:
    """What is wrong with the checkpoint in ``folder``: a line for each file, and [] when it is whole. Needs no communicator."""
    step = StepFolder(folder)
    try:
        manifest = _shards.read_manifest(step.manifest)
    except CheckpointError as error:
        return [str(error)]
    except OSError as error:
        return [f"{step.manifest}: {error.strerror}"]
    return [problem for file in manifest.files if (problem := _shards.check_file(folder / file.name, file))]
