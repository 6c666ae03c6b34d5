"""What a rank does before its script begins, where that was written for the SDK."""

from __future__ import annotations

import os

from dtrain import switches
from dtrain.azureml.finder import install
from dtrain.azureml.old_code import mend_chainer
from dtrain.azureml.records import read_submitted
from dtrain.env import RankEnv
from dtrain.status import read_status

# The port in AZ_BATCH_MASTER_NODE, where nobody listens: what scripts take of it is the host.
_PORT = 6000


def begin(rank_env: RankEnv) -> None:
    """Make ``import azureml`` dtrain's, and set the variables by which a script knows its run and place."""
    install(force=switches.azureml_mode() == "force")
    mend_chainer()
    run = rank_env.layout
    if run is None:
        return
    submitted = read_submitted(run)
    master = submitted.master
    if not master:  # what Slurm chose: ranks are started from the first of its nodes
        supervisor = read_status(run).supervisor
        master = supervisor.host if supervisor is not None else "127.0.0.1"
    index = rank_env.task.index if rank_env.task is not None else rank_env.rank
    variables = switches.azureml_variables(run.id, nodes=submitted.node_count, master=f"{master}:{_PORT}", index=index)
    os.environ.update(variables)
