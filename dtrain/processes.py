"""Operating-system processes: how one is found again, and how one is made to die with its parent."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import select
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import psutil

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
# How long who is told that its connection has ended may take to end the script, and to record that.
_END_S = 5

# Between the processes of dtrain itself; real-time signals, which no launcher and no script uses for anything.
LAUNCHER_IS_GONE = signal.SIGRTMIN
"""From the kernel to a rank's guard: what started it has died."""
END_SCRIPT = signal.SIGRTMIN + 1
"""From the supervisor to a rank's guard: end the script by SIGTERM, and stay until the launcher is told to end as well."""

DUMP_STACKS = signal.SIGRTMIN + 2
"""From anybody of this host to a rank's script: append the Python stacks of all threads to ``stack.txt``."""


@dataclass(frozen=True, kw_only=True)
class ProcessRecord:
    """A process that can be found again: a process id alone may have been given to another since.

    ``started`` is in seconds after the host's boot: the time of day may be set anew while a job runs.
    """

    host: str
    pid: int
    started: float

    @staticmethod
    def of(pid: int) -> ProcessRecord:
        return ProcessRecord(host=os.uname().nodename, pid=pid, started=_started(pid))

    def find(self) -> psutil.Process | None:
        """The process, when it is on this host, lives, and is still the same one."""
        if self.host != os.uname().nodename:
            return None
        import psutil  # late: every rank begins with this module, and does not need it

        try:
            process = psutil.Process(self.pid)
            # The tolerance covers the clock tick of 10 ms in which the kernel counts starts.
            same = abs(_started(self.pid) - self.started) < 0.05
            return process if same and process.status() != psutil.STATUS_ZOMBIE else None
        except (OSError, psutil.Error):
            return None

    def vanished(self) -> bool:
        """True when the process is known to be gone; of a process on another host that is not known."""
        return self.host == os.uname().nodename and self.find() is None


def _started(pid: int) -> float:
    """Seconds after the boot at which a process started (proc(5), field 22 of stat). Raises OSError when there is none."""
    # The name in brackets, field 2, may hold anything.
    fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")


def answers_stacks(pid: int) -> bool:
    """Whether a process has a handler for :data:`DUMP_STACKS`, which ends one that has none.

    It has none before its script begins, and none any more when the script has executed another program in its place.
    """
    with contextlib.suppress(OSError, StopIteration):  # it has ended
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        caught = next(line for line in lines if line.startswith("SigCgt:"))  # proc(5): a bit for each signal, from 1 on
        return bool(int(caught.split()[1], 16) >> (DUMP_STACKS - 1) & 1)
    return False


def die_with_parent(number: int) -> None:
    """Have the kernel send this process the signal when its parent is gone, however that ended. Linux only; else nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def end_group_with_me(leader: int, connection: int | None = None) -> Callable[[], None]:
    """Have the process group of ``leader``, a child, killed when this process ends, unless what this returns was called before.

    A process of its own waits for that: who is killed can do nothing any more. Neither can who is stopped: where the other end of
    the descriptor ``connection`` is closed and this process does not end of it, it is killed too. To be called before any thread
    is started.
    """
    read, write = os.pipe()
    me = os.getpid()
    if os.fork() == 0:
        os.setsid()  # whoever signals this process with its group does not mean that one
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)
        for name in os.listdir("/proc/self/fd"):
            if int(name) not in (read, connection):
                with contextlib.suppress(OSError):
                    os.close(int(name))
        if connection is not None and _closed_first(connection, read):
            os.kill(me, signal.SIGKILL)
        if not os.read(read, 1):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(leader, signal.SIGKILL)
        os._exit(0)
    os.close(read)

    def leave_alone() -> None:
        with contextlib.suppress(BrokenPipeError):  # somebody has killed it
            os.write(write, b".")

    return leave_alone


def _closed_first(connection: int, read: int) -> bool:
    """Wait for ``read`` to have something or to be closed, or for that not to come although ``connection`` has been closed."""
    poll = select.poll()
    poll.register(read, select.POLLIN)
    poll.register(connection, select.POLLRDHUP)  # nothing is read from it here
    while read not in (events := dict(poll.poll())):
        if events[connection]:
            poll.unregister(connection)
            return not poll.poll(1000 * _END_S)
    return False


_descriptors: tuple[int, int] | None = None


@contextlib.contextmanager
def all_descriptors() -> Iterator[None]:
    """While within, this process may open as many files as it may allow itself; what :func:`begin_group` begins, as before.

    For a supervisor, which has a few for each rank and host: 1,024 are the usual limit.
    """
    global _descriptors
    _descriptors = before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        _descriptors = None


def begin_group(number: int) -> None:
    """Between fork and exec of a launched process: a process group of its own, and :func:`die_with_parent`.

    A Ctrl-C in the terminal then reaches the supervisor alone, which ends the job in order. Not a session of its own: many
    kernels share the processor out by session (sched_autogroup), and a cluster of four tasks made 330 steps/s instead of 389. A
    process group in the background that reads the terminal would be stopped; so it is told that it cannot.
    """
    os.setpgid(0, 0)
    for stop in (signal.SIGTTIN, signal.SIGTTOU):
        signal.signal(stop, signal.SIG_IGN)
    if _descriptors is not None:
        resource.setrlimit(resource.RLIMIT_NOFILE, _descriptors)
    die_with_parent(number)


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
