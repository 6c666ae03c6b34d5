"""A chief that is done ends, also while one of its workers is being waited for.

A thread of TensorFlow's ClusterCoordinator waits for a killed worker to come back, and holds a lock until it has. The coordinator
takes the same lock when it is deleted, which is when Python ends: then the other thread never runs again, and the chief waits for
ever, though the worker comes back. Seen under TensorFlow 2.18; 2.15 has the same code.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from dtrain._after_import import AfterImport

# The lock keeps the other thread from overlooking that it is to end. It ends with the process in any case.
_LOCK_S = 2.0

_installed = False


def install() -> None:
    """Mend TensorFlow's module as it is imported, or when it is already; imports none. Once."""
    global _installed
    if not _installed:
        _installed = True
        AfterImport({"tensorflow.python.distribute.coordinator.cluster_coordinator": _mend_handler}).install()


def _mend_handler(module: ModuleType) -> None:
    def stop(self: Any) -> None:
        self._should_preemption_thread_run = False
        held = self._cluster_update_lock.acquire(timeout=_LOCK_S)
        self._cluster_due_for_update_or_finish.set()
        if held:
            self._cluster_update_lock.release()

    module.WorkerPreemptionHandler.stop = stop
