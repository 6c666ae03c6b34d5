"""Operating-system processes: how one is found again, and how one is made to die with its parent."""

from __future__ import annotations

import ctypes
import signal
import socket
import sys
from dataclasses import dataclass

import psutil

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True, kw_only=True)
class ProcessRecord:
    """A process that can be found again: a process id alone may have been given to another since.

    ``started`` is in Unix seconds, as the operating system tells it.
    """

    host: str
    pid: int
    started: float

    @staticmethod
    def of(pid: int) -> ProcessRecord:
        return ProcessRecord(host=socket.gethostname(), pid=pid, started=psutil.Process(pid).create_time())

    def vanished(self) -> bool:
        """True when the process is known to be gone; of a process on another host that is not known."""
        if self.host != socket.gethostname():
            return False
        try:
            process = psutil.Process(self.pid)
            # The tolerance covers the clock tick of 10 ms in which the kernel counts starts.
            return bool(abs(process.create_time() - self.started) > 0.05) or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True
        except psutil.Error:
            return False


def die_with_parent(number: signal.Signals) -> None:
    """Have the kernel send this process the signal when its parent is gone, however that ended. Linux only; else nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
