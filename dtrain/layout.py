"""Every path that dtrain reads or writes, and how a file is written whole.

A workspace holds runs and the registry; a run folder holds what one job was asked to do, what it did and what came out of
it. Nothing else in dtrain joins path names.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from dtrain.errors import UsageError, WorkspaceError
from dtrain.files import fsync_folder, open_anew

_STAMP_PATTERN = re.compile(r"-(\d{8}T\d{6}Z)-")
_STEP_PATTERN = re.compile(r"step-(\d{9,})")
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def check_name(kind: str, name: str) -> str:
    """Return ``name`` when it may be a path component and part of ``name:version``, else raise UsageError."""
    if not NAME_PATTERN.fullmatch(name):
        allowed = "1 to 64 letters, digits, '.', '_' or '-', beginning with a letter or digit"
        raise UsageError(f"{kind} name {name!r} is not allowed; use {allowed}")
    return name


@dataclass(frozen=True)
class RankLayout:
    """The files of one rank: ``ranks/00000/``."""

    root: Path

    @property
    def output_log(self) -> Path:
        """What the rank wrote to its standard output and error, raw."""
        return self.root / "output.log"

    @property
    def process(self) -> Path:
        """Host, process ids and start of the rank's process."""
        return self.root / "process.json"

    @property
    def heartbeat(self) -> Path:
        """What the rank was doing a moment ago; written every second."""
        return self.root / "heartbeat.json"

    @property
    def stack(self) -> Path:
        """Python stacks of the rank's threads, each time they were asked for."""
        return self.root / "stack.txt"

    @property
    def error(self) -> Path:
        """How the rank failed; absent while it has not."""
        return self.root / "error.json"

    def earlier_error(self, number: int) -> Path:
        """How the rank failed before it was started again for the ``number``-th time."""
        return self.root / f"error-{number}.json"

    def look_again(self) -> None:
        """See what another host has written since, see :func:`dtrain.files.open_anew`."""
        with contextlib.suppress(OSError):
            open_anew(self.root)

    @property
    def orders(self) -> Path:
        """What a supervisor on another host tells the rank, a word a line."""
        return self.root / "orders"

    @property
    def done(self) -> Path:
        """The rank's completion record; a run without one from every rank did not succeed."""
        return self.root / "done.json"


@dataclass(frozen=True)
class StepFolder:
    """One checkpoint: ``checkpoints/step-000000200/``."""

    root: Path

    @classmethod
    def of(cls, checkpoints: Path, step: int) -> StepFolder:
        return cls(checkpoints / f"step-{step:09d}")

    @classmethod
    def committed(cls, checkpoints: Path) -> dict[int, StepFolder]:
        """Those of :meth:`list` that have a manifest, and so exist. They are not verified."""
        return {step: folder for step, folder in cls.list(checkpoints).items() if folder.manifest.is_file()}

    @classmethod
    def list(cls, checkpoints: Path) -> dict[int, StepFolder]:
        """All folders that are named like a step, by rising step, committed or not."""
        if not checkpoints.is_dir():
            return {}
        steps = sorted(step for path in checkpoints.iterdir() if (step := cls(path).step) is not None)
        return {step: cls.of(checkpoints, step) for step in steps}

    @property
    def step(self) -> int | None:
        """The step that the folder's name says; None when it is named otherwise."""
        match = _STEP_PATTERN.fullmatch(self.root.name)
        return int(match[1]) if match else None

    @property
    def manifest(self) -> Path:
        return self.root / "manifest.json"

    @property
    def retired(self) -> Path:
        """The manifest of a step that is being deleted: it no longer counts, and a crash half way can be finished later."""
        return self.root / ".manifest.json.retired"

    def shard(self, rank: int, generation: int) -> Path:
        """A step that is saved again gets files of a new name, so that the old ones stay whole until the manifest changes."""
        return self.root / (f"rank-{rank:05d}.{generation}.safetensors" if generation else f"rank-{rank:05d}.safetensors")


def staging_folder(checkpoints: Path, attempt: int) -> Path:
    return checkpoints / f".attempt-{attempt}"


@dataclass(frozen=True)
class RunLayout:
    """One run folder: ``runs/<experiment>-<utc>-<4 hex>/``.

    A job that is started again within its run (``--max-restarts``) makes a new *attempt*, with rank folders and metrics files of
    its own. ``attempt`` says whose are meant here; None: of the newest, to which the link ``ranks`` leads.
    """

    root: Path
    attempt: int | None = None

    @property
    def id(self) -> str:
        return self.root.name

    @property
    def workspace(self) -> Workspace:
        return Workspace(self.root.parent.parent)

    @property
    def spec(self) -> Path:
        return self.root / "spec.json"

    @property
    def status(self) -> Path:
        return self.root / "status.json"

    @property
    def slurm_job(self) -> Path:
        """The Slurm job that the run was submitted as; absent for any other."""
        return self.root / "slurm.json"

    @property
    def slurm_log(self) -> Path:
        """What dtrain and Slurm themselves said while that job ran."""
        return self.root / "slurm.log"

    @property
    def tags(self) -> Path:
        return self.root / "tags.json"

    @property
    def code(self) -> Path:
        return self.root / "code"

    @property
    def outputs(self) -> Path:
        return self.root / "outputs"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def azureml(self) -> Path:
        """What only the Azure ML names know of the run; absent where nobody used them."""
        return self.root / "azureml"

    @property
    def metrics(self) -> Path:
        return self.outputs / "metrics"

    @property
    def checkpoints(self) -> Path:
        return self.outputs / "checkpoints"

    @property
    def launcher_log(self) -> Path:
        """What the launcher itself (mpirun) printed, raw: its own complaints, and ranks that died before they began."""
        return self.ranks / "launcher.log"

    @property
    def ranks(self) -> Path:
        return self.root / "ranks" if self.attempt is None else self.root / "attempts" / str(self.attempt)

    def count_ranks(self) -> int:
        """How many ranks have a folder: all of the attempt, or, in an elastic job, the workers that were started until now."""
        try:
            return sum(name.isdecimal() for name in os.listdir(self.ranks))
        except FileNotFoundError:
            return 0

    @property
    def world(self) -> Path:
        """Which workers of an elastic job train together now."""
        return self.ranks / "world.json"

    @property
    def attempt_status(self) -> Path:
        """How one attempt ended; the run's own status is that of the last."""
        return self.root / "attempts" / str(self.attempt or 0) / "status.json"

    @property
    def staging(self) -> Path:
        """Where this attempt makes the files of its checkpoints, before they are moved to their place."""
        return staging_folder(self.checkpoints, self.attempt or 0)

    @property
    def room(self) -> Path:
        """A file that only takes up room, for what is recorded when the attempt is over: also on a disk that is full by then."""
        return self.ranks / "room"

    @property
    def over(self) -> Path:
        """There when the attempt is over. In no folder of the script's: it may remove what is in those."""
        return self.ranks / "over"

    @property
    def copy_record(self) -> Path:
        """In a copy of the run folder, on a host that does not see this one: what it came with."""
        return self.root / ".copy.json"

    def arriving(self, host: str) -> Path:
        """Where what a host wrote is put when it is brought back, before it is moved to its place."""
        return self.root / f".from-{host}"

    def is_of_one_host(self, path: Path) -> bool:
        """Whether a path of this folder is one that goes to no other host: ranks' folders, and what is still being written."""
        if path.parent == self.checkpoints:
            return path.name.startswith(".")
        return path in (self.root / "ranks", self.root / "attempts") or (path.parent == self.root and path.name.startswith("."))

    def within(self, name: str) -> Path:
        """The path of ``name`` in this folder. Raises WorkspaceError when it leads out of it: another host says the name."""
        path = Path(os.path.normpath(self.root / name))
        if not path.is_relative_to(self.root) or path == self.root:
            raise WorkspaceError(f"{name!r} is no file of {self.root}")
        return path

    def worker_staging(self, number: int) -> Path:
        """The same, of one worker of an elastic job."""
        return self.staging / f"worker-{number}"

    def newest_attempt(self) -> RunLayout:
        """This run with the number of its newest attempt; without one where ``ranks`` is no link, as in some copies."""
        link = self.root / "ranks"
        return RunLayout(self.root, int(os.path.basename(os.readlink(link)))) if link.is_symlink() else RunLayout(self.root)

    def rank(self, rank: int) -> RankLayout:
        return RankLayout(self.ranks / f"{rank:05d}")

    def metrics_file(self, rank: int, task: str = "") -> Path:
        """A rank's metrics; the name has role and index (``task``, as ``worker 0``) where ranks have roles."""
        parts = [f"rank-{rank:05d}", *task.split(), *(["attempt", str(self.attempt)] if self.attempt else [])]
        return self.metrics / f"{'-'.join(parts)}.jsonl"

    def metrics_files(self) -> dict[int, list[Path]]:
        """The metrics that are there: by rank, a file for each attempt that wrote some, the first one's first."""
        found: dict[int, list[tuple[int, Path]]] = {}
        for path in self.metrics.glob("rank-*.jsonl"):
            attempt = re.search(r"-attempt-(\d+)$", path.stem)
            found.setdefault(int(path.stem.split("-")[1]), []).append((int(attempt[1]) if attempt else 0, path))
        return {rank: [path for _, path in sorted(files)] for rank, files in sorted(found.items())}

    def make_folders(self, size: int) -> None:
        """Make the folders of a run of ``size`` ranks and the links by which a script's ./outputs and ./logs lead here."""
        for folder in (self.code, self.metrics, self.checkpoints, self.logs):
            folder.mkdir(parents=True, exist_ok=True)
        for name in ("outputs", "logs"):
            link = self.code / name
            if not link.is_symlink():
                link.symlink_to(Path("..") / name)
        self.begin_attempt(0, size)

    def settle(self) -> None:
        """Make durable what the run began with, written without that: its ranks start meanwhile. What cannot be is left."""
        for path in (self.spec, self.status):
            with contextlib.suppress(OSError), open(path, "rb") as file:
                os.fsync(file.fileno())
        with contextlib.suppress(OSError):
            fsync_folder(self.root)

    def begin_attempt(self, number: int, size: int) -> RunLayout:
        """Make the folders of an attempt of ``size`` ranks, lead ``ranks`` to them, and return this run with its number."""
        begun = RunLayout(self.root, number)
        for folder in (begun.staging, begun.ranks, *(begun.rank(rank).root for rank in range(size))):
            folder.mkdir(parents=True, exist_ok=True)
        link = self.root / f".ranks-{number}"
        link.unlink(missing_ok=True)
        link.symlink_to(begun.ranks.relative_to(self.root))
        os.replace(link, self.root / "ranks")
        return begun

    def end_attempt(self) -> None:
        """Let nothing more of this attempt be saved: not by a rank either that could not be ended, say on a lost host. Files come
        to their place only from :attr:`staging`, which is gone from here on. Such a rank ends when it sees :attr:`over`."""
        _take_away(self.staging, self.checkpoints / f".ended-{self.attempt or 0}")
        self.room.unlink(missing_ok=True)
        self.over.touch()

    def end_worker(self, number: int) -> None:
        """The same for one worker of an elastic job, which the others go on without."""
        _take_away(self.worker_staging(number), self.staging / f".ended-{number}")


def _take_away(folder: Path, closed: Path) -> None:
    """Remove a folder, at one instant for all who write there; one that is gone already stays so."""
    with contextlib.suppress(FileNotFoundError):
        os.replace(folder, closed)
        shutil.rmtree(closed, ignore_errors=True)


@dataclass(frozen=True)
class Workspace:
    """The folder that holds runs and the registry."""

    root: Path

    @property
    def registry(self) -> Path:
        return self.root / "registry"

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    @property
    def environments(self) -> Path:
        """Virtual environments with packages that jobs asked for by Azure ML's names."""
        return self.root / "environments"

    @property
    def azureml(self) -> Path:
        """What only the Azure ML names know of the workspace: its name, compute targets, datastores, environments."""
        return self.root / "azureml"

    def create_run(self, experiment: str) -> RunLayout:
        """Make a new, empty run folder. Raises UsageError for a bad name, WorkspaceError when it cannot be written."""
        check_name("experiment", experiment)
        while True:
            stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
            run = RunLayout((self.runs / f"{experiment}-{stamp}-{os.urandom(2).hex()}").absolute())
            try:
                self.runs.mkdir(parents=True, exist_ok=True)
                run.root.mkdir()
            except FileExistsError as error:
                if self.runs.is_dir():
                    continue
                raise WorkspaceError(f"workspace {self.root} cannot be used: {error.filename} is not a folder") from error
            except OSError as error:
                advice = "choose another with --workspace or DTRAIN_WORKSPACE"
                raise WorkspaceError(f"workspace {self.root} cannot be written: {error.strerror}; {advice}") from error
            return run

    def list_runs(self) -> list[RunLayout]:
        """All run folders, oldest first (by the time in their names, then by their folder's time)."""
        if not self.runs.is_dir():
            return []
        found = [RunLayout(path.absolute()) for path in self.runs.iterdir() if (path / "spec.json").is_file()]
        return sorted(found, key=lambda run: (_STAMP_PATTERN.findall(run.id)[-1:], run.spec.stat().st_mtime_ns))

    def find_run(self, reference: str) -> RunLayout:
        """The run that ``reference`` means: a run id, a unique beginning of one, ``latest``, or the path of a run folder."""
        if "/" in reference:
            if (run := RunLayout(Path(reference).absolute())).spec.is_file():
                return run
            raise WorkspaceError(f"{reference} is not a run folder (it has no {run.spec.name})")
        runs = self.list_runs()
        if not runs:
            raise WorkspaceError(f"no run in workspace {self.root}; `dtrain run` makes one, and --workspace chooses another")
        if reference == "latest":
            return runs[-1]
        matches = [run for run in runs if run.id == reference] or [run for run in runs if run.id.startswith(reference)]
        if len(matches) == 1:
            return matches[0]
        some = ", ".join(run.id for run in (matches or runs)[-5:])
        if matches:
            raise WorkspaceError(f"run {reference!r} is not unique: {len(matches)} runs begin so, the newest are {some}")
        raise WorkspaceError(f"no run {reference!r} in workspace {self.root}; the newest are {some}")
