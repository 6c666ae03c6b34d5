"""Which hosts an elastic job may use now: the user's program says it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from dtrain.errors import NotRunnable, UsageError
from dtrain.hosts import Host, parse_host_lines

_ANSWER_S = 30.0


def discover_hosts(program: Path) -> tuple[Host, ...]:
    """Run the program, in its own folder, and return the hosts that it printed; none are none. Blocks until it has answered.

    Raises NotRunnable where it fails, or prints what names no host.
    """
    try:
        done = subprocess.run(
            [program],
            cwd=program.parent,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_ANSWER_S,
            check=False,
        )
    except OSError as error:
        raise NotRunnable(
            f"--discovery {program} cannot be run: {os.strerror(error.errno or 0)}; does it begin with #! ?"
        ) from error
    except subprocess.TimeoutExpired:
        raise NotRunnable(
            f"--discovery {program} did not end within {_ANSWER_S:g} s; it has to print the hosts, and end"
        ) from None
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise NotRunnable(f"--discovery {program} failed with exit code {done.returncode}: {said}")
    try:
        return parse_host_lines(done.stdout.splitlines(), f"--discovery {program}")
    except UsageError as error:
        raise NotRunnable(str(error)) from None
