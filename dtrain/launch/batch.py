"""What a Slurm job of ours runs, on its first node: ``python -m dtrain.launch.batch RUN``.

The run folder is there; from here on the job goes as any other does. Its ranks' output is in their files, which whoever follows
the run reads; what is said here goes to the job's own log. A job that Slurm starts again goes on in the same run.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
import time
from pathlib import Path

from dtrain.allocation import Allocation
from dtrain.errors import DtrainError, NotRunnable
from dtrain.files import read_json
from dtrain.launch import slurm
from dtrain.launch.console import Console
from dtrain.launch.job import planner, report_end, supervise_run
from dtrain.launch.queue import queued
from dtrain.launch.sbatch import JobState
from dtrain.launch.supervise import TIME_LIMIT
from dtrain.layout import RunLayout
from dtrain.masking import Masker
from dtrain.processes import ProcessRecord
from dtrain.spec import JobSpec
from dtrain.status import RunStatus, read_status, write_record

_DUE = re.compile(rb"CANCELLED AT \S+ DUE TO ([A-Z ]*[A-Z])")


def run_batch(run: RunLayout) -> RunStatus:
    """Run the job of ``run`` in the allocation around this process. Blocks until it has ended.

    Raises NotRunnable where there is no allocation, or the ranks cannot be started.
    """
    allocation = Allocation.read()
    if allocation is None:
        raise NotRunnable("this is for a job of Slurm's; start one with `dtrain run --launcher slurm`")
    spec = JobSpec.from_json(read_json(run.spec), run.code)
    console = Console(out=sys.stderr, ranks=(), masker=Masker(spec.secret_values().values()))
    before = read_status(run)
    if before.state == "completed":
        console.say(f"dtrain: run {run.id} has completed before; nothing is left to be done")
        return before
    plan = planner(spec, run.workspace, console.say)(run, run.code)
    nodes = slurm.hostnames(allocation)
    console.say(f"dtrain: Slurm job {allocation.job_id} on {', '.join(nodes)}; ranks are started by {plan.processes[0].name}")
    begin = run.slurm_log.stat().st_size if run.slurm_log.exists() else 0
    return supervise_run(run, spec, plan, console, lambda status: _explained(run, status, begin))


def _explained(run: RunLayout, status: RunStatus, begin: int) -> RunStatus:
    """The status of a run that Slurm ended, with the reason that slurmstepd gives in the log after ``begin``, if it does."""
    if status.state != "canceled" or not run.slurm_log.exists():
        return status
    reasons = _DUE.findall(run.slurm_log.read_bytes()[begin:])
    if not reasons:
        return status
    reason = reasons[-1].decode().lower()
    status = dataclasses.replace(status, cause=f"Slurm ended the job: {reason}")
    if reason == "time limit":
        status = dataclasses.replace(status, state="failed", exit_code=TIME_LIMIT)
    write_record(run.status, status)
    return status


def main() -> None:
    run = RunLayout(Path(sys.argv[1]))
    try:
        status = run_batch(run)
    except DtrainError as error:
        console, before = Console(out=sys.stderr, ranks=()), read_status(run)
        if before.supervisor == ProcessRecord.of(os.getpid()):  # then it is recorded
            console.say(f"dtrain: {error}", bad=True)
        else:
            begun = queued(before, JobState(state="PENDING"))  # with what became of earlier attempts
            failed = dataclasses.replace(begun, state="failed", ended=time.time(), exit_code=error.exit_code, cause=str(error))
            write_record(run.status, failed)
            report_end(run, failed, console)
        sys.exit(error.exit_code)
    sys.exit(status.exit_code)


if __name__ == "__main__":
    main()
