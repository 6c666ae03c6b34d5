"""A rank of bench_launch.py: joins the others in one allreduce, and ends; or prints lines at a pace."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path


def rank() -> int:
    return int(os.environ["OMPI_COMM_WORLD_RANK"])


def join(folder: Path) -> None:
    """Note when the script's first and last lines are executed, to see the launcher's part before and after."""
    first = time.time()
    import numpy as np
    from mpi4py import MPI

    ones = np.ones(4)
    MPI.COMM_WORLD.Allreduce(MPI.IN_PLACE, ones)
    assert ones[0] == MPI.COMM_WORLD.size
    note(folder, first=first, last=time.time())


def talk(folder: Path, lines_per_s: int, seconds: int, to_file: bool) -> None:
    """Print numbered lines, each by a write of its own, at a pace; late ones at once; ``to_file``: to the rank's own."""
    if to_file:
        descriptor = os.open(folder / f"output-{rank()}.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        os.dup2(descriptor, 1)
        sys.stdout.reconfigure(line_buffering=True)
    number, first = 0, time.time()
    while number < lines_per_s * seconds:
        due = min(int((time.time() - first) * lines_per_s) + 1, lines_per_s * seconds)
        for number in range(number, due):  # noqa: B020 -- goes on where it was
            print(f"rank {rank()} line {number:07d} loss 0.123456 accuracy 0.654321 of a step as long as a line of a log is")
        number = due
        time.sleep(0.001)
    note(folder, first=first, last=time.time(), cpu_s=sum(os.times()[:2]))


def note(folder: Path, **values: float) -> None:
    (folder / f"rank-{rank()}.json").write_text(json.dumps(values))


if __name__ == "__main__":
    where = Path(sys.argv[2])
    if sys.argv[1] == "join":
        join(where)
    else:
        talk(where, int(sys.argv[3]), int(sys.argv[4]), to_file=sys.argv[5] == "file")
