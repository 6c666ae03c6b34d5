"""A run that was submitted to Slurm: its job, what Slurm says of it, and how it is ended."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

from dtrain.errors import NotRunnable
from dtrain.files import read_json, write_json
from dtrain.launch.plan import LaunchPlan
from dtrain.layout import RunLayout

_ANSWER_S = 60.0
# A job is submitted also where Slurm is so busy that it does not say its name.
_NAME_S = 5.0
_UNKNOWN = "nvalid job id"
_FORMAT = "%i|%T|%P|%B|%r|%Z"  # the reason and the folder last: no other holds what separates them
# What Slurm calls a job that it will start, or has started and not yet done with. https://slurm.schedmd.com/squeue.html
_WAITING = ("PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD")
_AT_WORK = ("RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING")


@dataclass(frozen=True, kw_only=True)
class JobState:
    """What Slurm says of a job. ``state`` is empty when it no longer knows it, or its number is another job's. ``partition``
    lists those that a waiting job may have; ``host`` is the first node of one that has some."""

    state: str
    reason: str = ""
    partition: str = ""
    host: str = ""

    @property
    def is_waiting(self) -> bool:
        return self.state in _WAITING

    @property
    def is_over(self) -> bool:
        return self.state not in (*_WAITING, *_AT_WORK)


@dataclass(frozen=True, kw_only=True)
class SlurmJob:
    """The job of a run.

    Slurm counts from 1 again where it is installed anew, and each cluster counts by itself: a number alone may mean another job.
    """

    job_id: str
    cluster: str = ""
    """Empty but where Slurm manages several; it is asked by that name then."""
    cluster_name: str = ""
    """Of the cluster that took the job, as its Slurm calls itself; empty where that did not say."""
    folder: str = ""
    """The job's working folder, by which it is known: that is in its run folder."""

    @staticmethod
    def of(run: RunLayout) -> SlurmJob | None:
        """None for a run that was not submitted to Slurm."""
        try:
            return SlurmJob(**{"folder": str(run.code), **read_json(run.slurm_job)})
        except FileNotFoundError:
            return None

    def look(self) -> JobState | None:
        """Ask Slurm; None when it does not answer, see :func:`look_at`."""
        return look_at([self]).get(self)

    def cancel(self) -> None:
        """Have Slurm end the job, if it still has it; a waiting one never starts. Does not wait for it. Raises NotRunnable."""
        state = self.look()
        if state is None:
            where = f" {self.cluster_name}" if self.cluster_name else ""
            raise NotRunnable(
                f"Slurm job {self.job_id} cannot be canceled: Slurm does not answer for it here; `dtrain stop` the run where "
                f"`squeue` knows the job, on a host of the cluster{where} that it was submitted to"
            )
        if state.is_over:
            return
        answer = _ask("scancel", self.cluster, self.job_id)
        if answer is None or (answer.returncode != 0 and _UNKNOWN not in answer.stderr):
            raise NotRunnable(
                f"Slurm job {self.job_id} cannot be canceled: {answer.stderr.strip() if answer else 'scancel fails'}"
            )


def look_at(jobs: Iterable[SlurmJob], answer_s: float = _ANSWER_S) -> dict[SlurmJob, JobState]:
    """Ask Slurm, each cluster once. Not in the result are those of one that does not answer within ``answer_s``, and those that
    this host's Slurm does not know where it cannot be seen to be the one that took them."""
    by_cluster: dict[str, list[SlurmJob]] = {}
    for job in jobs:
        by_cluster.setdefault(job.cluster, []).append(job)
    found = {}
    for cluster, asked in by_cluster.items():
        ids = ",".join(job.job_id for job in asked)
        options = ("--noheader", "--states=all", f"--jobs={ids}", f"--format={_FORMAT}")
        answer = _ask("squeue", cluster, *options, answer_s=answer_s)
        if answer is None or (answer.returncode != 0 and _UNKNOWN not in answer.stderr):
            continue
        states = {job: state for line in answer.stdout.splitlines() for job, state in _told_by(line, asked)}
        unknown = [job for job in asked if job not in states]
        name = _own_name(answer_s) if unknown and not cluster else ""
        found.update(states)
        found.update({job: JobState(state="") for job in unknown if cluster or (name and job.cluster_name == name)})
    return found


def _told_by(line: str, jobs: Iterable[SlurmJob]) -> Iterator[tuple[SlurmJob, JobState]]:
    """The job that a line of squeue's is about, and its state; nothing for another job of that number. Pure."""
    if line.count("|") < _FORMAT.count("|"):
        return  # one that names the cluster may come first
    job_id, state, partition, host, rest = line.strip().split("|", 4)
    for job in jobs:
        if job.job_id == job_id and rest.endswith(f"|{job.folder}"):
            reason = rest.removesuffix(f"|{job.folder}")
            yield job, JobState(state=state, reason=reason, partition=partition, host=host.replace("n/a", ""))


def _own_name(answer_s: float = _ANSWER_S) -> str:
    """What this host's Slurm calls its cluster; empty where it does not say. Blocks for its answer."""
    answer = _ask("scontrol", "", "show", "config", answer_s=answer_s)
    match = re.search(r"^ClusterName\s*=\s*(\S+)", answer.stdout, re.MULTILINE) if answer is not None else None
    return match[1] if match else ""


def _ask(program: str, cluster: str, *arguments: str, answer_s: float = _ANSWER_S) -> subprocess.CompletedProcess[str] | None:
    argv = [program, *([f"--clusters={cluster}"] if cluster else []), *arguments]
    try:
        return subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=answer_s, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None


def list_partitions() -> dict[str, tuple[int, int]] | None:
    """Slurm's partitions: how many nodes each has, and how many cores the smallest of them; None where there is no sinfo.

    Raises NotRunnable where Slurm does not answer.
    """
    argv = ["sinfo", "--noheader", "--format=%R|%D|%c"]
    try:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_ANSWER_S, check=True)
    except FileNotFoundError:
        return None
    except (OSError, subprocess.SubprocessError) as error:
        raise NotRunnable(f"Slurm's partitions cannot be listed: {error}; does `sinfo` work here?") from error
    found: dict[str, tuple[int, int]] = {}
    for line in done.stdout.splitlines():  # a partition has a line for each kind of its nodes
        name, nodes, cores = line.strip().split("|")
        before, least = found.get(name, (0, int(cores.rstrip("+"))))
        found[name] = (before + int(nodes), min(least, int(cores.rstrip("+"))))
    return found


def submit(plan: LaunchPlan, run: RunLayout, environment: dict[str, str]) -> SlurmJob:
    """Call sbatch as planned, and keep in the run folder what the job is known by. Raises NotRunnable with sbatch's own words."""
    (process,) = plan.processes
    name = _own_name(_NAME_S)
    try:
        done = subprocess.run(
            process.argv,
            cwd=process.cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_ANSWER_S,
            check=False,
        )
    except OSError as error:
        raise NotRunnable(
            f"sbatch cannot be started: {error.strerror}; --launcher slurm is for a host that submits to Slurm"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise NotRunnable(f"sbatch did not answer for {_ANSWER_S:g} s; `squeue --me` shows whether it took the job") from error
    # Some sites' sbatch says more than was asked for.
    match = re.search(r"^(\d+)(?:;(\S+))?$", done.stdout, re.MULTILINE)
    if done.returncode != 0 or match is None:
        raise NotRunnable(f"sbatch refused the job: {(done.stderr or done.stdout).strip()}")
    job = SlurmJob(job_id=match[1], cluster=match[2] or "", cluster_name=name, folder=str(process.cwd))
    write_json(run.slurm_job, asdict(job))
    return job
