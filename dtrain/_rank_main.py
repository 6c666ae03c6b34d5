"""The first code in every rank that dtrain launches: ``python -m dtrain._rank_main SCRIPT ARGS...`` (or ``-m MODULE``).

Three processes a rank. The *guard* is what the launcher started; it forks the *script*'s process, waits for it, and records how
it ended, so that also a rank that is killed or crashes in native code leaves a record with its time and signal. Guard and
script die together: each is told by the kernel when its parent is gone. The third only waits, and ends what the script started
where the guard is killed too fast to do so (``processes.end_group_with_me``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import functools
import importlib
import os
import re
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType, ModuleType
from typing import NoReturn

from dtrain._after_import import AfterImport
from dtrain._control import Control, Orders
from dtrain._masked_pipe import MaskedPipe
from dtrain._tracebacks import strip_frames, tell
from dtrain.binding import plan_binding
from dtrain.env import RankEnv, given_secrets, other_world, quiet_tensorflow, unescape_arguments
from dtrain.errors import DtrainError, RankError
from dtrain.files import write_json
from dtrain.layout import RankLayout
from dtrain.masking import Masker
from dtrain.processes import (
    DUMP_STACKS,
    END_SCRIPT,
    LAUNCHER_IS_GONE,
    ProcessRecord,
    die_with_parent,
    end_group_with_me,
    signal_name,
)
from dtrain.progress import PROGRESS
from dtrain.resources import bound_variables, own_threads, own_topology, wanted_binding
from dtrain.status import (
    LOST_PEER,
    ORPHANED,
    Kind,
    RankFailure,
    RankProcess,
    exception_kind,
    exception_message,
    failure_to_line,
    write_record,
)
from dtrain.switches import azureml_mode, legacy_kinds

_STAY_S = 0.05
_BEAT_S = 1.0
_UNSEEN = (
    "its host does not see the run folder {root}; use a workspace that all hosts see (--workspace), or with -H let it be copied "
    "(--no-shared-fs)"
)
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class Recorder:
    """Writes the rank's own records; falls back to the launcher's pipe when the rank's files cannot be written.

    Where a supervisor reads them they are not synced to the disk: the outcome, which it makes of them, is.
    """

    def __init__(self, rank_env: RankEnv, files: RankLayout, masker: Masker) -> None:
        self.env, self.files, self.masker = rank_env, files, masker
        # The pipe to the launcher, before the rank's output goes to its file.
        self._pipe = os.dup(2)

    def failure(self, kind: Kind, exit_code: int, message: str, trace: str = "", when: float | None = None) -> None:
        """Record how the rank failed, unless it is recorded already."""
        if self.files.error.exists():
            return
        message, trace = self.masker.text(message), self.masker.text(trace)
        record = RankFailure.now(self.env.number, kind, exit_code, message, trace, task=str(self.env.task or ""))
        record = record if when is None else dataclasses.replace(record, time=when)
        try:
            write_record(self.files.error, record, durable=not self.env.supervised)
        except OSError:
            os.write(self._pipe, f"{failure_to_line(record)}\n".encode())

    def done(self, *, early: bool) -> int:
        """Record that the rank ended well, and return its exit code. ``early``: its script was not over, as others see it."""
        try:
            write_json(self.files.done, {"time": time.time(), "early": early}, durable=not self.env.supervised)
        except OSError as error:
            self.failure(
                "exit", 1, f"finished, but its completion record cannot be written: {error.strerror} ({self.files.done})"
            )
            return 1
        return 0


def main() -> NoReturn:
    launcher = os.getppid()
    rank_env = RankEnv.read()
    control = Control() if rank_env.controlled else None
    if control is not None:
        control.learn_environment()
    run = rank_env.layout
    if run is None:
        raise RankError("dtrain._rank_main is started by `dtrain run`, which says in DTRAIN_RUN_DIR where the run lies")
    files = run.rank(rank_env.number)
    recorder = Recorder(rank_env, files, Masker(given_secrets().values()))
    if rank_env.supervised and not run.root.is_dir():
        recorder.failure("exit", 1, _UNSEEN.format(root=run.root))
        sys.exit(1)
    files.root.mkdir(parents=True, exist_ok=True)
    for record in (files.error, files.done, files.orders):
        record.unlink(missing_ok=True)  # of an earlier start in the same folder (a pasted line of --dry-run)
    _bind(recorder)
    output = None
    if rank_env.supervised:
        _send_output_to(files.output_log)
        output = MaskedPipe(recorder.masker, os.dup(1)) if recorder.masker.forms else None
    # The script's process waits until its record is written: then whoever ends the rank finds both processes.
    signal.signal(DUMP_STACKS, signal.SIG_IGN)  # until the script's process can answer it
    ready_read, ready_write = os.pipe()
    guard = os.getpid()
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        die_with_parent(signal.SIGKILL)
        if os.getppid() != guard:
            os._exit(128 + signal.SIGKILL)
        os.close(ready_write)
        os.read(ready_read, 1)  # ends when the guard has closed its end, or is gone
        os.close(ready_read)
        if control is not None:
            control.drop()
        if output is not None:
            output.be_output()
        _run_script(recorder, unescape_arguments(sys.argv[1:]))
    os.close(ready_read)
    orders = Orders(files.orders, run.over) if rank_env.ordered and rank_env.supervised else None
    _Guard(recorder, child, control, orders, output).watch(launcher, ready_write)


def _bind(recorder: Recorder) -> None:
    """Keep this process, and so the script's, to what ``--bind`` gives the rank. Ends it where this host has not enough."""
    try:
        if (bind := wanted_binding()) == "none":
            return
        host = own_topology(by_slurm=recorder.env.ordered)
        mine = plan_binding(bind, recorder.env.local_size, host)[recorder.env.local_rank]
        os.sched_setaffinity(0, mine.cpus)
        os.environ.update(bound_variables(mine, os.environ))
    except (DtrainError, OSError) as error:
        recorder.failure("exit", 2, str(error))
        sys.exit(2)


def _send_output_to(path: Path) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]


class _Guard:
    """Waits for the script's process, passes signals on to it, records its end, and ends alike."""

    def __init__(
        self, recorder: Recorder, child: int, control: Control | None, orders: Orders | None, output: MaskedPipe | None
    ) -> None:
        self._recorder, self._child, self._control, self._orders, self._output = recorder, child, control, orders, output
        # slurmd signals every process of a step itself: passed on, the script would be told twice.
        self._passes_on = recorder.env.vocabulary != "slurm"
        self._ended_by: str | None = None
        self._orphaned_at: float | None = None
        self._stays = False
        self._may_go = False
        self._leave_group_alone = end_group_with_me(child, control.connection if control is not None else None)

    def watch(self, launcher: int, ready: int) -> NoReturn:
        for number in _FORWARDED:
            signal.signal(number, self._forward)
        signal.signal(END_SCRIPT, self._end_script)
        signal.signal(LAUNCHER_IS_GONE, self._launcher_is_gone)
        die_with_parent(LAUNCHER_IS_GONE)
        if os.getppid() != launcher:
            self._launcher_is_gone()
        self._write_first_records()
        if self._control is not None:
            self._control.obey(self._child)
        if self._output is not None:
            self._output.begin()
        os.close(ready)
        signal.signal(signal.SIGALRM, self._beat)
        signal.setitimer(signal.ITIMER_REAL, _BEAT_S, _BEAT_S)
        # Reaped in the end only: its id must not be given to another process while somebody here may signal it.
        ended = os.waitid(os.P_PID, self._child, os.WEXITED | os.WNOWAIT)
        assert ended is not None
        if self._output is not None:
            self._output.finish()
        exit_code = self._record(ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status)
        while self._stays:
            # A rank that leaves makes mpirun end the others at once, which may still be using their grace time.
            time.sleep(_STAY_S)  # not pause(): the signal may come between the test and it
        self._leave_group_alone()
        os.waitpid(self._child, 0)
        os._exit(exit_code)

    def _write_first_records(self) -> None:
        """Before the script begins. Ends the rank where its folder cannot be written: nor could its outcome be recorded there."""
        files, ordered = self._recorder.files, self._orders is not None
        record = RankProcess(**vars(ProcessRecord.of(self._child)), guard=ProcessRecord.of(os.getpid()), ordered=ordered)
        try:
            write_record(files.process, record, durable=False)
            PROGRESS.write(files.heartbeat)  # later ones overwrite it, which needs no room on a disk that has become full
        except OSError as error:
            self._recorder.failure("exit", 1, f"its folder cannot be written: {error.strerror} ({files.root})")
            os.kill(self._child, signal.SIGKILL)
            os._exit(1)

    def _beat(self, *_: object) -> None:
        if self._control is not None:
            self._control.beat()
        if self._orders is not None:
            self._orders.obey(self._child)
        with contextlib.suppress(OSError):
            PROGRESS.write(self._recorder.files.heartbeat)
            # It is when a file is closed that a network file system shows other hosts what was written (nfs(5), close-to-open);
            # also what others wrote who keep it open.
            os.close(os.open(self._recorder.files.output_log, os.O_WRONLY | os.O_CLOEXEC))

    def _record(self, code: int) -> int:
        """Record how the script's process ended (its code, or minus a signal's number), and return the rank's exit code."""
        if code != 0 or self._control is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._child, signal.SIGKILL)  # what the script started: nobody may be left who could end it later
        if code == 0:
            return self._recorder.done(early=self._ended_by is None and PROGRESS.read().over is None)  # os._exit(0)
        exit_code = 128 - code if code < 0 else code
        if self._ended_by is not None:
            self._recorder.failure("ended", exit_code, self._ended_by, when=self._orphaned_at)
        elif code < 0:
            self._recorder.failure("signal", exit_code, f"killed by {signal_name(-code)}")
        elif exit_code == LOST_PEER.get(self._recorder.env.vocabulary):
            message = f"exited with code {exit_code}, as MPI ends a rank that lost its connection to another one"
            self._recorder.failure("consequence", exit_code, message)
        else:
            self._recorder.failure("exit", exit_code, f"exited with code {exit_code}")
        return exit_code

    def _forward(self, number: int, _frame: FrameType | None) -> None:
        self._stays = False
        if number in (signal.SIGTERM, signal.SIGINT):
            self._may_go = True
            self._ended_by = self._ended_by or f"ended by {signal_name(number)}"
        if self._passes_on:
            self._signal_script(number)

    def _signal_script(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._child, number)

    def _end_script(self, _number: int, _frame: FrameType | None) -> None:
        may_go = self._may_go  # the launcher's own SIGTERM, sent later, is delivered before a real-time signal
        if not self._passes_on and self._ended_by is None:
            self._signal_script(signal.SIGTERM)
        self._forward(signal.SIGTERM, None)
        self._may_go, self._stays = may_go, not may_go

    def _launcher_is_gone(self, *_: object) -> None:
        # Nobody is left to end what the script started, so that goes with it: its process group.
        self._stays = False
        # The time is what others, who fail of this rank's end, are compared with.
        self._orphaned_at = time.time() if self._ended_by is None else None
        self._ended_by = self._ended_by or ORPHANED
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child, signal.SIGKILL)


def _run_script(recorder: Recorder, argv: Sequence[str]) -> NoReturn:
    """Run the user's script or module as ``__main__``, as Python itself would, and leave with its exit code."""
    quiet_tensorflow()
    own_threads(recorder.env.rank, os.environ)
    _watch_imports(recorder.env)
    if azureml_mode():
        importlib.import_module("dtrain.azureml.rank").begin(recorder.env)
    faulthandler.enable()
    with contextlib.suppress(OSError):
        faulthandler.register(DUMP_STACKS, file=open(recorder.files.stack, "ab", buffering=0))  # noqa: SIM115 -- until the end
    run_path: Callable[[str], object] = functools.partial(runpy.run_path, run_name="__main__")
    if kinds := legacy_kinds():
        run_path = importlib.import_module("dtrain.legacy").runner(kinds, Path.cwd(), rank=recorder.env.rank)
    script = os.getpid()
    try:
        if argv[0] == "-m":
            sys.argv = list(argv[1:])
            _put_first(os.getcwd())
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = list(argv)
            _put_first(str(Path(argv[0]).absolute().parent))
            run_path(argv[0])
    except SystemExit as error:
        if os.getpid() != script:  # a process that the script forked, which ends as it would by itself; the rank goes on
            raise
        _leave(recorder, _exit_code(recorder, error))
    except BaseException as error:
        error = error.with_traceback(strip_frames(error.__traceback__))
        sys.excepthook(type(error), error, error.__traceback__)
        exit_code = 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
        if os.getpid() != script:
            sys.exit(exit_code)
        recorder.failure(exception_kind(error, recorder.env.rank), exit_code, exception_message(error), tell(error))
        _leave(recorder, exit_code)
    if os.getpid() != script:
        sys.exit()
    _leave(recorder, 0)


def _put_first(folder: str) -> None:
    """Do to sys.path what ``python script.py`` and ``python -m`` do; for our own start it holds the current folder there."""
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = folder


def _exit_code(recorder: Recorder, error: SystemExit) -> int:
    """The exit code that Python gives a SystemExit; anything but 0 is recorded with the place it came from."""
    if error.code is None or error.code == 0:
        return 0
    exit_code = error.code & 0xFF if isinstance(error.code, int) else 1
    if exit_code == 0:  # the operating system keeps eight bits of 256
        return 0
    if not isinstance(error.code, int):
        print(error.code, file=sys.stderr)
    trace = "".join(traceback.format_tb(strip_frames(error.__traceback__)))
    recorder.failure(
        "exit",
        exit_code,
        f"called sys.exit({error.code!r})",
        f"Traceback (most recent call last):\n{trace}SystemExit: {error.code}",
    )
    return exit_code


def _leave(recorder: Recorder, exit_code: int) -> NoReturn:
    """End the script's process.

    A failed rank of several must not reach MPI_Finalize, which mpi4py calls at exit: it waits there for ranks that wait for it.
    """
    mpi = sys.modules.get("mpi4py.MPI")
    finalizes = mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized() and mpi.COMM_WORLD.Get_size() > 1
    PROGRESS.end(finalizes=finalizes)
    with contextlib.suppress(OSError):
        PROGRESS.write(recorder.files.heartbeat)  # now: the guard may be killed before its next beat, for this rank's leaving
    if exit_code != 0 and finalizes:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(exit_code)
    sys.exit(exit_code)


def _watch_imports(rank_env: RankEnv) -> None:
    """See to what goes wrong silently in libraries that the script may use, whether or not it knows of dtrain."""

    def check_world(module: ModuleType) -> None:
        # An mpirun and an mpi4py of different MPIs make N worlds of one rank, each of which trains everything and exits with 0.
        if module.Is_initialized() and (found := module.COMM_WORLD.Get_size()) != rank_env.size:
            raise other_world(rank_env.size, found, re.split(r"[,\n]", module.Get_library_version())[0])
        if rank_env.watched:
            importlib.import_module("dtrain._mpi_calls").watch_calls(module)

    if rank_env.world_size > 1:
        # mpi4py's package puts a finder of its own, which picks the build for the MPI it found, in front of ours.
        watch = AfterImport({"mpi4py": lambda _: watch.come_first(), "mpi4py.MPI": check_world})
        watch.install()
    # dtrain.tensorflow mends both when it is imported: Horovod's Keras calls, on a Keras that it does not know; and, in a
    # cluster, workers of TensorFlow 1 that would wait for one that has left.
    mended = ["horovod"] if rank_env.task is None or rank_env.elastic else ["horovod", "tensorflow"]
    AfterImport(dict.fromkeys(mended, _mend)).install()


def _mend(_module: ModuleType) -> None:
    importlib.import_module("dtrain.tensorflow")


if __name__ == "__main__":
    main()
