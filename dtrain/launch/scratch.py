"""The launcher's own temporary folder on this host: removed also where dtrain itself is killed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

# A daemon of mpirun's that is being killed may still make something in it.
_REMOVE = 'cat >/dev/null; rm -rf "$1" 2>/dev/null || { sleep 1; rm -rf "$1"; }'


class Scratch:
    """Has a folder removed when this process ends, however it does. Made and removed by the supervisor."""

    def __init__(self, folder: Path) -> None:
        """Start the shell that waits for the end of its standard input: of this process, as nobody else has the other end."""
        self._folder = folder
        self._waiting = subprocess.Popen(
            ["sh", "-c", _REMOVE, "sh", str(folder)],
            cwd="/",
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # neither a Ctrl-C nor who kills the group of this process means it
        )

    def remove(self) -> None:
        """Remove the folder now. Blocks until it is gone."""
        assert self._waiting.stdin is not None
        self._waiting.stdin.close()
        if self._waiting.wait() != 0:  # somebody has killed it
            shutil.rmtree(self._folder, ignore_errors=True)
