"""The launcher's own temporary folders: removed on this host also where dtrain itself is killed."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

ON_HOSTS = Path("/tmp")
"""Where they are made on every host of a job, each of which has it."""

# With 64 KiB the daemons of Open MPI's mpirun die without a word, with 256 they work.
_NEEDED_BYTES = 1 << 18

# A daemon of mpirun's that is being killed may still make something in it.
_REMOVE = 'cat >/dev/null; rm -rf "$1" 2>/dev/null || { sleep 1; rm -rf "$1"; }'


def why_not_made(folder: Path) -> str:
    """Why mpirun could not keep its files in a folder of this host, and what to do; empty where it can. Tries it."""
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            if file.write(os.urandom(_NEEDED_BYTES)) == _NEEDED_BYTES:  # less, where the disk is full after that
                return ""
            why = "no room for 256 KiB"
    except OSError as error:
        why = error.strerror or str(error)
    advice = f"make room there, or give yourself write permission (df -h {folder}; ls -ld {folder})"
    return f"{folder} cannot hold mpirun's files: {why}; {advice}"


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
