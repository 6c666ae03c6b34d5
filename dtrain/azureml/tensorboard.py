"""``Tensorboard``: a real TensorBoard over the ``./logs`` of runs."""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import IO, Any, ClassVar

from dtrain import install
from dtrain.azureml.errors import Named, UserErrorException
from dtrain.azureml.run import Run
from dtrain.errors import MissingDependency
from dtrain.launch.ports import free_ports, is_free

_START_TIMEOUT_S = 120.0
_POLL_S = 0.1


class Tensorboard(Named):
    """A TensorBoard of one or more runs, which may still go on: it reads what they write to ``./logs``.

    Called by control scripts and notebooks. It ends with :meth:`stop`, and with its process.
    """

    _differs: ClassVar = {
        "start": "reads the runs' own logs folders, as they grow; another port is taken where that one is in use",
    }

    def __init__(self, runs: Sequence[Run] | Run, local_root: str | None = None, port: int = 6006) -> None:
        if local_root is not None:
            raise UserErrorException("local_root= has no effect: the runs' logs are on this machine already; leave it out")
        self._runs = [runs] if isinstance(runs, Run) else list(runs)
        if not self._runs:
            raise UserErrorException("Tensorboard() needs a run at least")
        self._port = port
        self._process: subprocess.Popen[bytes] | None = None
        self._output: IO[bytes] | None = None

    def start(self, start_browser: bool = False) -> str:
        """Start TensorBoard, and return its URL when it answers. Blocks until then.

        Raises MissingDependency when TensorBoard is not installed, UserErrorException when it ends before it answers.
        """
        if start_browser:
            raise UserErrorException("start_browser=True: open the URL that start() returns yourself")
        if importlib.util.find_spec("tensorboard") is None:
            raise MissingDependency(f"TensorBoard is not installed for {sys.executable}; {install.TENSORFLOW} brings it")
        if self._process is not None:
            raise UserErrorException("this Tensorboard runs already; stop() ends it")
        port = self._port if is_free(self._port) else free_ports(1)[0]
        argv = [sys.executable, "-m", "tensorboard.main", "--host", "localhost", "--port", str(port), *self._where()]
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 -- until it is stopped
        self._process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=self._output, stderr=self._output)
        atexit.register(self.stop)
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not _answers(port):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._output.seek(0)
                said = self._output.read().decode(errors="replace")[-2000:]
                self.stop()
                raise UserErrorException(f"TensorBoard did not start; it said:\n{said}")
            time.sleep(_POLL_S)
        return f"http://localhost:{port}/"

    def stop(self) -> None:
        """End TensorBoard; blocks until it has ended. Nothing happens when it does not run."""
        atexit.unregister(self.stop)
        process, self._process = self._process, None
        if process is not None:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._output is not None:
            self._output.close()
            self._output = None

    def _where(self) -> list[str]:
        folders = {run.id: str(run._layout.logs) for run in self._runs}
        if len(folders) == 1:
            return ["--logdir", *folders.values()]
        return ["--logdir_spec", ",".join(f"{name}:{folder}" for name, folder in folders.items())]

    def __enter__(self) -> Tensorboard:
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError), contextlib.closing(socket.create_connection(("localhost", port), timeout=1)):
        return True
    return False
