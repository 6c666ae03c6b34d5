"""Checks of what a script gives where the SDK's names take a list, a dict or a path: the same words wherever it is wrong."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from dtrain.azureml.errors import UserErrorException


def list_of(name: str, value: Any) -> list[Any]:
    """A list; of None an empty one, and of one text or path a list of that. Raises UserErrorException for a dict or a number."""
    if value is None:
        return []
    if isinstance(value, str | os.PathLike):
        return [value]
    if isinstance(value, Mapping) or not isinstance(value, Iterable):
        raise UserErrorException(f"{name}={value!r:.80} is {type(value).__name__}, and has to be a list; write {name}=[...]")
    return list(value)


def dict_of(name: str, value: Any) -> dict[str, Any]:
    """A dict; of None an empty one. Raises UserErrorException for anything else."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise UserErrorException(
            f"{name}={value!r:.80} is {type(value).__name__}, and has to be a dict; write {name}={{'name': 'value'}}"
        )
    return dict(value)


def variables_of(name: str, value: Any) -> dict[str, str]:
    """Environment variables by their names, as texts. Raises UserErrorException for what is no dict, and for None as a value."""
    found = dict_of(name, value)
    if empty := [key for key, text in found.items() if text is None]:
        raise UserErrorException(f"{name} has None for {empty[0]!r}; give a text, '' for an empty one, or leave it out")
    return {str(key): str(text) for key, text in found.items()}


def check_path(name: str, value: Any) -> None:
    """Raises UserErrorException for what is neither a path nor None."""
    if value is not None and not isinstance(value, str | os.PathLike):
        raise UserErrorException(f"{name}={value!r:.80} is {type(value).__name__}, and has to be a path, as text")
