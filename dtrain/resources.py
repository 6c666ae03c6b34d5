"""The variables by which a rank, and the libraries in it, learn what they may use of its host: threads, cores, a GPU, memory."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping, Sequence

from dtrain.binding import BINDS, Bind, HostTopology, RankBinding
from dtrain.errors import RankError

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")

_BIND = "DTRAIN_BIND"
_GPUS = "CUDA_VISIBLE_DEVICES"
_THREADS = "DTRAIN_THREADS"
_GIVEN_BY_SLURM = "SLURM_CPUS_ON_NODE"

# glibc's malloc gives large arrays back to the kernel when they are freed, and takes them anew, page by page, in the next step.
# Two ranks with 100 MB of gradients made 8.3 steps/s instead of 6.5 when it asks for huge pages and keeps what it has, and
# needed 6 % more memory (bench_tensorflow.py). Other C libraries, and a glibc before 2.35, heed it in part or not at all.
_MALLOC = "GLIBC_TUNABLES"
_KEEP_PAGES = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=1073741824"

OWN_VARIABLES = (_BIND, _THREADS)
"""Those that are said to one job's ranks, and to nobody else."""


def thread_variables(cores: int, local_ranks: int, environ: Mapping[str, str]) -> dict[str, str]:
    """Thread counts that share the host's ``cores`` among its ranks; what the user set stays.

    Left alone, every rank starts a thread a core: two ranks on two cores then need 27 ms instead of 14 for a step of a
    small MLP.
    """
    return thread_variables_by_rank([max(1, cores // local_ranks)], environ, THREAD_VARIABLES)


def thread_variables_by_rank(threads: Sequence[int], environ: Mapping[str, str], names: Sequence[str]) -> dict[str, str]:
    """The same for ranks that all get one environment, as mpirun gives it; ``threads`` has a number for each rank."""
    free = [name for name in names if name not in environ]
    if len(set(threads)) == 1 or not free:
        return {name: str(threads[0]) for name in free}
    return {_THREADS: f"{','.join(free)}={','.join(map(str, threads))}"}


def share_variables(
    bind: Bind, threads: Sequence[int], environ: Mapping[str, str], names: Sequence[str] = THREAD_VARIABLES
) -> dict[str, str]:
    """What ranks are told of their share, as planned: :func:`thread_variables_by_rank`, memory, and how to bind.

    A bound rank's guard knows its cores better, and says :data:`THREAD_VARIABLES` itself.
    """
    planned = [name for name in names if bind == "none" or name not in THREAD_VARIABLES]
    own = {**thread_variables_by_rank(threads, environ, planned), **memory_variables(environ)}
    return {**own, **({} if bind == "none" else {_BIND: bind})}


def memory_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """How a rank's malloc is to keep memory; what the user set stays."""
    return {} if _MALLOC in environ else {_MALLOC: _KEEP_PAGES}


def own_threads(rank: int, environ: MutableMapping[str, str]) -> None:
    """In a rank, before its script: take its numbers out of what :func:`thread_variables_by_rank` made."""
    names, equals, threads = environ.get(_THREADS, "").partition("=")
    for name in names.split(",") if equals else []:
        environ.setdefault(name, threads.split(",")[rank])


def wanted_binding(environ: Mapping[str, str] | None = None) -> Bind:
    """In a rank: what :func:`share_variables` said. Raises RankError for a word that it does not say."""
    environ = os.environ if environ is None else environ
    found = next((bind for bind in BINDS if bind == environ.get(_BIND, "none")), None)
    if found is None:
        raise RankError(f"{_BIND}={environ[_BIND]} is none of {', '.join(BINDS)}")
    return found


def own_topology(*, by_slurm: bool, environ: Mapping[str, str] | None = None) -> HostTopology:
    """In a rank: what it and the others of its host may use. ``by_slurm``: where that is for Slurm to say.

    Raises RankError where Slurm gave the job fewer processors than its ranks may use: it does not say which they are.
    """
    environ, found = os.environ if environ is None else environ, HostTopology.read()
    given, usable = int(environ.get(_GIVEN_BY_SLURM, "0")), found.processors
    if by_slurm and 0 < given < usable:
        raise RankError(
            f"--bind: Slurm gave the job {given} of the {usable} processors that its ranks may use on this node, and does not "
            "keep them to these (TaskPlugin=task/none); ask for whole nodes (--sbatch-arg=--exclusive), or leave out --bind"
        )
    return found


def chooses_gpus(environ: Mapping[str, str]) -> bool:
    """Whether the user said which GPUs the ranks see."""
    return _GPUS in environ


def bound_variables(binding: RankBinding, environ: Mapping[str, str]) -> dict[str, str]:
    """What a bound rank's libraries have to know: how many threads, and which GPU; what the user set stays."""
    gpu = {} if binding.gpu is None or chooses_gpus(environ) else {_GPUS: str(binding.gpu)}
    return {**thread_variables(binding.threads, 1, environ), **gpu}
