"""The options of launcher ``slurm``, checked on construction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from dtrain.errors import UsageError, did_you_mean

# How ranks are started within an allocation: by srun, which speaks PMIx or PMI2 with the ranks' MPI, or by MPI's own mpirun.
SlurmStart = Literal["auto", "pmix", "pmi2", "mpirun"]

# Options of sbatch that are dtrain's own to give, and what stands for them.
_OWN_SBATCH = {
    **dict.fromkeys(("-N", "--nodes"), "--nodes"),
    **dict.fromkeys(("-n", "--ntasks"), "-n"),
    "--ntasks-per-node": "--tasks-per-node",
    **dict.fromkeys(
        ("-a", "--array", "-W", "--wait", "--wrap", "--parsable", "-D", "--chdir", "-o", "--output", "-e", "--error"), ""
    ),
}


@dataclass(frozen=True, kw_only=True)
class SlurmOptions:
    """The options of launcher ``slurm``, beside the number of ranks. ``sbatch_args`` go to sbatch as they are.

    Raises UsageError for what cannot be.
    """

    nodes: int | None = None
    tasks_per_node: int | None = None
    sbatch_args: tuple[str, ...] = ()
    start: SlurmStart = "auto"

    def __post_init__(self) -> None:
        for name, value in (("--nodes", self.nodes), ("--tasks-per-node", self.tasks_per_node)):
            if value is not None and value < 1:
                raise UsageError(f"{name} {value} is not a number from 1")
        starts = get_args(SlurmStart)
        if self.start not in starts:
            raise UsageError(
                f"unknown --slurm-start {self.start!r}{did_you_mean(self.start, starts)}; there are {', '.join(starts)}"
            )
        for text in self.sbatch_args:
            name = text.partition("=")[0]
            if not name.startswith("-"):
                raise UsageError(f"--sbatch-arg {text!r} is no option of sbatch; write it in one, as --sbatch-arg=--time=10:00")
            if name in _OWN_SBATCH:
                use = f"use {_OWN_SBATCH[name]}" if _OWN_SBATCH[name] else "dtrain needs it itself, or cannot go with it"
                raise UsageError(f"--sbatch-arg {text} cannot be given: {use}")

    def ranks(self, asked: int | None, allocated: int | None) -> int:
        """How many ranks: ``asked`` (``-n``), else what these options say, else those of the allocation, else one."""
        if self.tasks_per_node is None:
            ranks = asked or self.nodes or allocated or 1
            if self.nodes is not None and ranks < self.nodes:
                raise UsageError(f"-n {ranks} on --nodes {self.nodes} leaves nodes without a rank; lower --nodes, or raise -n")
            return ranks
        if self.nodes is None and asked is not None and asked % self.tasks_per_node:
            raise UsageError(f"-n {asked} is no multiple of --tasks-per-node {self.tasks_per_node}; change one of them")
        if self.nodes is None:
            return asked or self.tasks_per_node
        ranks = self.nodes * self.tasks_per_node
        if asked not in (None, ranks):
            raise UsageError(
                f"-n {asked} contradicts --nodes {self.nodes} x --tasks-per-node {self.tasks_per_node} = {ranks}; leave -n out"
            )
        return ranks
