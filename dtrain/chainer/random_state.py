"""Random generators that Chainer's code draws from: Python's, NumPy's and, on a GPU, CuPy's."""

from __future__ import annotations

import random
import sys
from typing import Any

import numpy as np

from dtrain.comm import Array


def seed_random(*entropy: int) -> None:
    """Seed the global generators of Python, NumPy and (where it is loaded) CuPy from one or more numbers, each 0 or more.

    Call it with the same number on all ranks before making a model whose layers have their sizes: its initial weights then follow
    from that number. No communication.
    """
    words = np.random.SeedSequence(list(entropy)).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    _seed_cupy(int(words[2]))


def capture_random() -> tuple[dict[str, Array], dict[str, Any]]:
    """Return the state of Python's and NumPy's generators as (tensors, JSON values) for :func:`restore_random`.

    CuPy's generators cannot be read. Where CuPy is in use it is seeded here, from a number drawn from NumPy's generator *after*
    its state was copied: the run that goes on and the run that is resumed from here then draw the same.
    """
    _, words, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, internal, gauss_next = random.getstate()
    tensors: dict[str, Array] = {
        "random/numpy": np.array(words, dtype=np.uint32),
        "random/python": np.array(internal, dtype=np.uint32),
        "random/gauss": np.array([gauss, 0.0 if gauss_next is None else gauss_next], dtype=np.float64),
    }
    values = {
        "position": int(position),
        "has_gauss": int(has_gauss),
        "version": version,
        "has_gauss_next": gauss_next is not None,
    }
    _renew_cupy()
    return tensors, values


def restore_random(tensors: dict[str, Array], values: dict[str, Any]) -> None:
    """Put back what :func:`capture_random` returned."""
    gauss, gauss_next = (float(value) for value in tensors["random/gauss"])
    words = np.array(tensors["random/numpy"], dtype=np.uint32)
    np.random.set_state(("MT19937", words, values["position"], values["has_gauss"], gauss))
    internal = tuple(int(word) for word in tensors["random/python"])
    random.setstate((values["version"], internal, gauss_next if values["has_gauss_next"] else None))
    _renew_cupy()


def _renew_cupy() -> None:
    if "cupy" in sys.modules:
        _seed_cupy(int(np.random.randint(2**31)))


def _seed_cupy(seed: int) -> None:
    cupy = sys.modules.get("cupy")
    if cupy is not None and cupy.cuda.is_available():
        cupy.random.seed(seed)
