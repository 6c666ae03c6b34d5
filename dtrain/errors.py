"""Every exception that dtrain raises for its users.

::

    DtrainError                  exit code 1
    ├── UsageError               2    an option or argument that cannot be
    ├── NotRunnable              127  a command, script or package that is not there
    │   └── MissingDependency    127  ... an optional package; says which command installs it
    ├── RankError                1    the rank variables are absent, or contradict each other or the world
    ├── WorkspaceError           2    a workspace or run folder that cannot be found, read or written
    ├── CommunicationError       1    ranks that do not agree on what they exchange
    ├── CheckpointError          1    a checkpoint that cannot be written whole, or does not verify
    └── RegistryError            1    a model or version that cannot be registered, found or trusted

A message says what was asked, what is allowed, and what to do.
"""

from __future__ import annotations

from collections.abc import Iterable


class DtrainError(Exception):
    """Base of all of dtrain's exceptions; ``exit_code`` is what the command line returns for it."""

    exit_code: int = 1
    of_rank: int | None = None
    """The rank where it happened, when all ranks raise it because of that one; None: here."""


class UsageError(DtrainError):
    exit_code = 2


class NotRunnable(DtrainError):
    exit_code = 127


class MissingDependency(NotRunnable):
    pass


class RankError(DtrainError):
    pass


class WorkspaceError(DtrainError):
    exit_code = 2


class CommunicationError(DtrainError):
    pass


class CheckpointError(DtrainError):
    pass


class RegistryError(DtrainError):
    pass


def nearest(given: str, allowed: Iterable[str]) -> str | None:
    """The allowed word that was meant, by its letters; None when none is near."""
    import difflib  # for those who err only

    return next(iter(difflib.get_close_matches(given, list(allowed), n=1, cutoff=0.5)), None)


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """`` (did you mean X?)`` for a message, or nothing when no allowed word is near."""
    close = nearest(given, allowed)
    return "" if close is None else f" (did you mean {close}?)"
