"""The communicator of a job of one rank: the null object, so that no trainer asks whether it is distributed."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

from dtrain.comm._agreement import CallSignature, explain_disagreement, sign_broadcast, sign_mean
from dtrain.comm.base import Array
from dtrain.errors import CommunicationError, UsageError
from dtrain.progress import PROGRESS


class LocalCommunicator:
    """Rank 0 of 1. It refuses what the others refuse, so that a script does not fail first when it is given more ranks."""

    def __init__(self, *, expected_size: int | None = None) -> None:
        """``expected_size`` is the number of ranks the launcher started; more than one raises UsageError."""
        if expected_size not in (None, 1):
            raise UsageError(
                f"communicator 'local' serves one rank, but the launcher started {expected_size}; use 'mpi', or 'auto'"
            )
        self._closed = False

    @property
    def rank(self) -> int:
        return 0

    @property
    def size(self) -> int:
        return 1

    @property
    def local_rank(self) -> int:
        return 0

    @property
    def local_size(self) -> int:
        return 1

    def barrier(self) -> None:
        self._check_open()

    def allreduce_mean_(self, arrays: Sequence[Array]) -> None:
        self._check(sign_mean(arrays))

    def broadcast_(self, arrays: Sequence[Array], root: int = 0) -> None:
        self._check(sign_broadcast(arrays, root, 1))

    def bcast_obj(self, obj: Any, root: int = 0) -> Any:
        self._check_root(root)
        return obj

    def gather_obj(self, obj: Any, root: int = 0) -> list[Any] | None:
        self._check_root(root)
        return [obj]

    def allgather_obj(self, obj: Any) -> list[Any]:
        self._check_open()
        return [obj]

    def abort(self, exit_code: int) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)  # like MPI's: from any thread, and no handler can hold it up

    def close(self) -> None:
        self._closed = True

    def _check(self, signature: CallSignature) -> None:
        self._check_open()
        if signature.refusal is not None:
            raise CommunicationError(explain_disagreement([signature]))

    def _check_root(self, root: int) -> None:
        self._check_open()
        if root != 0:
            raise CommunicationError(f"root={root} is not a rank; ranks are 0 to 0")

    def _check_open(self) -> None:
        PROGRESS.mark()
        if self._closed:
            raise CommunicationError("the communicator is closed; make a new one")
