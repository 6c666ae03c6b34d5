"""What a trainer asks of a communicator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]


class Communicator(Protocol):
    """The collectives that data-parallel training needs.

    Every method is collective: all ranks call it, in the same order, and it blocks until the others have done their part. A
    method whose name ends in ``_`` changes its arguments in place.
    """

    @property
    def rank(self) -> int:
        """This process's rank in the job, 0 to ``size - 1``."""
        ...

    @property
    def size(self) -> int: ...

    @property
    def local_rank(self) -> int:
        """This process's rank among those on the same host."""
        ...

    @property
    def local_size(self) -> int: ...

    def barrier(self) -> None: ...

    def allreduce_mean_(self, arrays: Sequence[Array]) -> None:
        """Replace every array, on every rank, by its mean over the ranks.

        Arrays are float16, float32 or float64, of any shape (empty and non-contiguous ones too), the same shapes and dtypes
        in the same order on all ranks; float16 is summed in float32. They are fused: the number of messages does not grow
        with the number of arrays. Raises CommunicationError on all ranks, naming those that differ, when they do not agree.
        """
        ...

    def broadcast_(self, arrays: Sequence[Array], root: int = 0) -> None:
        """Replace every array by that of ``root``; any numeric dtype; otherwise as :meth:`allreduce_mean_`."""
        ...

    def bcast_obj(self, obj: Any, root: int = 0) -> Any:
        """Return ``root``'s object (pickled) on every rank."""
        ...

    def gather_obj(self, obj: Any, root: int = 0) -> list[Any] | None:
        """Return the objects of all ranks, by rank, on ``root``, and None elsewhere."""
        ...

    def allgather_obj(self, obj: Any) -> list[Any]:
        """Return the objects of all ranks, by rank, on every rank."""
        ...

    def abort(self, exit_code: int) -> None:
        """End the whole job from this one rank, with ``exit_code``: the one method that is not collective."""
        ...

    def close(self) -> None:
        """Give back what the communicator holds. Collective; the communicator cannot be used afterwards."""
        ...
