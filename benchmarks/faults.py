"""What becomes of a job on two hosts when something goes wrong, under `dtrain run` and started by hand: docs/faults.md.

``python benchmarks/faults.py LAUNCHER [--only WORDS] [--side SIDE] [--json FILE]``, as root: the hosts are namespaces of this
machine (tests/testbed). Each fault strikes a job that is at work. It prints a table of Markdown: the seconds from the fault to
the job's end, its exit code, what was said, and the processes left behind. What FILE holds stays, but for what is measured anew.
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
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parent))
from fault_jobs import HOSTS, ROOT, SLURM, Fault, HorovodJob, Job, MpiJob, ParameterServerJob, SlurmJob

LIMIT_S = {"plain": 30.0, "dtrain": 90.0}
"""After which a job is taken to hang, or to go on."""
JOBS: dict[str, type[Job]] = {job.launcher: job for job in (MpiJob, HorovodJob, ParameterServerJob, SlurmJob)}


@dataclass(frozen=True)
class Result:
    fault: str
    launcher: str
    side: str
    seconds: float | None
    """From the fault to the job's end; None when it did not end."""
    exit_code: int | None
    said: str
    left: int
    """Processes that were there 15 s after the job's end, with the network back."""
    gone_s: float | None = None
    """When the last one was gone."""
    back_s: float | None = None
    """When the victim was at work again. It was then told to end, with all others."""
    went_on: bool = False
    """The rest still worked at the end of the time, and was then told to end."""


def strike(job: Job) -> None:
    (job.folder / "strike").touch()


def go(job: Job) -> None:
    (job.folder / "go").touch()


def kill(job: Job) -> None:
    job.victim()[-1].kill()


def kill_guard(job: Job) -> None:
    for process in job.victim():
        process.kill()


def kill_parent(job: Job) -> None:
    job.victim()[0].parent().kill()


def stop(job: Job) -> None:
    for process in job.victim():
        process.send_signal(signal.SIGSTOP)


def cut(job: Job) -> None:
    subprocess.run([HOSTS, "cut", job.node()], check=True)


def blip(job: Job) -> None:
    node = job.node()
    subprocess.run([HOSTS, "cut", node], check=True)
    time.sleep(8)
    subprocess.run([HOSTS, "heal", node], check=True)
    go(job)


def kill_dtrain(job: Job) -> None:
    job.dtrain().kill()


def leave_and_come_back(job: SlurmJob) -> None:
    kill_dtrain(job)
    job.process.wait()
    job.come_back()
    time.sleep(3)
    go(job)


def on_a_process(of: str, victim: str = "1") -> list[Fault]:
    """What may happen to one process."""
    return [
        Fault(f"Python exception in {of}", strike, "raise", victim),
        Fault(f"`os._exit(3)` in {of}", strike, "3", victim),
        Fault(f"kill -9 of {of}'s script", kill, victim=victim),
        Fault(f"kill -9 of {of} and its guard", kill_guard, victim=victim),
        Fault(f"SIGSTOP of {of}", stop, victim=victim),
    ]


EARLY = Fault("a rank leaves early with 0", strike, "0", options=("--hang-timeout", "10"))
BY_MPIRUN = [
    *on_a_process("a rank"),
    Fault("kill -9 of the remote daemon", kill_parent),
    Fault("kill -9 of mpirun", lambda job: job.starter().kill()),
    Fault("kill -9 of dtrain", kill_dtrain),
    Fault("link cut during allreduces", cut),
    Fault("link cut while computing", cut, "compute"),
    Fault("link cut for 8 s, then healed", blip),
    EARLY,
]
FAULTS: dict[str, list[Fault]] = {
    "mpi": BY_MPIRUN,
    "horovod": BY_MPIRUN,
    "parameter_server": [
        *on_a_process("a worker", "worker1"),
        *on_a_process("the server", "ps0"),
        *on_a_process("the chief", "chief0"),
        Fault("kill -9 of a worker's ssh connection", kill_parent, victim="worker1"),
        Fault("kill -9 of dtrain", kill_dtrain, victim="worker1"),
        Fault("link cut to a worker and the server", cut, victim="worker1"),
        Fault("link cut for 8 s, then healed", blip, victim="worker1"),
    ],
    "slurm": [
        *on_a_process("a rank"),
        Fault("kill -9 of a step's daemon (slurmstepd)", kill_parent),
        Fault("kill -9 of the job's dtrain", lambda job: job.supervisor().kill()),
        Fault("kill -9 of dtrain, `dtrain logs -f` after it", leave_and_come_back),
        Fault("scancel", lambda job: job.slurm("scancel", "--user=root")),
        Fault("link cut during allreduces", cut),
        Fault("link cut while computing", cut, "compute"),
        Fault("link cut for 8 s, then healed", blip),
        EARLY,
    ],
}


def measure(job_of: type[Job], title: str, python: str, side: str, fault: Fault) -> Result:
    folder = Path(tempfile.mkdtemp(dir=SHARED))
    job = job_of(folder, python, side, fault)
    began = time.time()
    fault.inflict(job)
    back_s, went_on = watch(job, began, LIMIT_S[side])
    code = job.process.poll()
    seconds = round(time.time() - began, 1) if code is not None else None
    job.heal()
    deadline = time.monotonic() + 15
    while (left := job.processes()) and code is not None and time.monotonic() < deadline:
        time.sleep(0.2)
    gone_s = round(time.time() - began, 1)
    for process in (*left, *([psutil.Process(job.process.pid)] if code is None else [])):
        with contextlib.suppress(psutil.Error):
            process.kill()
    job.process.wait()
    said = job.said() if side == "dtrain" else ""
    count = len(left) if code is not None else 0
    job.restore()
    shutil.rmtree(folder)
    return Result(fault.name, title, side, seconds, code, said, count, gone_s, back_s, went_on)


def watch(job: Job, began: float, limit_s: float) -> tuple[float | None, bool]:
    """Wait until the job ends; one that goes on is told to. Returns when the victim was back, and whether the rest went on."""
    back_s: float | None = None
    while job.process.poll() is None and time.time() - began < limit_s:
        if back_s is None and job.worked(job.fault.victim) > began:
            back_s = round(time.time() - began, 1)
            go(job)
        time.sleep(0.05)
    went_on = job.process.poll() is None and back_s is None and job.goes_on()
    if went_on:
        go(job)
        with contextlib.suppress(subprocess.TimeoutExpired):
            job.process.wait(10)
    return back_s, went_on


def table(faults: list[Fault], results: list[Result]) -> str:
    titles = list(dict.fromkeys(result.launcher for result in results))
    mpis = len(titles) > 1
    lines = [
        f"| fault | {'MPI | ' if mpis else ''}by hand | `dtrain run` | what dtrain says |",
        f"|---|---|---|---|{'---|' * mpis}",
    ]
    for fault in (fault.name for fault in faults):
        for title in titles:
            sides = {r.side: r for r in results if (r.fault, r.launcher) == (fault, title)}
            if sides:
                cells = [cell(sides[side]) if side in sides else "" for side in ("plain", "dtrain")]
                said = sides["dtrain"].said if "dtrain" in sides else ""
                lines.append(f"| {fault} | {f'{title} | ' if mpis else ''}{cells[0]} | {cells[1]} | {said} |")
    return "\n".join(lines)


def cell(result: Result) -> str:
    left = f"; {result.left} process{'es' * (result.left > 1)} left behind" if result.left else ""
    if result.seconds is None:
        return "goes on without it, and does not end" if result.went_on else "hangs"
    code = result.exit_code if (result.exit_code or 0) >= 0 else 128 - (result.exit_code or 0)
    if result.back_s is not None:
        return f"goes on, back after {result.back_s} s{f'; then {code}' if code else ''}{left}"
    if result.went_on:
        return f"goes on without it{f'; then {code}' if code else ''}{left}"
    if result.exit_code == -signal.SIGKILL and not left:  # what was killed is what ends the rest
        return f"all gone after {result.gone_s} s"
    return f"{code} after {result.seconds} s{left}"


def kept(file: Path | None) -> list[Result]:
    return [Result(**each) for each in json.loads(file.read_text())] if file is not None and file.exists() else []


def bring_up(hosts: int, pythons: list[str], slurm: bool) -> None:
    prefixes = {str(Path(python).absolute().parents[1]) for python in pythons} | {sys.base_prefix}
    subprocess.run([HOSTS, "up", str(hosts), str(SHARED), str(ROOT), *sorted(prefixes)], check=True)
    if slurm:
        subprocess.run([SLURM, "up", str(hosts)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("launcher", choices=FAULTS)
    parser.add_argument(
        "--mpich", metavar="PYTHON", help="for mpi: also this one, with MPICH's wheel, mpi4py and what dtrain needs"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--only", default="", metavar="WORDS", help="faults whose name holds these words")
    parser.add_argument("--side", choices=LIMIT_S, help="only this one: plain is by hand")
    args = parser.parse_args()
    job_of = JOBS[args.launcher]
    pythons = {"Open MPI" if args.launcher == "mpi" else args.launcher: sys.executable}
    if args.mpich:
        pythons["MPICH"] = args.mpich
    results = {(r.fault, r.launcher, r.side): r for r in kept(args.json)}
    try:
        bring_up(job_of.hosts, list(pythons.values()), args.launcher == "slurm")
        for fault in (fault for fault in FAULTS[args.launcher] if args.only in fault.name):
            for title, python in pythons.items():
                for side in (side for side in fault.sides if args.side in (None, side)):
                    result = measure(job_of, title, python, side, fault)
                    results[fault.name, title, side] = result
                    print(result, file=sys.stderr, flush=True)
                    if args.json:
                        args.json.write_text(json.dumps([asdict(each) for each in results.values()], indent=2) + "\n")
    finally:
        subprocess.run([HOSTS, "down"], check=False)
        shutil.rmtree(SHARED, ignore_errors=True)
    print(table(FAULTS[args.launcher], list(results.values())))


if __name__ == "__main__":
    SHARED = Path(tempfile.mkdtemp(prefix="dtrain-faults-"))
    os.environ["TESTBED"] = str(SHARED / "testbed")
    (SHARED / "testbed").mkdir()
    main()
