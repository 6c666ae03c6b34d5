"""``Tensorboard``: a real TensorBoard over the ``./logs`` of runs. ``export_to_tensorboard`` writes their metrics for one."""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import importlib.util
import signal
import socket
import subprocess
import sys
import tempfile
import time
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, ClassVar

from dtrain import install
from dtrain.azureml.console import warn
from dtrain.azureml.errors import Named, UserErrorException
from dtrain.azureml.experiment import Experiment
from dtrain.azureml.run import Run
from dtrain.azureml.values import list_of
from dtrain.errors import MissingDependency
from dtrain.launch.ports import free_ports, is_free
from dtrain.metrics import read_metrics
from dtrain.processes import begin_group

_START_TIMEOUT_S = 120.0
_POLL_S = 0.1


class Tensorboard(Named):
    """A TensorBoard of one or more runs, which may still go on: it reads what they write to ``./logs``.

    Called by control scripts and notebooks. It ends with :meth:`stop`, and with its process.
    """

    _differs: ClassVar = {
        "start": "reads the runs' own logs folders, as they grow; another port is taken, and said, where that one is in use",
        "(local_root=)": "a folder where each run's logs are linked to, as the runs are here; without runs, the folder to show",
    }
    _options: ClassVar = ("runs", "local_root", "port")

    def __init__(self, runs: Sequence[Run] | Run, local_root: str | None = None, port: int = 6006) -> None:
        self._runs = [runs] if isinstance(runs, Run) else list_of("runs", runs)
        for each in self._runs:
            if not isinstance(each, Run):
                raise UserErrorException(f"Tensorboard takes runs, not {type(each).__name__} {each!r:.80}")
        if not self._runs and local_root is None:
            raise UserErrorException("Tensorboard([]) has nothing to show; give runs, or local_root= for a folder of event files")
        if not self._runs and not Path(str(local_root)).is_dir():
            raise UserErrorException(f"local_root={local_root!r} is not a folder (from {Path.cwd()}), and no runs are given")
        self._local_root = None if local_root is None else Path(local_root).absolute()
        self._port = port
        self._process: subprocess.Popen[bytes] | None = None
        self._output: IO[bytes] | None = None
        self._links: tempfile.TemporaryDirectory[str] | None = None

    def start(self, start_browser: bool = False) -> str:
        """Start TensorBoard, and return its URL when it answers; ``start_browser`` opens that, too. Blocks until then.

        To be called by a thread that stays: TensorBoard ends with it. Raises MissingDependency when TensorBoard is not
        installed, UserErrorException when it ends before it answers.
        """
        _check_installed()
        if self._process is not None:
            raise UserErrorException("this Tensorboard runs already; stop() ends it")
        port = self._port
        if not is_free(port):
            port = free_ports(1)[0]
            warn(f"port {self._port} is in use; TensorBoard takes port {port}")
        argv = [
            sys.executable,
            "-m",
            "tensorboard.main",
            "--host",
            "localhost",
            "--port",
            str(port),
            "--logdir",
            str(self._folder()),
        ]
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 -- until it is stopped
        # A Ctrl-C, in a terminal or of a notebook's cell, is not TensorBoard's; the end of this process, however it comes, is.
        prepare = functools.partial(begin_group, signal.SIGTERM)
        self._process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=self._output, stderr=self._output, preexec_fn=prepare
        )
        atexit.register(self.stop)
        try:
            self._wait_for_answer(port)
        except BaseException:
            self.stop()
            raise
        url = f"http://localhost:{port}/"
        if start_browser:
            webbrowser.open(url)
        return url

    def _wait_for_answer(self, port: int) -> None:
        assert self._process is not None
        assert self._output is not None
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not _answers(port):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._output.seek(0)
                said = self._output.read().decode(errors="replace")[-2000:]
                raise UserErrorException(f"TensorBoard did not start; it said:\n{said}")
            time.sleep(_POLL_S)

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
        if self._links is not None:
            self._links.cleanup()
            self._links = None

    def _folder(self) -> Path:
        """The folder to show, with each run's logs by its id. Raises UserErrorException where it holds others of these names."""
        if self._local_root is None:
            self._links = tempfile.TemporaryDirectory(prefix="dtrain-tensorboard-")
            folder = Path(self._links.name)
        else:
            folder = self._local_root
            folder.mkdir(parents=True, exist_ok=True)
        for run in self._runs:
            link, logs = folder / run.id, run._layout.logs.absolute()
            if not link.is_symlink() and not link.exists():
                link.symlink_to(logs)
            elif link.resolve() != logs.resolve():
                raise UserErrorException(f"{link} is there already, and not the logs of that run; use another local_root=")
        return folder

    def __enter__(self) -> Tensorboard:
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError), contextlib.closing(socket.create_connection(("localhost", port), timeout=1)):
        return True
    return False


def export_to_tensorboard(run_data: Any, logdir: str, logger: Any = None, recursive: bool = True) -> None:
    """Write the metrics of a Run, or of an Experiment's runs, as event files in ``logdir``, for ``Tensorboard([], logdir)``.

    Numbers of rank 0, by the steps and times at which they were logged; of ``recursive`` the runs below as well. Blocks.
    Raises MissingDependency when TensorBoard is not installed, UserErrorException for what is neither.
    """
    _check_installed()
    events = importlib.import_module("tensorboard.summary")
    if not isinstance(run_data, Run | Experiment):
        raise UserErrorException(f"export_to_tensorboard() takes a Run or an Experiment, not {run_data!r:.120}")
    runs = [run_data] if isinstance(run_data, Run) else list(run_data.get_runs())
    children = [child for run in runs for child in run.get_children(recursive=True)] if recursive else []
    for run in [*runs, *children]:
        writer = events.Writer(str(Path(logdir) / run.id))
        for row in read_metrics(run._layout).rows.get(0, []):
            for name in row.keys() - {"t", "step"}:
                if isinstance(row[name], int | float):
                    writer.add_scalar(name, row[name], row["step"], wall_time=row["t"])
        writer.close()


def _check_installed() -> None:
    if importlib.util.find_spec("tensorboard") is None:
        raise MissingDependency(f"TensorBoard is not installed for {sys.executable}; {install.TENSORBOARD} brings it")
