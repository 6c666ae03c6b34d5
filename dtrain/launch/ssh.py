"""Processes on other hosts, started by the ssh client; what it says when that fails.

A process there hangs on its standard input, which leads here: it is told what to do by lines, and ends when the input does, for
whatever reason. ssh itself would leave it running.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import re
import shlex
import signal
import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from dtrain import env
from dtrain.hosts import Host
from dtrain.processes import signal_name
from dtrain.status import VANISHED, Kind

FAILED = 255
"""ssh's exit code when it cannot connect, loses the connection, or its command was killed by a signal."""
CONNECT_S = 10
LOST_S = 6.0
"""Seconds of silence, as a rule, after which a host is lost."""
MOST_BEGINNING = 8
"""How many connections to one host may be about to begin. sshd refuses some as soon as ten are (MaxStartups 10:30:100,
sshd_config(5)), and one more may be an agent's."""
# What else the user's configuration may say is kept, but for a connection shared with others: it would outlive this client.
CONNECT_OPTIONS = (
    *("-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_S}", "-o", "ControlMaster=no", "-o", "ControlPath=none"),
)
_OPTIONS = (*CONNECT_OPTIONS, "-o", "LogLevel=INFO", "-T", "-x")  # at INFO ssh says why a connection broke
_BROKE = re.compile(r"timeout, server|timed out|connection .*(closed|reset|refused)|broken pipe|disconnect", re.IGNORECASE)
_NOISE = re.compile(r"warning: permanently added|^\s*$|pseudo-terminal", re.IGNORECASE)
_ERROR = re.compile(r"error|exception|not found|no such|denied|refused|failed|could not|timeout|timed out|closed", re.IGNORECASE)
_KEPT_LINES = 20

# What ssh, or the shell over there, says → what the user can do about it.
_ADVICE = (
    ("could not resolve", "no such host; give the name as ssh knows it"),
    ("permission denied", "ssh must not ask for a password: put your key into the host's authorized_keys (ssh-copy-id)"),
    ("host key verification failed", "ssh does not know its key; connect once by hand: ssh HOST"),
    ("connection refused", "no sshd listens there; start it, or set its port in ~/.ssh/config"),
    ("no route to host", "it is down, or not in this network"),
    ("timed out", "it is down, or a firewall is between"),
    ("no module named dtrain", "install dtrain in the same Python there, or share its folder"),
    ("not found", "this Python is not there; install it at the same path on all hosts, or share its folder"),
    ("no such file", "this Python or folder is not there; share its file system at the same path on all hosts"),
)
# What a process on another host needs before it can be told the rest, to find the same Python and its libraries. It stands on a
# command line: so each is named that may, and none that may be a secret (PYTHON_API_KEY, LD_API_KEY).
_PYTHON = "DEBUG|DONTWRITEBYTECODE|HASHSEED|HOME|IOENCODING|MALLOC|NOUSERSITE|OPTIMIZE|PATH|PLATLIBDIR|PYCACHEPREFIX|SAFEPATH"
_MALLOC = "ARENA_MAX|ARENA_TEST|CHECK_|CONF|MMAP_MAX_|MMAP_THRESHOLD_|PERTURB_|TOP_PAD_|TRIM_THRESHOLD_"
_TO_START = re.compile(
    rf"PATH|DTRAIN_MPIRUN|PYTHON({_PYTHON}|UNBUFFERED|USERBASE|UTF8|WARNINGS)|VIRTUAL_ENV|LD_(LIBRARY_PATH|PRELOAD|BIND_NOW)"
    rf"|LANG|LC_[A-Z]+|MALLOC_({_MALLOC})|GLIBC_TUNABLES"
)
# What is about this host, this terminal or this login, and would mislead a process on another host.
_OF_ONE_HOST = re.compile(
    r"(HOME|HOSTNAME|USER|LOGNAME|SHELL|PWD|OLDPWD|SHLVL|TERM|TERM_.*|DISPLAY|XAUTHORITY|MAIL|_|TMPDIR|TMP|TEMP"
    r"|SSH_.*|XDG_.*|DBUS_.*|BASH_FUNC_.*)"
)


def starting_variables(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Those of this process's variables without which a process on another host would not find its Python."""
    environ = os.environ if environ is None else environ
    return {name: value for name, value in environ.items() if _TO_START.fullmatch(name)}


def sent_variables(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """What of :func:`dtrain.env.inherited` a process on another host is given: all but what is about this host."""
    return {name: value for name, value in env.inherited(environ).items() if not _OF_ONE_HOST.fullmatch(name)}


def command(
    host: str, cwd: Path, environment: Mapping[str, str], argv: Sequence[str], *, lost_s: float = LOST_S
) -> tuple[str, ...]:
    """The local command that runs ``argv`` on another host, which is given up after ``lost_s`` seconds of silence.

    Over there a shell reads it, so it is quoted as a whole.
    """
    variables = [f"{name}={value}" for name, value in environment.items()]
    interval = max(1, min(10, int(lost_s // 2)))
    # It waits one interval more after the last that it asks in.
    asked = max(1, round(lost_s / interval) - 1)
    alive = ("-o", f"ServerAliveInterval={interval}", "-o", f"ServerAliveCountMax={asked}")
    return ("ssh", *_OPTIONS, *alive, "--", host, f"cd {shlex.quote(str(cwd))} && exec {shlex.join(['env', *variables, *argv])}")


def is_here(host: Host) -> bool:
    """Whether a name is this machine's: an address of it is one that can be bound here."""
    if host.name in (socket.gethostname(), "localhost"):
        return True
    try:
        found = socket.getaddrinfo(host.name, 0, type=socket.SOCK_STREAM)
    except OSError:
        return False
    for family, kind, protocol, _, address in found:
        with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as probe:
            probe.bind(address)
            return True
    return False


def is_loopback(host: Host) -> bool:
    if host.name == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.name).is_loopback
    except ValueError:
        return False


def advice(said: str) -> str:
    """What to do about the words of ssh or of what it started; empty when nothing is known."""
    return next((what for words, what in _ADVICE if words in said.lower()), "")


def last_words(said: str) -> str:
    """The last line that names an error, else the last that says something."""
    lines = [line.strip() for line in said.splitlines() if not _NOISE.search(line)]
    errors = [line for line in lines if _ERROR.search(line)]
    return (errors or lines or [""])[-1]


class Connection:
    """The ssh client of one process on another host, and the way in which that is told what to do. Nothing here blocks."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        self.process = process
        self._stdin, self._stdout, self._stderr = process.stdin, process.stdout, process.stderr
        os.set_blocking(self._stderr.fileno(), False)
        os.set_blocking(self._stdin.fileno(), False)  # nobody waits for a host that does not answer
        self._unsent = self._said = b""
        self.has_begun = False
        """The process over there has said something on its standard output, as far as that was heard."""
        os.set_blocking(self._stdout.fileno(), False)

    def introduce(self, environment: Mapping[str, str]) -> None:
        """Send what the process is to have in its environment beside what its command line says: others can read that."""
        self._send(json.dumps(dict(environment)).encode())  # not orjson: a variable may hold bytes that are no text

    def tell(self, word: str) -> None:
        """Say ``end``, ``leave`` or ``stacks`` (see dtrain._control); nothing when the connection is gone."""
        self._send(word.encode())

    def attend(self) -> None:
        """Send on what the connection did not take at once, and take what ssh said. To be called now and then, as :meth:`hear`:
        what nobody takes would stop the process over there."""
        with contextlib.suppress(OSError, ValueError):  # it takes no more now, or never again
            while self._unsent:
                self._unsent = self._unsent[os.write(self._stdin.fileno(), self._unsent) :]
        self.said()

    def close(self) -> None:
        """End the process over there, without a grace time."""
        with contextlib.suppress(OSError):
            self._stdin.close()

    def said(self) -> str:
        """The last lines of what ssh, or what it started, said so far."""
        with contextlib.suppress(OSError, ValueError):
            while chunk := os.read(self._stderr.fileno(), 65536):
                self._said = b"\n".join((self._said + chunk).split(b"\n")[-_KEPT_LINES:])
        return self._said.decode(errors="replace")

    def hear(self, most_bytes: int = 1 << 16) -> bytes:
        """What came from the process's standard output since the last time; about so much at most."""
        heard = bytearray()
        with contextlib.suppress(OSError, ValueError):
            while len(heard) < most_bytes and (chunk := os.read(self._stdout.fileno(), 65536)):
                heard += chunk
        self.has_begun = self.has_begun or bool(heard)
        return bytes(heard)

    def release(self) -> None:
        """Give the descriptors back."""
        self.said()
        self.close()
        self._stderr.close()
        self._stdout.close()

    def broke(self) -> bool:
        """Of a client that ended with :data:`FAILED`: whether the connection broke. Else its process was killed by a signal."""
        return any(_BROKE.search(line) for line in self.said().splitlines())

    def how_it_ended(self, code: int, host: str, *, begun: bool) -> tuple[Kind, int, str]:
        """What is known of a process without a record whose client ended with ``code``: kind of failure, exit code, words.

        ``begun``: it was there. ``host`` is its own.
        """
        words = last_words(self.said())
        if code < 0:
            return "signal", 128 - code, f"lost: its ssh client was killed by {signal_name(-code)}"
        if not begun:
            what = advice(words)
            return "exit", code, f"did not begin: {words}{'; ' if what else ''}{what}"
        if code != FAILED:
            return "exit", code, f"exited with code {code}: {words}"
        if self.broke():
            return "exit", code, f"lost: the ssh connection to {host} broke: {words}"
        return "signal", 128 + signal.SIGKILL, VANISHED

    def _send(self, line: bytes) -> None:
        self._unsent += line + b"\n"
        self.attend()


def connect(argv: Sequence[str], cwd: Path, marker: Mapping[str, str], prepare: Callable[[], None]) -> Connection:
    """Start the ssh client. ``marker`` is added to its environment, by which the run's processes are found; ``prepare`` runs
    between fork and exec. Raises OSError."""
    process = subprocess.Popen(
        argv,
        cwd=cwd,
        env={**os.environ, **marker},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=prepare,
    )
    return Connection(process)
