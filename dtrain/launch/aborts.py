"""A rank that called MPI_Abort: MPI prints that it did, and then ends it like any other, or kills it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from dtrain.layout import RunLayout
from dtrain.status import RankFailure

# Open MPI 4 and 5 have mpirun say it, of a rank of the communicator, which is the job's as a rule.
_MPIRUN_SAYS = re.compile(
    r"MPI_ABORT was invoked on rank (\d+) in communicator MPI_COMM_WORLD\s.*?errorcode:? (-?\d+)", re.S | re.I
)
# MPICH lets the rank itself.
_RANK_SAYS = re.compile(r"application called MPI_Abort\([^\n]*, (-?\d+)\) - process \d+")
_TAIL_BYTES = 10_000


def name_abort(failure: RankFailure, run: RunLayout, mpirun_said: Sequence[str]) -> RankFailure:
    """The failure of a rank that left with a code or was killed; as its call of MPI_Abort, where its MPI said that it was one."""
    if failure.kind not in ("exit", "signal"):
        return failure
    codes = [int(code) for rank, code in _MPIRUN_SAYS.findall("\n".join(mpirun_said)) if int(rank) == failure.rank]
    codes += map(int, _RANK_SAYS.findall(_tail(run, failure.rank)))
    if not codes:
        return failure
    # The operating system keeps eight bits; and a job that was aborted has not succeeded.
    return dataclasses.replace(failure, kind="exit", exit_code=codes[0] & 0xFF or 1, message=f"called MPI_Abort({codes[0]})")


def _tail(run: RunLayout, rank: int) -> str:
    try:
        with open(run.rank(rank).output_log, "rb") as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL_BYTES))
            return file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
