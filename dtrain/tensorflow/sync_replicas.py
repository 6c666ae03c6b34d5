"""Synchronous workers of TensorFlow 1 (``SyncReplicasOptimizer``) end together, and none waits for one that has left.

There a step of a worker ends with a token. Worker 0 hands out tokens, in a thread that waits for as many gradients as make an
update. Seen under TensorFlow 2.15 and 2.18, where nothing else is done about it:

- When worker 0 is done, that thread waits for gradients that nobody will compute any more, and a MonitoredTrainingSession waits
  for the thread: two minutes. A Supervisor does, and then raises.
- Workers see the last step in different moments. One that has not seen it asks for another token when another has left, of
  which it would need a gradient; or when worker 0 has left without stopping its Supervisor. It waits for ever.

So the thread is left to the end of its session, which cancels what it waits for; and whoever leaves puts as many tokens in the
queue as an update takes gradients: those who stay go on, and see that they are done. Worker 0 then closes the queue: who wants
more steps gets TensorFlow's OutOfRangeError, by which a MonitoredTrainingSession or ``managed_session`` ends as at the end of
its data.
"""

from __future__ import annotations

import atexit
import functools
import logging
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

from dtrain._after_import import AfterImport

logger = logging.getLogger(__name__)

_OPERATIONS = "_dtrain_leaving"
_SESSION = "_dtrain_session"
# The server that holds the queue may be gone; nobody's end waits longer for it.
_TIMEOUT_MS = 5000
_POLL_S = 0.05

_installed = False


def install() -> None:
    """Mend TensorFlow's modules as they are imported, and those that are already; imports none. Once."""
    global _installed
    if _installed:
        return
    _installed = True
    AfterImport(
        {
            "tensorflow.python.training.sync_replicas_optimizer": _mend_optimizer,
            "tensorflow.python.training.supervisor": _mend_supervisor,
        }
    ).install()


def _mend_optimizer(module: ModuleType) -> None:
    optimizer, hook = module.SyncReplicasOptimizer, module._SyncReplicasOptimizerHook
    apply_gradients, end = optimizer.apply_gradients, hook.end

    def apply_gradients_(self: Any, *args: Any, **kwargs: Any) -> Any:
        train_op = apply_gradients(self, *args, **kwargs)
        _add_operations(self)  # now: a session soon finalizes the graph
        runner = self._chief_queue_runner
        runner._run = functools.partial(_run_until_stop, runner._run)
        return train_op

    def end_(self: Any, session: Any) -> None:
        _leave(session, leads=self._is_chief)
        end(self, session)

    optimizer.apply_gradients = apply_gradients_
    hook.end = end_


def _mend_supervisor(module: ModuleType) -> None:
    supervisor = module.Supervisor
    prepare, stop = supervisor.prepare_or_wait_for_session, supervisor.stop

    def prepare_or_wait_for_session(self: Any, *args: Any, **kwargs: Any) -> Any:
        session = prepare(self, *args, **kwargs)
        setattr(self, _SESSION, session)
        atexit.register(_leave_supervised, self)  # scripts often end without stop()
        return session

    def stop_(self: Any, *args: Any, **kwargs: Any) -> Any:
        _leave_supervised(self)
        return stop(self, *args, **kwargs)

    supervisor.prepare_or_wait_for_session = supervisor.PrepareSession = prepare_or_wait_for_session
    supervisor.stop = supervisor.Stop = stop_


def _add_operations(optimizer: Any) -> None:
    import tensorflow.compat.v1 as tf

    queue, step = optimizer._sync_token_queue, optimizer._global_step
    with tf.device(step.device), tf.name_scope("dtrain_leaving/"):
        hand_back = queue.enqueue_many((tf.fill([optimizer._replicas_to_aggregate], step),))
        with tf.control_dependencies([hand_back]):
            close = queue.close()
    # Not a collection of the graph's: those are saved with it.
    setattr(hand_back.graph, _OPERATIONS, (hand_back, close))


def _run_until_stop(run: Callable[..., None], session: Any, enqueue_op: Any, coordinator: Any = None) -> None:
    """Make updates as ``run`` does, but end when the coordinator stops: who stops it waits for this thread."""

    def update() -> None:
        try:
            run(session, enqueue_op, coordinator)
        except Exception:  # of the canceled update, as a rule
            if coordinator is None or not coordinator.should_stop():
                raise

    worker = threading.Thread(target=update, name="dtrain-sync-replicas", daemon=True)
    worker.start()
    while worker.is_alive() and not (coordinator is not None and coordinator.should_stop()):
        worker.join(_POLL_S)


def _leave_supervised(supervisor: Any) -> None:
    session = vars(supervisor).pop(_SESSION, None)
    if session is not None:
        _leave(session, leads=supervisor.is_chief)


def _leave(session: Any, *, leads: bool) -> None:
    import tensorflow.compat.v1 as tf

    operations = getattr(session.graph, _OPERATIONS, None)
    if operations is None:
        return
    hand_back, close = operations
    try:
        session.run(close if leads else hand_back, options=tf.RunOptions(timeout_in_ms=_TIMEOUT_MS))
    except (tf.errors.OpError, RuntimeError) as error:  # worker 0 closed the queue, the session is closed, or the server is gone
        logger.debug("no tokens left behind: %s", error)
