"""A rank's own view of its run: ``run = dtrain.init()``."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any

from dtrain import env
from dtrain._ending import Ending
from dtrain.checkpoint import Checkpointer
from dtrain.comm import create_communicator
from dtrain.comm.base import Communicator
from dtrain.comm.horovod_place import HorovodPlace
from dtrain.env import RankEnv
from dtrain.errors import DtrainError, UsageError, WorkspaceError
from dtrain.files import read_json, write_json
from dtrain.layout import RunLayout
from dtrain.metrics import MetricWriter, read_metrics
from dtrain.processes import ProcessRecord
from dtrain.progress import PROGRESS
from dtrain.snapshot import take_snapshot
from dtrain.spec import experiment_from
from dtrain.status import RunStatus, write_record

logger = logging.getLogger(__name__)

_current: Run | None = None

_RANK_0_SAVES = "checkpoints are saved by rank 0, where ranks come and go one by one"


def init(
    *, experiment: str | None = None, workspace: str | Path | None = None, comm: str = "auto", keep_checkpoints: int = 3
) -> Run:
    """Join the run that this process is a rank of, and return it; a second call returns the same Run, whatever it asks.

    Called by all ranks; blocks until all have. Works alike when ``dtrain run``, mpirun or nobody launched the process; unless
    ``dtrain run`` did, rank 0 makes the run folder, named by ``experiment`` (default: the script's name), in ``workspace``
    (default: ``$DTRAIN_WORKSPACE``, else ``./workspace``), and a failing rank aborts the others, which would else wait for it.
    ``comm`` is a key of :data:`dtrain.comm.COMMUNICATORS` or ``auto``.

    In a TensorFlow cluster (TF_CONFIG) tasks come and go one by one and exchange through TensorFlow: each is a world of its
    own to ``run.comm``, no call waits for another task, and nothing is averaged. ``run.rank``, ``size``, ``role`` and ``index``
    tell the tasks apart; each has its own metrics file; rank 0 (the chief, else worker 0) saves checkpoints and tags, the
    others may restore. A task that was started by hand makes a run folder for itself.

    The same holds for the workers of an elastic Horovod job (``dtrain run --launcher horovod --min-workers``): ``run.index`` is
    the worker's number in the order of their starts, and ``run.rank`` and ``run.size`` are Horovod's at each moment.

    Raises RankError (which rank this is cannot be told; mpirun and mpi4py are of different MPIs; horovodrun started an elastic
    job), MissingDependency (mpi4py), WorkspaceError (the folder cannot be written) and UsageError (a name that is not allowed),
    on every rank.
    """
    global _current
    if _current is not None:
        return _current
    rank_env = RankEnv.read()
    communicator = create_communicator(rank_env, comm)
    by_hand = rank_env.run_dir is None
    if by_hand and rank_env.task is not None:
        # Nobody tells the tasks of one cluster the name of a common folder.
        rank_env = dataclasses.replace(rank_env, rank=0, size=1, local_rank=0, local_size=1)
    answer: RunLayout | DtrainError | None = None
    if communicator.rank == 0:  # also each task of a cluster: of a folder that is there it only reads
        try:
            answer = _open_folder(rank_env, experiment, workspace)
        except DtrainError as error:
            answer = error
        except OSError as error:
            answer = WorkspaceError(f"the run folder cannot be written: {error}")
    answer = communicator.bcast_obj(answer)
    if isinstance(answer, DtrainError):
        raise answer
    assert isinstance(answer, RunLayout)
    _current = _join(rank_env, communicator, answer, keep_checkpoints)
    PROGRESS.begin()
    if by_hand:
        Ending(communicator, answer.rank(_current.rank)).watch()
    elif _current.rank == 0 and (experiment is not None or workspace is not None):
        logger.warning("experiment and workspace of dtrain.init() have no effect: `dtrain run` made this run, %s", _current.id)
    return _current


def _join(rank_env: RankEnv, communicator: Communicator, layout: RunLayout, keep_checkpoints: int) -> Run:
    """Open this rank's files; where one rank cannot (it does not see the folder, say), all raise its error."""
    run: Run | None = None
    failed: DtrainError | None = None
    try:
        run = Run(rank_env, communicator, layout, keep_checkpoints=keep_checkpoints)
        if rank_env.run_dir is None:
            write_record(layout.rank(run.rank).process, ProcessRecord.of(os.getpid()))
    except DtrainError as error:
        failed = error
    except OSError as error:
        failed = WorkspaceError(f"rank {communicator.rank} cannot use the run folder: {error}")
    failures = [error for error in communicator.allgather_obj(failed) if error is not None]
    if failures:
        raise failures[0]
    assert run is not None
    return run


def _open_folder(rank_env: RankEnv, experiment: str | None, workspace: str | Path | None) -> RunLayout:
    """Rank 0: the run's folder, made and described unless a launcher did so."""
    if rank_env.resume_from is not None and not RunLayout(rank_env.resume_from).spec.is_file():
        raise WorkspaceError(f"there is no run to resume in {rank_env.resume_from}; DTRAIN_RESUME is the path of a run folder")
    layout = rank_env.layout
    if layout is None:
        layout = env.workspace(workspace).create_run(experiment or experiment_from(_script()[0]))
    if not layout.spec.is_file():
        layout.make_folders(rank_env.size)
        _describe(layout, rank_env)
    return layout


def _script() -> tuple[str, bool]:
    """What was started: a script's path, or a module's name (then True); ``interactive`` without either."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is not None and spec.name != "__main__":
        return spec.name.removesuffix(".__main__"), True
    return getattr(main, "__file__", None) or "interactive", False


def _describe(layout: RunLayout, rank_env: RankEnv) -> None:
    """Write what a launcher writes before it starts: the source's copy, ``spec.json`` and a first ``status.json``."""
    target, is_module = _script()
    source = Path.cwd() if is_module else Path(target).absolute().parent
    if target != "interactive":
        try:
            take_snapshot(source, layout.code, excluded=layout.workspace.root)
        except UsageError as error:
            logger.warning("this run keeps no copy of its source: %s", error)
    spec = {
        "target": target,
        "is_module": is_module,
        "args": sys.argv[1:],
        "source": source,
        "workers": rank_env.size,
        "launcher": rank_env.vocabulary,
        "experiment": layout.id.rsplit("-", 2)[0],
        "resume_from": rank_env.resume_from,
    }
    write_json(layout.spec, spec)
    tasks = [str(rank_env.task)] if rank_env.task is not None else []
    write_record(layout.status, RunStatus(state="running", size=rank_env.size, started=time.time(), tasks=tasks))
    logger.info("run %s in %s", layout.id, layout.root)


class Run:
    """One rank's handle on its run. Made by :func:`init`."""

    def __init__(self, rank_env: RankEnv, communicator: Communicator, layout: RunLayout, *, keep_checkpoints: int) -> None:
        self.comm = communicator
        """The run's communicator; every method of it is collective."""
        self.layout = layout
        self.resume_from = RunLayout(rank_env.resume_from) if rank_env.resume_from is not None else None
        """The run whose checkpoint this one was asked to start from, or None."""
        self.checkpoints = Checkpointer(
            layout.checkpoints,
            communicator,
            keep=keep_checkpoints,
            resume_from=self.resume_from.checkpoints if self.resume_from is not None else None,
            attempt=rank_env.attempt,
            read_only=lambda: (
                ""
                if self._task is None or self.rank == 0
                else f"{_RANK_0_SAVES}, and this is {rank_env.name} (rank {self.rank}): ask `if run.rank == 0`"
            ),
        )
        """Saves and restores checkpoints; collective."""
        self._task = rank_env.task
        # Where ranks have no roles, the communicator's word about them holds; it has asked the library.
        self._place: RankEnv | Communicator | HorovodPlace = communicator if self._task is None else rank_env
        if rank_env.elastic:
            self._place = HorovodPlace(rank_env)
            self.checkpoints.stage_in(layout.worker_staging(rank_env.number))
        self.tags: MutableMapping[str, str] = Tags(layout.tags, writes=lambda: self.rank == 0)
        """The run's tags; what rank 0 sets is kept."""
        # The number of this rank's folder and metrics; in an elastic job ranks change.
        self._number = rank_env.number if rank_env.elastic else self.rank
        self._metrics = MetricWriter(layout.metrics_file(self._number, str(self._task or "")))
        self._counts: dict[str, int] = {}

    @property
    def id(self) -> str:
        return self.layout.id

    @property
    def rank(self) -> int:
        """This process's rank in the job, 0 to ``size - 1``."""
        return self._place.rank

    @property
    def size(self) -> int:
        """How many ranks the job has; of a cluster, tasks of all roles. ``run.comm.size`` is how many of them exchange."""
        return self._place.size

    @property
    def role(self) -> str:
        """``chief``, ``master``, ``worker``, ``ps`` or ``evaluator`` in a TensorFlow cluster, else ``rank``."""
        return self._task.role if self._task is not None else "rank"

    @property
    def index(self) -> int:
        """This process's number among those of its role; of ranks without roles, the rank. Elastic workers count their starts."""
        return self._task.index if self._task is not None else self.rank

    @property
    def local_rank(self) -> int:
        """This process's rank among those on its host."""
        return self._place.local_rank

    @property
    def local_size(self) -> int:
        return self._place.local_size

    @property
    def outputs(self) -> Path:
        """The folder of what the run produces, shared by all ranks; a registry takes models from here."""
        return self.layout.outputs

    @property
    def logs(self) -> Path:
        """The folder of logs of the script's own (TensorBoard events), shared by all ranks."""
        return self.layout.logs

    @property
    def elastic(self) -> bool:
        """Whether this is an elastic Horovod job, in which workers come and go."""
        return isinstance(self._place, HorovodPlace)

    def is_done(self, rank: int = 0) -> bool:
        """Whether that rank has ended its script without an error, in this attempt."""
        return self.layout.rank(rank).done.is_file()

    def log(self, name: str, value: Any, step: int | None = None) -> None:
        """Record one metric of this rank; any rank, at any time; takes microseconds and waits for nobody.

        ``step`` None counts the values of this name: 0, 1, 2... Raises UsageError for what is no number, WorkspaceError when
        it cannot be written.
        """
        if step is None:
            if name not in self._counts:
                self._counts[name] = self._next_step(name)
            step = self._counts[name]
            self._counts[name] = step + 1
        self._log(step, {name: value})

    def _next_step(self, name: str) -> int:
        """After the values that earlier attempts of this run have counted."""
        if not self.layout.attempt:
            return 0
        rows = read_metrics(self.layout).rows.get(self._number, [])
        return max((row["step"] + 1 for row in rows if name in row), default=0)

    def log_row(self, step: int, **values: Any) -> None:
        """Record several metrics of one step of this rank; as :meth:`log`. Names may hold any characters: ``**{"a/b": 1}``."""
        self._log(step, values)

    def _log(self, step: int, values: dict[str, Any]) -> None:
        self._metrics.write(step, values)
        PROGRESS.mark()


class Tags(MutableMapping[str, str]):
    """Words about a run, kept in its folder by rank 0; other ranks see what they set themselves."""

    def __init__(self, path: Path, *, writes: Callable[[], bool]) -> None:
        self._path, self._writes = path, writes
        try:
            self._tags: dict[str, str] = read_json(path)
        except FileNotFoundError:
            self._tags = {}

    def __getitem__(self, key: str) -> str:
        return self._tags[key]

    def __setitem__(self, key: str, value: str) -> None:
        self._tags[str(key)] = str(value)
        self._write()

    def __delitem__(self, key: str) -> None:
        del self._tags[key]
        self._write()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tags)

    def __len__(self) -> int:
        return len(self._tags)

    def __repr__(self) -> str:
        return repr(self._tags)

    def _write(self) -> None:
        if self._writes():
            write_json(self._path, self._tags)
