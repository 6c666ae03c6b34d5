"""Rank and size of a worker whose job is elastic: they change while it runs."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dtrain.env import RankEnv


class HorovodPlace:
    """Where Horovod has this worker of an elastic job now; while it has none, before ``hvd.init()`` say, where it began."""

    def __init__(self, began: RankEnv) -> None:
        self._began = began

    @property
    def rank(self) -> int:
        return self._now("rank")

    @property
    def size(self) -> int:
        return self._now("size")

    @property
    def local_rank(self) -> int:
        return self._now("local_rank")

    @property
    def local_size(self) -> int:
        return self._now("local_size")

    def _now(self, what: str) -> int:
        operations = sys.modules.get("horovod.tensorflow.mpi_ops")  # not imported for this: TensorFlow comes with it
        begun = operations is not None and operations.is_initialized()
        return int(getattr(operations, what)()) if begun else int(getattr(self._began, what))
