"""Registry: register, list, tag, pull and verify. Whoever can read the folder can pull; nobody ever waits for a lock."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from dtrain.errors import RegistryError, did_you_mean
from dtrain.files import atomic_write, fsync_folder
from dtrain.layout import NAME_PATTERN, RunLayout, check_name
from dtrain.registry.records import (
    ModelFile,
    ModelVersion,
    Problem,
    check_tag,
    check_text,
    seal,
    split_reference,
    unseal,
    version_from,
)
from dtrain.registry.selection import select_files
from dtrain.registry.store import Blob, BlobError, BlobStore, RegistryLayout, claim_next, explain_errors, numbers_in
from dtrain.status import RunStatus, read_status


class Registry:
    """The models in one folder (``Workspace.registry``), which need not exist before the first is registered.

    A reference is ``name`` (its newest version), ``name:latest`` or ``name:3``. Any number of processes, on any number of
    hosts that share the folder, may use it at once.
    """

    def __init__(self, root: Path) -> None:
        self.layout = RegistryLayout(root.absolute())
        self._blobs = BlobStore(self.layout)

    def register(
        self,
        run: RunLayout,
        name: str,
        *,
        path: str | None = None,
        tags: Mapping[str, str] | None = None,
        description: str = "",
        any_state: bool | Literal["also running"] = False,
    ) -> ModelVersion:
        """Copy files of an ended run's outputs into the store as the next version of ``name``. Blocks until all is durable.

        ``path``: a file or folder, relative to the run folder (``outputs/model.npz``); None: all outputs but metrics and
        checkpoints. ``any_state``: also a run that failed or was canceled; ``also running``: for one who knows that the files of
        a run that goes on are whole. Either a whole version comes to be or none.
        Raises UsageError (name), RegistryError.
        """
        check_name("model", name)
        check_text("the description", description)
        checked_tags = dict(check_tag(key, value) for key, value in (tags or {}).items())
        status = _registrable_status(run, any_state)
        selected = select_files(run, path)
        created = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        with explain_errors(f"registry {self.layout.root} cannot take {name}, nothing was registered"):
            blobs = self._blobs.add_all(file.source for file in selected)
            files = tuple(
                ModelFile(path=file.path, size_bytes=blob.size_bytes, blake3=blob.blake3)
                for file, blob in zip(selected, blobs, strict=True)
            )

            def version(number: int) -> ModelVersion:
                return ModelVersion(
                    name=name,
                    version=number,
                    created=created,
                    run=run.id,
                    run_state=status.state,
                    run_size=status.size,
                    source=path,
                    description=description,
                    tags=checked_tags,
                    files=files,
                )

            number = self._claim(name, lambda n: version(n).record())
            self._blobs.restore_missing(zip((file.source for file in selected), blobs, strict=True))
        return version(number)

    def _claim(self, name: str, record_of: Callable[[int], Mapping[str, Any]]) -> int:
        """Write the record of the next version, and return its number: one that none had before it. Raises OSError."""

        # A version whose record somebody removed may have left tags behind, which must not become the next one's.
        def used() -> int:
            events, deleted = numbers_in(self.layout.model_events(name), suffix=""), numbers_in(self.layout.deleted(name))
            return max([*events, *deleted], default=0)

        def is_spent(number: int) -> bool:
            return self.layout.tombstone(name, number).exists()

        return claim_next(self.layout, self.layout.versions(name), record_of, used, is_spent)

    def delete(self, ref: str) -> ModelVersion:
        """Remove one version (``name:3``) for good, with those of its files that no other has. Blocks; returns what it was.

        Its number is never used again. Where a record of the registry is damaged, all files stay. Raises RegistryError.
        """
        name, number = split_reference(ref)
        if number is None or number == "latest":
            raise RegistryError(f"{ref!r} does not say which version is to be deleted; write {name}:VERSION")
        found = self._find(ref)
        now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        with explain_errors(f"{found.id} cannot be deleted from registry {self.layout.root}"):
            tombstone = self.layout.tombstone(name, found.version)
            tombstone.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(tombstone, seal({"name": name, "version": found.version, "deleted": now}))
            self.layout.record(name, found.version).unlink(missing_ok=True)
            fsync_folder(self.layout.versions(name))
            with suppress(RegistryError):
                self._blobs.remove({file.blake3 for file in found.files}, self._used_blobs)
        return found

    def _used_blobs(self) -> set[str]:
        """What the records of all versions name. Raises RegistryError for a damaged one."""
        found: set[str] = set()
        for name, number in self._meant(None):
            with suppress(FileNotFoundError):  # deleted meanwhile
                found.update(file.blake3 for file in version_from(self.layout.record(name, number), name, number).files)
        return found

    def names(self) -> list[str]:
        """All models that have a version, in the order of their names."""
        try:
            found = sorted(os.listdir(self.layout.models))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise RegistryError(f"registry {self.layout.root} cannot be read: {error.strerror}") from error
        return [name for name in found if NAME_PATTERN.fullmatch(name) and self._numbers(name)]

    def versions(self, name: str) -> list[ModelVersion]:
        """All versions of a model, oldest first. Raises RegistryError when there is none, or a record is damaged."""
        known, version = split_reference(name)
        if version is not None:
            raise RegistryError(f"{name!r} is one version; give the model's name alone, {known}")
        return [self._with_tags(self._record(name, number)) for number in self._numbers_or_raise(name)]

    def get(self, ref: str) -> ModelVersion:
        """The version that ``ref`` means, with its tags of now. Raises RegistryError when there is none, or it is damaged."""
        return self._with_tags(self._find(ref))

    def tag(self, ref: str, key: str, value: str | None) -> None:
        """Set a tag of a version; None removes it. The last writer of a key wins, other keys stay. Raises RegistryError."""
        check_tag(key, "" if value is None else value)
        found = self._find(ref)
        now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        event = {"key": key, "value": value, "created": now}
        with explain_errors(f"registry {self.layout.root} cannot take tag {key!r} of {found.id}"):
            claim_next(self.layout, self.layout.events(found.name, found.version), lambda _: event)

    def pull(self, ref: str, destination: Path) -> Path:
        """Copy a version's files to folder ``destination``, which must be absent or empty; returns its absolute path. Blocks.

        All files are verified before the first is seen there. The registry is only read. Raises RegistryError.
        """
        found = self._find(ref)
        target = Path(os.path.realpath(destination))
        with explain_errors(f"{found.id} cannot be copied to {destination}, nothing was left there"), _staging(target) as staging:
            for file in found.files:
                self._copy_out(found, file, staging / file.path)
        return target

    def _copy_out(self, version: ModelVersion, file: ModelFile, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target, "xb") as copy:
            try:
                copy.writelines(self._blobs.read(Blob(file.blake3, file.size_bytes)))
            except BlobError as error:
                raise RegistryError(
                    f"{version.id} is not copied, its file {file.path} cannot be trusted: {error}; `dtrain verify` lists all "
                    "damage, and registering the same file again mends it"
                ) from error
            copy.flush()
            os.fsync(copy.fileno())

    def verify(self, ref: str | None = None) -> list[Problem]:
        """Read every record and every blob of ``ref`` (a name alone: all its versions; None: the whole registry). Only reads.

        A blob that versions share is read once and reported for each of their files. Raises RegistryError for an unknown ``ref``.
        """
        problems: list[Problem] = []
        seen: dict[Blob, str | None] = {}
        for name, number in self._meant(ref):
            try:
                version = self._record(name, number)
                problems += self._file_problems(version, seen)
                self._with_tags(version)
            except RegistryError as error:
                problems.append(Problem(model=name, version=number, path=None, blob=None, what=str(error)))
        return problems

    def _file_problems(self, version: ModelVersion, seen: dict[Blob, str | None]) -> Iterator[Problem]:
        for file in version.files:
            blob = Blob(file.blake3, file.size_bytes)
            if blob not in seen:
                seen[blob] = self._problem(blob)
            what = seen[blob]
            if what is not None:
                path = self.layout.blob(file.blake3)
                yield Problem(model=version.name, version=version.version, path=file.path, blob=path, what=what)

    def _problem(self, blob: Blob) -> str | None:
        try:
            for _ in self._blobs.read(blob):
                pass
        except BlobError as error:
            return str(error)
        return None

    def _meant(self, ref: str | None) -> list[tuple[str, int]]:
        if ref is None:
            return [(name, number) for name in self.names() for number in self._numbers(name)]
        name, version = split_reference(ref)
        return [(name, number) for number in self._numbers_or_raise(name, version)]

    def _find(self, ref: str) -> ModelVersion:
        name, version = split_reference(ref)
        return self._record(name, self._numbers_or_raise(name, version)[-1])

    def _numbers(self, name: str) -> list[int]:
        with explain_errors(f"registry {self.layout.root} cannot be read"):
            return numbers_in(self.layout.versions(name))

    def _numbers_or_raise(self, name: str, version: str | None = None) -> list[int]:
        """The existing versions of ``name``, ascending and never none; only those that ``version`` means when given."""
        numbers = self._numbers(name)
        if not numbers:
            names = self.names()
            hint = f"it has {', '.join(names[:12])}" if names else "`dtrain register` makes the first"
            raise RegistryError(f"no model {name!r} in registry {self.layout.root}{did_you_mean(name, names)}; {hint}")
        if version is None:
            return numbers
        if version == "latest":
            return numbers[-1:]
        if int(version) not in numbers:
            some = ", ".join(map(str, numbers[-12:]))
            raise RegistryError(f"model {name!r} has no version {version}; it has {'..., ' if len(numbers) > 12 else ''}{some}")
        return [int(version)]

    def _record(self, name: str, number: int) -> ModelVersion:
        path = self.layout.record(name, number)
        try:
            return version_from(path, name, number)
        except FileNotFoundError as error:
            raise RegistryError(f"{name}:{number} was removed while it was read ({path})") from error

    def _with_tags(self, version: ModelVersion) -> ModelVersion:
        """``version`` (as registered) with the tags that its events leave, applied in the order of their numbers."""
        tags: dict[str, str | None] = dict(version.tags)
        for number in numbers_in(self.layout.events(version.name, version.version)):
            path = self.layout.event(version.name, version.version, number)
            event = unseal(path)
            key, value = event.get("key"), event.get("value")
            if not isinstance(key, str) or not isinstance(value, str | None):
                raise RegistryError(f"tag event {path} of {version.id} cannot be trusted; restore it from a backup")
            tags[key] = value
        kept = {key: value for key, value in tags.items() if value is not None}
        return ModelVersion(**{**vars(version), "tags": kept})


def _registrable_status(run: RunLayout, any_state: bool | Literal["also running"]) -> RunStatus:
    status = read_status(run)
    if not status.is_over and any_state != "also running":
        raise RegistryError(f"run {run.id} is still {status.state}; register it when it has ended")
    if status.is_over and status.state != "completed" and not any_state:
        how = "was canceled" if status.state == "canceled" else "failed"
        raise RegistryError(f"run {run.id} {how}; its files are registered all the same with any_state=True (`--any-state`)")
    return status


@contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """A folder to fill. At the end its content is at ``target`` (absent or empty before); an exception removes it instead.

    An absent target appears by one rename. An empty one is kept, because it may be somebody's working folder or a mount
    point: the folder is filled inside it, and its entries are renamed out of it at the end, one by one.
    """
    existed = target.is_dir()
    if os.path.lexists(target) and (not existed or any(target.iterdir())):
        raise RegistryError(f"{target} is {'not empty' if existed else 'not a folder'}; choose a folder that is new or empty")
    target.parent.mkdir(parents=True, exist_ok=True)
    parent = target if existed else target.parent
    staging = parent / f".dtrain-pull-{secrets.token_hex(8)}.tmp"
    staging.mkdir()
    try:
        yield staging
        for folder, _, _ in os.walk(staging):
            fsync_folder(Path(folder))
        if existed:
            for entry in sorted(staging.iterdir()):
                entry.rename(target / entry.name)
        else:
            staging.rename(target)
        fsync_folder(parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
