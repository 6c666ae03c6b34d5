"""Exchange between the ranks of a job: one Protocol, a null object for one rank, and an adapter for each library."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from dtrain.comm.base import Array, Communicator
from dtrain.errors import RankError, UsageError, did_you_mean

if TYPE_CHECKING:
    from dtrain.env import RankEnv

__all__ = ["COMMUNICATORS", "Array", "Communicator", "create_communicator"]

COMMUNICATORS: dict[str, str] = {
    "local": "dtrain.comm.local:LocalCommunicator",
    "mpi": "dtrain.comm.mpi:MpiCommunicator",
    "horovod": "dtrain.comm.horovod:HorovodCommunicator",
}
"""Kind of communicator, and where its class is; what it needs is imported when it is made."""


def create_communicator(env: RankEnv, kind: str = "auto") -> Communicator:
    """Make the communicator of this job; collective, blocks until all ranks of ``env`` have called it.

    ``kind`` is a key of COMMUNICATORS or ``auto``: ``local`` for one rank, ``horovod`` for those that horovodrun started over
    Gloo, else ``mpi``. A task of a TensorFlow cluster is a world of its own: what tasks exchange goes through TensorFlow; so is a
    worker of an elastic job: one that joins later would wait for calls that the others made before.
    Raises UsageError for another kind or for ``local`` with more than one rank, MissingDependency with the command that
    installs what is absent, and RankError when the world that is found has another size than ``env.world_size``, or for a worker
    of an elastic job that was not started by ``dtrain run``.
    """
    if kind == "auto":
        kind = "local" if env.world_size == 1 else "horovod" if env.vocabulary == "horovod" else "mpi"
    if kind not in COMMUNICATORS:
        known = ["auto", *COMMUNICATORS]
        raise UsageError(f"communicator {kind!r} is not known{did_you_mean(kind, known)}; choose one of {', '.join(known)}")
    if env.elastic and env.task is None:
        raise RankError(
            "horovodrun started this as a worker of an elastic job, in which its rank changes, so that it has no place in a run; "
            "start it with `dtrain run --launcher horovod --min-workers N script.py`, or leave out dtrain.init()"
        )
    if env.elastic and kind != "local":
        raise UsageError(
            f"communicator {kind!r} cannot serve an elastic job, whose workers come and go; leave comm out: run.comm is then "
            "this worker's alone, and what workers exchange goes through horovod.tensorflow"
        )
    module_name, _, class_name = COMMUNICATORS[kind].partition(":")
    factory = getattr(importlib.import_module(module_name), class_name)
    communicator: Communicator = factory(expected_size=env.world_size)
    return communicator
