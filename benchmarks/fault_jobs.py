"""The jobs that faults.py strikes: how each is started on hosts of the testbed, by `dtrain run` and by hand; what is struck."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
HOSTS = ROOT / "tests" / "testbed" / "hosts.sh"
SLURM = HOSTS.with_name("slurm.sh")
WORK = Path(__file__).with_name("fault_work.py")
MARK = "DTRAIN_FAULTS"
_BEGIN_S = 90.0


@dataclass(frozen=True)
class Fault:
    """What is done to a job. ``mode`` is what its script does, and ``victim`` who is struck (see fault_work.py); ``options`` are
    those of `dtrain run` that it takes to be found."""

    name: str
    inflict: Callable[[Job], None]
    mode: str = "exchange"
    victim: str = "1"
    options: tuple[str, ...] = ()

    @property
    def sides(self) -> tuple[str, ...]:
        return ("dtrain",) if "dtrain" in self.name else ("plain", "dtrain")  # by hand there is no dtrain to be killed


class Job:
    """One job on node1 and node2, made when all its processes are at work. Who is struck is on node2, but for a chief."""

    kind = "mpi"
    launcher = ""
    hosts = 2
    tasks: tuple[str, ...] = ("0", "1")
    options: tuple[str, ...] = ("-H", "node1,node2")
    """Those of `dtrain run`."""

    def __init__(self, folder: Path, python: str, side: str, fault: Fault) -> None:
        self.folder, self.python, self.fault = folder, python, fault
        self.bin = Path(python).parent
        shutil.copy(WORK, folder / "work.py")
        self.work = ["work.py", self.kind, str(folder), fault.mode, fault.victim]
        by_dtrain = [python, "-m", "dtrain.cli", "run", *self.options, *fault.options, *self.work]
        self.process = self.start(by_dtrain if side == "dtrain" else self.by_hand())
        deadline = time.monotonic() + _BEGIN_S
        while not all((folder / f"works-{task}").exists() for task in self.tasks):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the job did not begin: {(folder / 'said').read_text()}")
            time.sleep(0.05)
        time.sleep(2)

    def by_hand(self) -> list[str]:
        """The command that a user without dtrain would type on node1."""
        raise NotImplementedError

    def start(self, argv: list[str]) -> subprocess.Popen[bytes]:
        """Type a command on node1."""
        environ = {**os.environ, "PATH": f"{self.bin}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "TMPDIR": "/tmp"}
        with open(self.folder / "said", "a") as log:
            return subprocess.Popen(
                [HOSTS, "exec", "node1", "env", "-C", self.folder, *argv],
                env={**environ, MARK: str(self.folder), "TF_CPP_MIN_LOG_LEVEL": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                environ = process.environ()  # over ssh, dtrain hands the user's variables on by other ways
                marks = (environ.get(MARK, ""), environ.get("DTRAIN_RUN_DIR", ""))
                if any(mark.startswith(str(self.folder)) for mark in marks) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def task_of(self, environ: Mapping[str, str]) -> str | None:
        """The name of the task that a process belongs to, by its environment."""
        return environ.get("OMPI_COMM_WORLD_RANK", environ.get("PMI_RANK"))

    def victim(self) -> list[psutil.Process]:
        """The victim's processes: dtrain's guard, where there is one, and the script's; not who waits for the guard's end."""
        found = [process for process in self.processes() if self.task_of(process.environ()) == self.fault.victim]
        watched = [p for p in found if not (p.parent() in found and os.getsid(p.pid) == p.pid)]
        return sorted(watched, key=lambda p: p.parent() in found)

    def node(self) -> str:
        """The victim's host."""
        return "node2"

    def starter(self) -> psutil.Process:
        """The mpirun that started the ranks."""
        own = psutil.Process(self.process.pid)
        return next(p for p in (own, *own.children(recursive=True)) if p.name() in ("prterun", "mpirun", "mpiexec.hydra"))

    def dtrain(self) -> psutil.Process:
        own = psutil.Process(self.process.pid)  # the testbed's command holds dtrain's
        return next(p for p in own.children(recursive=True) if "dtrain.cli" in p.cmdline())

    def worked(self, task: str) -> float:
        """When (Unix seconds) the task last began to work."""
        return (self.folder / f"works-{task}").stat().st_mtime

    def goes_on(self) -> bool:
        """Whether the job still makes steps."""
        steps = self.folder / "steps"
        before = steps.read_text() if steps.exists() else ""
        time.sleep(2)
        return steps.exists() and steps.read_text() != before

    def said(self) -> str:
        """What dtrain said of the fault."""
        lines = (self.folder / "said").read_text().splitlines()
        ours = [line.removeprefix("dtrain: ") for line in lines if line.startswith("dtrain: ")]
        of_the_start = re.compile(r"run |its whole output|submitted as|Slurm job \d+ on|job \d+ waits")
        told = [line for line in ours if not of_the_start.match(line)]
        first = (line for line in told if line.startswith(("first to fail was ", "attempt 0 ")))
        return next(first, (told or [""])[-1])

    def heal(self) -> None:
        """Give every host its network back."""
        for node in range(self.hosts):
            subprocess.run([HOSTS, "heal", f"node{node + 1}"], check=True)

    def restore(self) -> None:
        """After the job: make the hosts as they were."""


class MpiJob(Job):
    launcher = "mpi"

    def by_hand(self) -> list[str]:
        if (self.bin / "prted").exists():
            flags = "--allow-run-as-root --bind-to none --map-by slot:OVERSUBSCRIBE --host node1,node2"
            return [str(self.bin / "mpirun"), *flags.split(), "-x", MARK, "-n", "2", self.python, *self.work]
        flags = "-bind-to none -hosts node1,node2 -n 2"
        return [str(self.bin / "mpirun"), *flags.split(), self.python, *self.work]


class HorovodJob(Job):
    kind = launcher = "horovod"
    options = ("--launcher", "horovod", "-H", "node1,node2")

    def by_hand(self) -> list[str]:
        binding = "--binding-args=--bind-to none --map-by slot:OVERSUBSCRIBE"  # without, it fails with Open MPI 5
        flags = ("-np", "2", "-H", "node1:1,node2:1", "--network-interfaces", "eth0", binding)
        return [str(self.bin / "horovodrun"), *flags, self.python, *self.work]


class ParameterServerJob(Job):
    kind = launcher = "parameter_server"
    tasks = ("chief0", "worker0", "worker1", "ps0")
    options = ("--launcher", "parameter_server", "--workers", "2", "--servers", "1", "--chief", "-H", "node1:2,node2:2")

    BY_HAND = """
    cluster='{"chief": ["node1:2222"], "worker": ["node1:2223", "node2:2223"], "ps": ["node2:2224"]}'
    config() { echo "{\\"cluster\\": $cluster, \\"task\\": {\\"type\\": \\"$1\\", \\"index\\": $2}}"; }
    on() {
        ssh "$1" "cd $PWD && exec env MARK=$MARK TF_CPP_MIN_LOG_LEVEL=1 TF_CONFIG='$(config $2 $3)' $WORK" &
    }
    on node2 ps 0
    on node1 worker 0
    on node2 worker 1
    TF_CONFIG=$(config chief 0) $WORK
    code=$?
    kill $(jobs -p)
    exit $code
    """

    def by_hand(self) -> list[str]:
        return ["env", f"WORK={self.python} {' '.join(self.work)}", "bash", "-c", self.BY_HAND.replace("MARK", MARK)]

    def task_of(self, environ: Mapping[str, str]) -> str | None:
        task = json.loads(environ.get("TF_CONFIG", "{}")).get("task", {})
        return f"{task['type']}{task['index']}" if task else None


class SlurmJob(Job):
    """Submitted from node1; a third node is free."""

    launcher = "slurm"
    hosts = 3
    options = ("--launcher", "slurm", "--nodes", "2", "--tasks-per-node", "1")

    # sbatch --wait asks ever more rarely; so the job's end is asked for here.
    BY_HAND = """
    step="srun --mpi=pmix env -u PMIX_SECURITY_MODE $WORK"
    job=$(sbatch --parsable --nodes=2 --ntasks-per-node=1 --output=said --open-mode=append --wrap="$step")
    while squeue --noheader --jobs=$job --format=%T | grep -q .; do sleep 0.2; done
    ended=$(scontrol show job $job | grep -oP ' ExitCode=\\K[0-9:]+')
    code=${ended%:*} signal=${ended#*:}
    exit $((signal ? 128 + signal : code))
    """

    def by_hand(self) -> list[str]:
        prefix = self.bin.parent  # of Open MPI's wheel, of which srun does not know
        own = (f"OPAL_PREFIX={prefix}", f"PMIX_PREFIX={prefix}", f"WORK={self.python} {' '.join(self.work)}")
        return ["env", *own, "bash", "-c", self.BY_HAND]

    def task_of(self, environ: Mapping[str, str]) -> str | None:
        return environ.get("SLURM_PROCID")

    def node(self) -> str:
        return self.victim()[0].environ()["SLURMD_NODENAME"]

    def supervisor(self) -> psutil.Process:
        """The dtrain within the job."""
        return next(process for process in self.processes() if "dtrain.launch.batch" in process.cmdline())

    def come_back(self) -> None:
        self.process = self.start([self.python, "-m", "dtrain.cli", "logs", "--follow", "latest"])

    def slurm(self, *command: str) -> str:
        return subprocess.run([HOSTS, "exec", "node1", *command], check=True, capture_output=True, text=True).stdout

    def restore(self) -> None:
        self.slurm("scancel", "--user=root")
        for node in range(self.hosts):  # let one that was cut off register at once
            subprocess.run([HOSTS, "exec", f"node{node + 1}", "sh", "-c", "kill -HUP $(cat /run/slurmd.pid)"], check=True)
        deadline = time.monotonic() + 60
        while len(self.slurm("sinfo", "-hN", "-p", "debug", "-t", "idle").splitlines()) < self.hosts:
            if time.monotonic() > deadline:
                raise RuntimeError(f"Slurm's nodes are not idle again: {self.slurm('sinfo')}")
            time.sleep(1)
