"""What a rank does before its script begins, where that was written for the SDK."""

from __future__ import annotations

import importlib
import importlib.util
import os

from dtrain import env
from dtrain.azureml.finder import install
from dtrain.azureml.records import read_submitted
from dtrain.env import RankEnv


def begin(rank_env: RankEnv) -> None:
    """Make ``import azureml`` dtrain's, and set the variables by which a script knows its run and place."""
    install(force=env.azureml_mode() == "force")
    if importlib.util.find_spec("chainer") is not None:
        importlib.import_module("dtrain.chainer")  # before Chainer, which the script imports without a thought of today's NumPy
    run = rank_env.layout
    if run is None:
        return
    nodes = read_submitted(run).node_count
    index = rank_env.task.index if rank_env.task is not None else rank_env.rank
    variables = env.azureml_variables(run.id, nodes=nodes, master="127.0.0.1:6000", index=index)
    os.environ.update(variables)
