"""Exchange between the ranks of a job: one Protocol, a null object for one rank, and an adapter for each library."""

from __future__ import annotations

import difflib
import importlib
from typing import TYPE_CHECKING

from dtrain.comm.base import Array, Communicator
from dtrain.errors import UsageError

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
    Gloo, else ``mpi``. Raises UsageError for another kind or for ``local`` with more than one rank, MissingDependency with the
    command that installs what is absent, and RankError when the world that is found has another size than ``env.size``.
    """
    if kind == "auto":
        kind = "local" if env.size == 1 else "horovod" if env.vocabulary == "horovod" else "mpi"
    if kind not in COMMUNICATORS:
        known = ["auto", *COMMUNICATORS]
        nearest = difflib.get_close_matches(kind, known, n=1, cutoff=0.4)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise UsageError(f"communicator {kind!r} is not known; choose one of {', '.join(known)}{hint}")
    module_name, _, class_name = COMMUNICATORS[kind].partition(":")
    factory = getattr(importlib.import_module(module_name), class_name)
    communicator: Communicator = factory(expected_size=env.size)
    return communicator
