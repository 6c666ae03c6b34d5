"""What becomes of a job on two hosts when something goes wrong, under `dtrain run` and under mpirun alone: docs/faults.md.

``python benchmarks/faults.py [--mpich PYTHON] [--json FILE] [--only WORDS]``, as root: the hosts are namespaces of this machine
(tests/testbed/hosts.sh). Each fault strikes a job of one rank a host, at work in a loop of allreduces or computing. It prints
a table of Markdown: the seconds from the fault to the job's end, its exit code, what was said, and the processes left behind.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
HOSTS = ROOT / "tests" / "testbed" / "hosts.sh"
MARK = "DTRAIN_FAULTS"
WORK = """
import os, sys, time
from mpi4py import MPI
import numpy as np
comm, folder, mode = MPI.COMM_WORLD, sys.argv[1], sys.argv[2]
def allreduce():
    comm.Allreduce(MPI.IN_PLACE, np.ones(1000))
allreduce()
open(f"{folder}/works-{comm.rank}", "w").close()
def told_to_end():
    told = os.path.exists(f"{folder}/go")
    return told if mode == "compute" else comm.bcast(told)
while not told_to_end():
    time.sleep(0.05)
    if os.path.exists(f"{folder}/strike") and comm.rank == comm.size - 1:
        if mode == "raise":
            raise ValueError("bad batch")
        if mode.isdigit():
            os._exit(int(mode))
    if mode != "compute":
        allreduce()
"""


@dataclass(frozen=True)
class Result:
    fault: str
    launcher: str
    side: str
    seconds: float | None
    exit_code: int | None
    said: str
    left: int
    """Processes that were there 15 s after the job's end, with the network back."""
    gone_s: float | None = None
    """When the last one was gone."""


class Job:
    """One job at work on node1 and node2; the second rank is on node2."""

    def __init__(self, folder: Path, python: str, side: str, mode: str, options: list[str]) -> None:
        self.folder, self.mark = folder, str(folder)
        (folder / "work.py").write_text(WORK)
        bin_folder = Path(python).parent
        if side == "dtrain":
            argv = [python, "-m", "dtrain.cli", "run", "-H", "node1,node2", *options]
        elif (bin_folder / "prted").exists():
            flags = "--allow-run-as-root --bind-to none --map-by slot:OVERSUBSCRIBE --host node1,node2"
            argv = [str(bin_folder / "mpirun"), *flags.split(), "-x", MARK, "-n", "2", python]
        else:
            argv = [str(bin_folder / "mpirun"), "-bind-to", "none", "-hosts", "node1,node2", "-n", "2", python]
        path = f"{bin_folder}:{os.environ['PATH']}"
        environ = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), MARK: self.mark, "TMPDIR": "/tmp"}
        self.log = open(folder / "said", "w+")  # noqa: SIM115 -- until the end
        self.process = subprocess.Popen(
            [HOSTS, "exec", "node1", "env", "-C", folder, *argv, "work.py", folder, mode],
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
        )
        deadline = time.monotonic() + 60
        while not all((folder / f"works-{rank}").exists() for rank in (0, 1)):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the job did not begin: {(folder / 'said').read_text()}")
            time.sleep(0.05)
        time.sleep(2)

    def processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def ranks(self) -> list[psutil.Process]:
        """The processes of the second rank, the one first that the others descend from."""
        marks = {"OMPI_COMM_WORLD_RANK": "1", "PMI_RANK": "1"}
        found = [p for p in self.processes() if any(p.environ().get(k) == v for k, v in marks.items())]
        return sorted(found, key=lambda p: p.parent() in found)

    def mpirun(self) -> psutil.Process:
        own = psutil.Process(self.process.pid)
        return next(p for p in (own, *own.children(recursive=True)) if p.name() in ("prterun", "mpirun", "mpiexec.hydra"))

    def dtrain(self) -> psutil.Process:
        own = psutil.Process(self.process.pid)  # the testbed's command holds dtrain's
        return next(p for p in own.children(recursive=True) if "dtrain.cli" in p.cmdline())

    def said(self) -> str:
        lines = (self.folder / "said").read_text().splitlines()
        ours = [line.removeprefix("dtrain: ") for line in lines if line.startswith("dtrain: ")]
        told = [line for line in ours if not line.startswith(("run ", "its whole output"))]
        return next((line for line in told if line.startswith("first to fail was ")), (told or [""])[-1])


def strike(job: Job) -> None:
    (job.folder / "strike").touch()


def stop(job: Job) -> None:
    for process in job.ranks():
        process.send_signal(signal.SIGSTOP)


def cut(job: Job) -> None:
    subprocess.run([HOSTS, "cut", "node2"], check=True)


def blip(job: Job) -> None:
    cut(job)
    time.sleep(8)
    subprocess.run([HOSTS, "heal", "node2"], check=True)
    (job.folder / "go").touch()


def kill_guard(job: Job) -> None:
    for process in job.ranks():
        process.kill()


# name → what the script does, what is done to the job, and options of `dtrain run` that it takes to be found
FAULTS: dict[str, tuple[str, Callable[[Job], None], list[str]]] = {
    "Python exception in a rank": ("raise", strike, []),
    "`os._exit(3)` in a rank": ("3", strike, []),
    "kill -9 of a rank's script": ("exchange", lambda job: job.ranks()[-1].kill(), []),
    "kill -9 of a rank and its guard": ("exchange", kill_guard, []),
    "kill -9 of the remote daemon": ("exchange", lambda job: job.ranks()[0].parent().kill(), []),
    "kill -9 of mpirun": ("exchange", lambda job: job.mpirun().kill(), []),
    "kill -9 of dtrain": ("exchange", lambda job: job.dtrain().kill(), []),
    "SIGSTOP of a rank": ("exchange", stop, []),
    "link cut during allreduces": ("exchange", cut, []),
    "link cut while computing": ("compute", cut, []),
    "link cut for 8 s, then healed": ("exchange", blip, []),
    "a rank leaves early with 0": ("0", strike, ["--hang-timeout", "10"]),
}


def measure(fault: str, family: str, python: str, side: str, limit_s: float) -> Result:
    mode, inflict, options = FAULTS[fault]
    folder = Path(tempfile.mkdtemp(dir=SHARED))
    job = Job(folder, python, side, mode, options)
    began = time.monotonic()
    inflict(job)
    seconds: float | None = None
    with contextlib.suppress(subprocess.TimeoutExpired):
        job.process.wait(limit_s)
        seconds = round(time.monotonic() - began, 1)
    code = job.process.poll()
    subprocess.run([HOSTS, "heal", "node2"], check=True)
    deadline = time.monotonic() + 15
    while (left := job.processes()) and code is not None and time.monotonic() < deadline:
        time.sleep(0.2)
    gone = round(time.monotonic() - began, 1)
    for process in (*left, *([psutil.Process(job.process.pid)] if code is None else [])):
        with contextlib.suppress(psutil.Error):
            process.kill()
    job.process.wait()
    job.log.close()
    result = Result(
        fault, family, side, seconds, code, job.said() if side == "dtrain" else "", len(left) if code is not None else 0, gone
    )
    shutil.rmtree(folder)
    return result


def table(results: list[Result]) -> str:
    lines = ["| fault | launcher | mpirun alone | `dtrain run` | what dtrain says |", "|---|---|---|---|---|"]
    for fault in FAULTS:
        for family in dict.fromkeys(result.launcher for result in results):
            sides = {r.side: r for r in results if (r.fault, r.launcher) == (fault, family)}
            if sides:
                cells = [cell(sides[side]) if side in sides else "" for side in ("plain", "dtrain")]
                said = sides["dtrain"].said if "dtrain" in sides else ""
                lines.append(f"| {fault} | {family} | {cells[0]} | {cells[1]} | {said} |")
    return "\n".join(lines)


def cell(result: Result) -> str:
    if result.seconds is None:
        return "hangs"
    code = result.exit_code if (result.exit_code or 0) >= 0 else 128 - (result.exit_code or 0)
    left = f"; {result.left} process{'es' * (result.left > 1)} left behind" if result.left else ""
    if result.exit_code == -signal.SIGKILL and not left:  # what was killed is what ends the rest
        return f"all gone after {result.gone_s} s"
    return f"{code} after {result.seconds} s{left}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mpich", metavar="PYTHON", help="a Python with MPICH's wheel, mpi4py and dtrain's dependencies")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--only", default="", metavar="WORDS", help="faults whose name holds these words")
    parser.add_argument("--limit", type=float, default=40.0, metavar="S", help="after which mpirun alone is taken to hang")
    args = parser.parse_args()
    pythons = {"Open MPI": sys.executable, **({"MPICH": args.mpich} if args.mpich else {})}
    prefixes = {str(Path(python).absolute().parents[1]) for python in pythons.values()} | {sys.base_prefix}
    results = []
    try:
        subprocess.run([HOSTS, "up", "2", str(SHARED), str(ROOT), *sorted(prefixes)], check=True)
        for fault in FAULTS:
            for family, python in pythons.items():
                for side in ("plain", "dtrain"):
                    if args.only not in fault or (side == "plain" and "dtrain" in fault):
                        continue
                    results.append(measure(fault, family, python, side, args.limit if side == "plain" else 120.0))
                    print(results[-1], file=sys.stderr, flush=True)
    finally:
        subprocess.run([HOSTS, "down"], check=False)
        shutil.rmtree(SHARED, ignore_errors=True)
        if args.json:
            args.json.write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")
    print(table(results))


if __name__ == "__main__":
    SHARED = Path(tempfile.mkdtemp(prefix="dtrain-faults-"))
    os.environ["TESTBED"] = str(SHARED / "testbed")
    (SHARED / "testbed").mkdir()
    main()
