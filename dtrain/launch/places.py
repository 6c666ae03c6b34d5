"""Where each rank goes: its host and, in a cluster, a port that is free there. Hosts are asked first, all at once.

``python -m dtrain.launch.places PORTS [TOKEN]`` is what each is asked: what it answers is one line of JSON.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import platform
import secrets
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import orjson

from dtrain import __version__, env
from dtrain.errors import NotRunnable, UsageError, WorkspaceError
from dtrain.hosts import Host, place
from dtrain.launch import ssh
from dtrain.launch.ports import free_ports
from dtrain.layout import Workspace
from dtrain.spec import JobSpec, available_cores

_LOOPBACK = "127.0.0.1"
_ANSWER_S = 30.0


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where one rank goes: ``name`` is how others reach the host, ``host`` what messages call it; ``cores`` are the host's."""

    host: str
    name: str
    port: int
    cores: int
    over_ssh: bool = False

    @property
    def address(self) -> str:
        return Host(self.name).address(self.port)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a host said about itself. ``shared`` tells whether it sees the workspace of this one."""

    python: str
    dtrain: str
    cores: int
    ports: list[int]
    shared: bool


def find_places(spec: JobSpec, workspace: Workspace | None) -> list[Place]:
    """Ask the hosts of ``spec`` where its tasks can go. Blocks for seconds at most.

    ``workspace`` must be seen by all of them, which is tried by a file in it; None: not tried. Raises UsageError for hosts that
    do not go together, NotRunnable when one of them cannot be used: all that cannot are named, each with what to do.
    """
    count = spec.size
    if not spec.hosts:
        here, cores = socket.gethostname(), available_cores()
        return [Place(host=here, name=_LOOPBACK, port=port, cores=cores) for port in free_ports(count)]
    placed = place(count, spec.hosts)
    counts = {host: placed.count(host) for host in dict.fromkeys(placed)}
    local = {host: ssh.is_here(host) for host in counts}
    loops = [host.name for host in counts if ssh.is_loopback(host)]
    if loops and not all(local.values()):
        raise UsageError(f"other hosts cannot reach {loops[0]!r}; name this host as they do, as {socket.gethostname()}")
    with contextlib.ExitStack() as stack:
        token = stack.enter_context(_token(workspace)) if workspace is not None and not all(local.values()) else None
        answers = _ask_all(counts, local, token)
    ports = {host: iter(answer.ports) for host, answer in answers.items()}
    return [
        Place(host=host.name, name=host.name, port=next(ports[host]), cores=answers[host].cores, over_ssh=not local[host])
        for host in placed
    ]


@contextlib.contextmanager
def _token(workspace: Workspace) -> Iterator[Path]:
    """A file in the workspace, for as long as hosts are asked whether they see it."""
    token = workspace.root / f".seen-{secrets.token_hex(8)}"
    try:
        workspace.root.mkdir(parents=True, exist_ok=True)
        token.touch()
    except OSError as error:
        raise WorkspaceError(
            f"workspace {workspace.root} cannot be written: {error.strerror}; choose another with --workspace"
        ) from error
    try:
        yield token
    finally:
        token.unlink(missing_ok=True)


def _ask_all(counts: dict[Host, int], local: dict[Host, bool], token: Path | None) -> dict[Host, Answer]:
    def ask(host: Host) -> Answer | str:
        return _own_answer(counts[host], token) if local[host] else _ask(host, counts[host], token)

    with concurrent.futures.ThreadPoolExecutor(max_workers=min(64, len(counts))) as pool:
        said = dict(zip(counts, pool.map(ask, counts), strict=True))
    problems = [f"host {host.name}: {problem}" for host, problem in said.items() if isinstance(problem, str)]
    if problems:
        raise NotRunnable("\ndtrain: ".join(problems))
    return {host: answer for host, answer in said.items() if isinstance(answer, Answer)}


def _own_answer(count: int, token: Path | None) -> Answer:
    return Answer(
        python=platform.python_version(),
        dtrain=__version__,
        cores=available_cores(),
        ports=free_ports(count),
        shared=token is None or token.exists(),
    )


def _ask(host: Host, count: int, token: Path | None) -> Answer | str:
    """What another host says, or why it cannot be used."""
    argv = [sys.executable, "-m", "dtrain.launch.places", str(count), *([str(token)] if token is not None else [])]
    try:
        done = subprocess.run(
            ssh.command(host.name, Path("/"), env.starting_variables(), argv),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_ANSWER_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"does not answer within {_ANSWER_S:g} s; try: ssh {host.name} true"
    except OSError as error:
        return f"the ssh client cannot be started: {error.strerror}; install openssh-client"
    said = ssh.last_words(done.stderr.decode(errors="replace"))
    if done.returncode == ssh.FAILED:
        return f"ssh cannot connect: {said}; {ssh.advice(said) or f'try: ssh {host.name} true'}"
    lines = done.stdout.decode(errors="replace").splitlines()
    try:
        answer = Answer(**orjson.loads(lines[-1] if lines else ""))
    except (orjson.JSONDecodeError, TypeError):
        return f"{sys.executable} -m dtrain fails there: {said}; {ssh.advice(said) or 'it has to be the same there as here'}"
    return _compared(answer) or answer


def _compared(answer: Answer) -> str:
    """What keeps a host that answered from being used; empty when nothing does."""
    mine = platform.python_version()
    if answer.dtrain != __version__:
        return f"has dtrain {answer.dtrain}, and this host has {__version__}; install the same on all"
    if answer.python.split(".")[:2] != mine.split(".")[:2]:
        return f"has Python {answer.python} at {sys.executable}, and this host has {mine}; use the same on all"
    if not answer.shared:
        return (
            "does not see this workspace: what is written in it here is not there; choose a folder of a shared file system, at "
            "the same path on all hosts, with --workspace or DTRAIN_WORKSPACE"
        )
    return ""


def main() -> None:
    count, *token = sys.argv[1:]
    answer = _own_answer(int(count), Path(token[0]) if token else None)
    sys.stdout.write(orjson.dumps(answer).decode() + "\n")


if __name__ == "__main__":
    main()
