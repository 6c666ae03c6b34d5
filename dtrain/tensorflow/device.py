"""Where a rank computes: on the CPU, or on the GPU of its local rank."""

from __future__ import annotations

import socket

import tensorflow as tf

from dtrain.comm import Communicator
from dtrain.errors import NotRunnable, UsageError

DEVICES = ("auto", "cpu", "gpu")


def choose_device(kind: str, comm: Communicator, *, local_rank: int | None = None) -> str:
    """Let this process see the one GPU of its local rank, or none; returns ``gpu`` or ``cpu``. Collective.

    Memory of the GPU is taken as it is needed. ``auto`` takes GPUs when every rank has one, and the CPU when none has. Call it
    before TensorFlow has computed anything. Raises UsageError, on all ranks, for more ranks on a host than it has GPUs, or when
    only some ranks see one; NotRunnable for ``gpu`` without any. Where ``local_rank`` is given (by a cluster's task, which
    is a world of its own to ``comm``), tasks share a GPU where there are more of them.
    """
    if kind not in DEVICES:
        raise UsageError(f"device={kind!r} is not known; choose one of {', '.join(DEVICES)}")
    gpus = tf.config.list_physical_devices("GPU") if kind != "cpu" else []
    if kind != "cpu":
        _check(kind, comm.allgather_obj((socket.gethostname(), comm.local_size, len(gpus))))
    try:
        if not gpus:
            tf.config.set_visible_devices([], "GPU")
            return "cpu"
        # A launcher may show each rank its own GPU only: that is then the first for everyone.
        mine = gpus[comm.local_rank if len(gpus) >= comm.local_size else 0]
        if local_rank is not None:
            mine = gpus[local_rank % len(gpus)]
        tf.config.set_visible_devices([mine], "GPU")
        tf.config.experimental.set_memory_growth(mine, True)
    except RuntimeError as error:
        raise UsageError(
            f"the device must be chosen before TensorFlow computes anything ({error}); make the Trainer first"
        ) from error
    return "gpu"


def _check(kind: str, found: list[tuple[str, int, int]]) -> None:
    """Raise, from what all ranks found, the same error on every rank."""
    without = [rank for rank, (_, _, count) in enumerate(found) if count == 0]
    if len(without) == len(found):
        if kind == "gpu":
            raise NotRunnable(
                f"device='gpu' was asked for, and TensorFlow sees no GPU on {found[0][0]}; check nvidia-smi, "
                "CUDA_VISIBLE_DEVICES and that this TensorFlow is built with CUDA, or use --device cpu"
            )
        return
    if without:
        raise UsageError(
            f"device={kind!r}: rank {without[0]} on {found[without[0]][0]} sees no GPU, while other ranks see one; use hosts "
            "that are alike, or --device cpu"
        )
    for host, local_size, count in found:
        if 1 < count < local_size:
            raise UsageError(
                f"{local_size} ranks on {host} exceed its {count} GPUs, and a GPU serves one rank; start at most {count} on this "
                "host, or use --device cpu"
            )
