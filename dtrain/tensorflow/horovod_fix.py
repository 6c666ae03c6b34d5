"""Horovod 0.28.1 on Keras 3 and tf_keras: its Keras calls made right, or refused; what is right already is left alone.

Seen with Keras 3 before (TensorFlow 2.18.1): ``DistributedOptimizer`` with ``fit`` exchanges nothing and says nothing; the tape,
the callbacks and ``broadcast_variables`` raise on Keras variables. With tf_keras the metric and learning-rate callbacks raise,
because Horovod takes its backend from ``import keras``, which is another Keras.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from dtrain import install as commands
from dtrain._after_import import AfterImport
from dtrain.env import RankEnv, other_world
from dtrain.errors import MissingDependency, UsageError

_installed = False
_DEFINE_COMPILE = ("keras.src.trainers.trainer", "keras.src.engine.training", "tf_keras.src.engine.training")
"""Of Keras 3, 2.15 and tf_keras. A model with another `compile` than theirs counts as custom, and is loaded without it."""


def install() -> None:
    """Mend Horovod's modules as they are imported, and those that are already; imports none. Once."""
    global _installed
    if _installed:
        return
    _installed = True
    AfterImport(
        {
            "tensorflow.python.framework.load_library": _find_mpi,
            "horovod.tensorflow.mpi_ops": _check_world_after_init,
            "horovod.tensorflow.functions": _broadcast_keras_variables,
            "horovod.tensorflow": _mend_tensorflow,
            "horovod._keras": _mend_optimizer,
            "horovod._keras.callbacks": _mend_callbacks,
            "horovod.tensorflow.elastic": _refuse_state,
            **dict.fromkeys(_DEFINE_COMPILE, _mend_compile),
        }
    ).install()


def plain_variables(variables: Any) -> Any:
    """TensorFlow's variables of a list in which some are Keras 3's."""
    if not isinstance(variables, (list, tuple)):
        return _plain(variables)
    return [plain_variables(each) for each in variables]


def _plain(variable: Any) -> Any:
    # A Keras 3 variable has TensorFlow's as its `_value`; `value` may be one that autocast made.
    return variable._value if not hasattr(variable, "ref") and hasattr(variable, "_value") else variable


def _find_mpi(module: ModuleType) -> None:
    """Horovod's library needs that of MPI, which mpirun makes known to its ranks and nobody to a script on its own."""
    original = module.load_op_library

    def load_op_library(library_filename: str) -> Any:
        try:
            return original(library_filename)
        except Exception as error:
            missing = re.search(r"\blibmpi\w*\.so[.\d]*", str(error))
            if missing is None or "horovod" not in library_filename:
                raise
            library = Path(sys.prefix, "lib", missing[0])  # where MPI's wheels put it
            try:
                ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
            except OSError:
                raise MissingDependency(
                    f"Horovod needs {missing[0]} of the MPI that it was built with, which is neither where the loader looks nor "
                    f"{library}; start the script with that MPI's mpirun, add the library's folder to LD_LIBRARY_PATH, or build "
                    f"Horovod for this environment: {commands.HOROVOD}"
                ) from error
            return original(library_filename)

    module.load_op_library = load_op_library  # type: ignore[attr-defined]


def _check_world_after_init(module: ModuleType) -> None:
    original = module.init

    def init(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        rank_env = RankEnv.read()
        # Elastic workers come and go; and a script may ask for some of the ranks.
        if not args and not kwargs and rank_env.vocabulary not in ("horovod", "alone") and module.size() != rank_env.world_size:
            raise other_world(rank_env.world_size, module.size(), "Horovod")

    module.init = init  # type: ignore[attr-defined]


def _broadcast_keras_variables(module: ModuleType) -> None:
    original = module.broadcast_variables

    def broadcast_variables(variables: Any, root_rank: int, *args: Any, **kwargs: Any) -> Any:
        return original(plain_variables(list(variables)), root_rank, *args, **kwargs)

    module.broadcast_variables = broadcast_variables  # type: ignore[attr-defined]


def _mend_tensorflow(module: ModuleType) -> None:
    _mend_tape(module)
    if not hasattr(module, "BroadcastGlobalVariablesHook"):
        _define_hook(module)


def _define_hook(module: ModuleType) -> None:
    """The hook of scripts for TensorFlow 1, for which Horovod looks for a base class where TensorFlow 2.16 has it no more."""
    tf1 = module.tf.compat.v1

    class BroadcastGlobalVariablesHook(tf1.train.SessionRunHook):  # type: ignore[name-defined]
        """Gives all ranks the global variables of rank ``root_rank`` when a session has been made. Waits for all ranks."""

        def __init__(self, root_rank: int, device: str = "") -> None:
            super().__init__()
            self.root_rank, self.device = root_rank, device
            self.bcast_op: Any = None

        def begin(self) -> None:
            if self.bcast_op is None or self.bcast_op.graph != tf1.get_default_graph():
                with module.tf.device(self.device):
                    self.bcast_op = module.broadcast_global_variables(self.root_rank)

        def after_create_session(self, session: Any, coord: Any) -> None:
            session.run(self.bcast_op)

    module.BroadcastGlobalVariablesHook = BroadcastGlobalVariablesHook  # type: ignore[attr-defined]


def _mend_tape(module: ModuleType) -> None:
    # Bound here by name when it was imported, which may have been before the module it comes from was mended.
    module.broadcast_variables = importlib.import_module("horovod.tensorflow.functions").broadcast_variables  # type: ignore[attr-defined]
    tape = module._DistributedGradientTape
    gradient, register_local_source = tape.gradient, tape.register_local_source
    agreed: list[bool] = []

    def gradient_(self: Any, target: Any, sources: Any, *args: Any, **kwargs: Any) -> Any:
        sources = plain_variables(sources)
        # All ranks' first: later ones may take other sources on purpose.
        variables = isinstance(sources, list) and all(hasattr(source, "assign") for source in sources)
        if not agreed and self.process_set is module.global_process_set and variables:
            agreed.append(True)
            from dtrain.tensorflow.averaging import check_same_variables

            check_same_variables(sources)
        return gradient(self, target, sources, *args, **kwargs)

    tape.gradient = gradient_
    tape.register_local_source = lambda self, source: register_local_source(self, plain_variables(source))
    vars_to_refs = module.vars_to_refs
    module.vars_to_refs = lambda variables: vars_to_refs(plain_variables(variables))  # type: ignore[attr-defined]
    from dtrain.tensorflow.batch_norm import keras3_sync_batch_norm

    synchronized = keras3_sync_batch_norm()
    if synchronized is not None:
        module.SyncBatchNormalization = synchronized  # type: ignore[attr-defined]


def _mend_optimizer(module: ModuleType) -> None:
    create = module.create_distributed_optimizer

    def create_distributed_optimizer(keras: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        from dtrain.tensorflow import averaging

        if not averaging.is_keras3_optimizer(optimizer):
            distributed = create(keras, optimizer, *args, **kwargs)
            _check_before_exchange(type(distributed), kwargs.get("process_set"))
            return distributed
        names = ("name", "device_dense", "device_sparse", "compression", "sparse_as_dense", "gradient_predivide_factor", "op")
        # `groups` only says what travels together; ours sends all gradients of a dtype in one group.
        options = {**dict(zip(names, args, strict=False)), **kwargs}
        reduction = averaging.Reduction(
            op=options["op"],
            compression=options["compression"],
            sparse_as_dense=options["sparse_as_dense"],
            gradient_predivide_factor=options["gradient_predivide_factor"],
            process_set=options["process_set"],
            accumulated_as_sum=not options.get("average_aggregated_gradients", False),
        )
        return averaging.distribute(optimizer, reduction, backward_passes=options.get("backward_passes_per_step", 1))

    load = module.load_model

    def load_model(keras: Any, *args: Any, **kwargs: Any) -> Any:
        version = str(module.tf.__version__)
        major, minor = (int(part) for part in version.split(".")[:2])
        if (major, minor) < (2, 16):
            return load(keras, *args, **kwargs)
        raise UsageError(
            f"hvd.load_model does not work with the Keras of TensorFlow {version}; load it with keras.models.load_model(path), "
            "then compile it with hvd.DistributedOptimizer(model.optimizer)"
        )

    module.create_distributed_optimizer = create_distributed_optimizer  # type: ignore[attr-defined]
    module.load_model = load_model  # type: ignore[attr-defined]


def _check_before_exchange(cls: Any, process_set: Any) -> None:
    """Let a class that Horovod made for an optimizer of Keras 2 name models that differ, where it would wait for the others."""
    hvd = importlib.import_module("horovod.tensorflow")
    if process_set is not hvd.global_process_set or not hvd._executing_eagerly():
        return
    allreduce = cls._allreduce
    agreed: list[bool] = []

    def _allreduce(self: Any, grads: Any, vars: Any) -> Any:
        variables = list(vars)
        kept_local = self._local_vars or getattr(self._agg_helper, "_local_vars", ())
        if not agreed and not kept_local:  # what a rank keeps to itself may be as it likes
            agreed.append(True)
            from dtrain.tensorflow.averaging import check_same_variables

            check_same_variables(variables)
        return allreduce(self, grads, variables)

    cls._allreduce = _allreduce


def _mend_compile(module: ModuleType) -> None:
    # Now: in `model.compile(DistributedOptimizer(...))` the method is looked up before there is any optimizer of ours.
    is_keras3 = hasattr(module, "Trainer")
    trainer = module.Trainer if is_keras3 else module.Model
    original = trainer.compile

    @functools.wraps(original)
    def compile(self: Any, *args: Any, **kwargs: Any) -> None:
        if "dtrain.tensorflow.averaging" in sys.modules:
            from dtrain.tensorflow import averaging, averaging_keras2

            (averaging if is_keras3 else averaging_keras2).compile_model(original, self, *args, **kwargs)
        else:
            original(self, *args, **kwargs)

    trainer.compile = compile


def _mend_callbacks(module: ModuleType) -> None:
    from dtrain.tensorflow import horovod_callbacks

    horovod_callbacks.mend(module)


def _refuse_state(module: ModuleType) -> None:
    original = module.TensorFlowKerasState.__init__

    def __init__(self: Any, model: Any, optimizer: Any = None, *args: Any, **kwargs: Any) -> None:
        from dtrain.tensorflow import averaging

        if averaging.is_keras3_optimizer(optimizer or model.optimizer):
            raise UsageError(
                "hvd.elastic.KerasState does not work with Keras 3; use tf_keras (pip install tf_keras, TF_USE_LEGACY_KERAS=1)"
            )
        original(self, model, optimizer, *args, **kwargs)

    module.TensorFlowKerasState.__init__ = __init__
