"""How a rank ends that no guard of dtrain's watches: a script that mpirun or a person started."""

from __future__ import annotations

import atexit
import dis
import os
import sys
import time
import traceback
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Literal, NoReturn

from dtrain.comm import Communicator
from dtrain.files import write_json
from dtrain.layout import RankLayout
from dtrain.status import RankFailure, exception_message, write_record


class Ending:
    """Records how this process ends, and does not let the other ranks wait for one that failed."""

    def __init__(self, comm: Communicator, files: RankLayout) -> None:
        self._comm, self._files = comm, files
        self._pid = os.getpid()
        self._main = _main_frame()
        self._exit_code: int | None = None
        self._excepthook: Callable[..., Any] = sys.excepthook
        self._exit = sys.exit

    def watch(self) -> None:
        """Begin; once a process."""
        sys.excepthook = self._on_exception
        # Only to learn the code: neither excepthook nor atexit is told of a SystemExit's.
        sys.exit = self._on_exit
        atexit.register(self._at_exit)

    def _on_exception(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        self._excepthook(kind, error, trace)
        if os.getpid() == self._pid:
            exit_code = 130 if issubclass(kind, KeyboardInterrupt) else 1
            text = "".join(traceback.format_exception(kind, error, trace))
            self._fail("exception", exit_code, exception_message(error), text)

    def _on_exit(self, code: Any = None, /) -> NoReturn:
        self._exit_code = 0 if code is None else code & 0xFF if isinstance(code, int) else 1
        self._exit(code)

    def _at_exit(self) -> None:
        if os.getpid() != self._pid or self._files.error.exists():
            return
        if _returned(self._main) or self._exit_code == 0:
            write_json(self._files.done, {"time": time.time()})
        elif self._exit_code is not None:
            self._fail("exit", self._exit_code, f"called sys.exit with code {self._exit_code}", "")
        else:
            message = "raised SystemExit, with a code that cannot be seen from within; sys.exit() says it"
            self._fail("exit", 1, message, "")

    def _fail(self, kind: Literal["exception", "exit"], exit_code: int, message: str, text: str) -> None:
        failure = RankFailure.now(self._comm.rank, kind, exit_code, message, text)
        try:
            write_record(self._files.error, failure)
        finally:
            if self._comm.size > 1:
                self._comm.abort(exit_code)


def _main_frame() -> FrameType | None:
    """The frame that executes the script, outermost of this thread; None in an interactive session."""
    frame: FrameType | None = sys._getframe()
    found = None
    while frame is not None:
        if frame.f_globals is sys.modules["__main__"].__dict__ and frame.f_code.co_name == "<module>":
            found = frame
        frame = frame.f_back
    return found


def _returned(frame: FrameType | None) -> bool:
    """Whether a frame that has ended did so by its last statement, and not by an exception such as SystemExit.

    A frame that somebody keeps also keeps the place where it stopped (3.10 to 3.13).
    """
    if frame is None:
        return True
    return dis.opname[frame.f_code.co_code[frame.f_lasti]].startswith("RETURN_")
