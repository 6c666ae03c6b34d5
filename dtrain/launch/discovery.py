"""Which hosts an elastic job may use now: the user's program says it."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

from dtrain.errors import NotRunnable, UsageError
from dtrain.hosts import Host, parse_host_lines
from dtrain.launch import ssh

_ANSWER_S = 30.0
# From one try to reach a host to the next.
_TRY_AGAIN_S = 5.0


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


class Discovery:
    """The hosts that there are now: fixed ones, or those that a program prints. Horovod's driver asks every second.

    A host that is new, or on which a worker failed, counts when ssh reaches it: a worker that is counted on and never begins
    takes the others with it, which wait for it in ``hvd.init()`` until Horovod aborts them.
    """

    def __init__(self, hosts: tuple[Host, ...], program: Path | None, say: Callable[[str], None]) -> None:
        """``hosts`` are those to begin with; ``say`` shows words."""
        self._program, self._say = program, say
        self._hosts = hosts if program is None else ()
        self._problem = ""
        self._answers: set[str] | None = None
        self._asked: set[str] = set()
        # A copy: another thread may change the environment while a child of this one is given it.
        self._environ = dict(os.environ)
        self._ssh_problem = ""

    def find_available_hosts_and_slots(self) -> dict[str, int]:
        """Slots by the host's label: Horovod takes no colon in a name. While the program fails, the hosts are those of its last
        answer."""
        if self._program is not None:
            try:
                self._hosts, problem = discover_hosts(self._program), ""
            except NotRunnable as error:
                problem = str(error)
            if problem and problem != self._problem:
                self._say(f"{problem}; until it answers, the hosts are taken to be as they were")
            self._problem = problem
        if self._answers is None:  # who starts the job has asked these
            self._answers = {host.name for host in self._hosts}
        return {host.label: host.slots for host in self._hosts if self._is_there(host)}

    def doubt(self, name: str) -> None:
        """A worker failed on this host, which may be gone."""
        if self._answers is not None:
            self._answers.discard(name)

    def _is_there(self, host: Host) -> bool:
        assert self._answers is not None
        if host.name in self._answers or ssh.is_here(host):
            return True
        if host.name not in self._asked:
            self._asked.add(host.name)
            threading.Thread(target=self._ask, args=(host.name, self._answers), daemon=True).start()
        return False

    def _ask(self, name: str, answers: set[str]) -> None:
        null, command = subprocess.DEVNULL, ssh.command(name, Path("/"), {}, ["true"])
        try:
            asked = subprocess.run(command, env=self._environ, stdin=null, stdout=null, stderr=null, check=False)
            answered = asked.returncode == 0
        except OSError as error:
            answered = False
            if str(error) != self._ssh_problem:  # once
                self._ssh_problem = str(error)
                self._say(f"ssh cannot be started, and host {name} is taken not to answer: {error}")
        if answered:
            answers.add(name)
        else:
            time.sleep(_TRY_AGAIN_S)
        self._asked.discard(name)
