"""Hosts are asked whether a job can run on them, all at once: by `dtrain run` before it starts anything, and by `dtrain doctor`.

``python -m dtrain.launch.preflight QUESTION`` is what each is asked, by ssh; what it answers is one line of JSON.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import platform
import secrets
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import orjson

from dtrain import __version__, install
from dtrain.binding import HostTopology
from dtrain.errors import MissingDependency, NotRunnable, UsageError, WorkspaceError
from dtrain.hosts import Host
from dtrain.launch import ssh
from dtrain.launch.checks import (
    Answer,
    Check,
    Report,
    compare_gpus,
    compare_identities,
    compare_reach,
    compare_sight,
    compared,
)
from dtrain.launch.interfaces import addresses_of, interface_in
from dtrain.launch.mpi_families import find_mpi
from dtrain.launch.ports import free_ports
from dtrain.launch.reach import connect_back, is_ipv6_alone, listen, mpi_talks_by_ipv6
from dtrain.launch.scratch import ON_HOSTS, why_not_made
from dtrain.layout import Workspace

_ANSWER_S = 30.0


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a job wants of its hosts.

    ``ports``: a free one for each rank; ``mpi``: the same on all; ``back``: connections to the host that asks, which MPI wants
    as well; ``shared_fs``: that all other hosts see the workspace, or none does; ``python``: the ranks', where it is another
    one; ``network``: the one, as 10.0.0.0/24, in which each has an address, empty: any; ``gpus``: one for each rank, or none.
    """

    ports: bool = False
    mpi: bool = False
    back: bool = False
    shared_fs: bool = True
    python: str = ""
    network: str = ""
    gpus: bool = True


@dataclass(frozen=True, kw_only=True)
class Question:
    """What one host is asked. ``ports``: how many free ones are wanted; ``token``: a file that has to be seen; ``back``: a port
    of the host that asks, to which a connection is tried, at its ``addresses`` (None: the one by which ssh came from there);
    ``scratch``: whether mpirun can keep its files there, where it is of an MPI that has any; the rest as in :class:`Wanted`."""

    ports: int = 0
    token: str | None = None
    mpi: bool = False
    scratch: bool = False
    back: int | None = None
    addresses: list[str] | None = None
    python: str = ""
    network: str = ""


def ask_hosts(hosts: Mapping[Host, int], workspace: Workspace | None, wanted: Wanted) -> dict[Host, Report]:
    """Ask each of ``hosts``, which is to have that many ranks, for what is ``wanted``, and whether it sees ``workspace`` (None:
    not asked).

    That some hosts see the workspace and some do not is a problem, unless ``shared_fs`` is False: a mount is missing, as a rule.
    Blocks for seconds, half a minute at most. Raises WorkspaceError when the workspace cannot be written here; everything else is
    in the reports.
    """
    local = {host: ssh.is_here(host) for host in hosts}
    with contextlib.ExitStack() as stack:
        elsewhere = not all(local.values())
        token = str(stack.enter_context(seen_file(workspace))) if workspace is not None and elsewhere else None
        listens = (wanted.mpi or wanted.back) and elsewhere
        port = stack.enter_context(listen()).getsockname()[1] if listens else None
        question = Question(mpi=wanted.mpi, scratch=wanted.mpi, python=wanted.python, network=wanted.network)
        own = answer_to(question)
        question = replace(question, token=token, back=port)
        all_named = is_ipv6_alone(Host(socket.gethostname()))  # by that name mpirun's daemons connect to this host
        named = [host for host in hosts if not local[host] and (all_named or is_ipv6_alone(host))] if listens else []
        ipv6 = bool(named) and wanted.mpi and mpi_talks_by_ipv6(wanted.python)
        addresses = addresses_of(own.interface, ipv6=ipv6)

        def ask(host: Host) -> Report:
            ports = hosts[host] if wanted.ports else 0
            if not local[host]:
                return _ask(host, replace(question, ports=ports, addresses=addresses if host in named else None), own)
            answer = replace(own, ports=free_ports(ports))
            return Report(host=host.name, checks=compared(answer, answer, 0.0), answer=answer)

        with concurrent.futures.ThreadPoolExecutor(max_workers=min(64, len(hosts))) as pool:
            reports = dict(zip(hosts, pool.map(ask, hosts), strict=True))
    compare_identities([(host, report) for host, report in reports.items() if not local[host]])
    if token is not None:
        compare_sight([reports[host] for host in hosts if not local[host]], wanted.shared_fs)
    compare_reach([reports[host] for host in named], own.mpi, ipv6=ipv6)
    compare_gpus([(report, hosts[host] if wanted.gpus else 0) for host, report in reports.items()])
    return reports


def examine_this_host(workspace: Workspace, python: str = "") -> Report:
    """Look at this host alone; ``python`` is the ranks' (empty: this one). Writes nothing."""
    own = answer_to(Question(mpi=True, python=python))
    checks = compared(own, own, 0.0)
    folder = next(path for path in (workspace.root, *workspace.root.parents) if path.exists())
    if folder.is_dir() and os.access(folder, os.W_OK | os.X_OK):
        checks.append(Check(name="workspace", level="ok", said=str(workspace.root)))
    else:
        said = f"workspace {workspace.root} cannot be written; choose another with --workspace or DTRAIN_WORKSPACE"
        checks.append(Check(name="workspace", level="problem", said=said))
    report = Report(host=socket.gethostname(), checks=checks, answer=own)
    compare_gpus([(report, 0)])
    return report


@contextlib.contextmanager
def seen_file(workspace: Workspace) -> Iterator[Path]:
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


def answer_to(question: Question) -> Answer:
    """What this host says about itself."""
    mpi = problem = ""
    scratch: str | None = None
    if question.mpi:
        try:
            found = find_mpi(question.python)
            mpi = f"{found.family.title} {found.version}"
            if question.scratch and found.family.scratch_variables:
                scratch = why_not_made(ON_HOSTS)
        except (MissingDependency, NotRunnable) as error:
            problem = str(error)
    ranks, ranks_problem = _ask_python(question.python) if question.python else ("", "")
    interface = network_problem = ""
    if question.network:
        try:
            interface = interface_in(question.network)
        except UsageError as error:
            network_problem = str(error)
    reached, back = connect_back(question.back, question.addresses)
    return Answer(
        python=platform.python_version(),
        dtrain=__version__,
        identity=_identity(),
        topology=HostTopology.read(),
        ports=free_ports(question.ports),
        shared=question.token is None or Path(question.token).exists(),
        mpi=mpi,
        mpi_problem=problem,
        back=back,
        reached=reached,
        ranks=ranks,
        ranks_problem=ranks_problem,
        interface=interface,
        network_problem=network_problem,
        scratch=scratch,
        time=time.time(),
    )


def _identity() -> str:
    """Tells this host from any other, also from a container of its machine that has a network of its own."""
    with contextlib.suppress(OSError):  # without /proc
        boot, network = Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.stat("/proc/self/ns/net").st_ino
        return f"{os.uname().nodename} {boot} {network}"
    return ""


def check_python(python: str) -> None:
    """Raises NotRunnable where ranks cannot run by ``python`` on this host. Blocks for a moment."""
    _, problem = _ask_python(python)
    if problem:
        raise NotRunnable(problem)


def _ask_python(python: str) -> tuple[str, str]:
    """The version of a Python, and why ranks cannot run by it; one of the two is empty."""
    code = "import platform, dtrain._rank_main, dtrain.run; print(platform.python_version(), dtrain.__version__)"
    try:
        # From a folder where nothing lies that could be imported by chance.
        done = subprocess.run([python, "-c", code], cwd="/", capture_output=True, text=True, timeout=_ANSWER_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", f"{python} cannot be run: {getattr(error, 'strerror', None) or error}"
    version, _, found = (done.stdout.splitlines() or [""])[-1].partition(" ")
    if done.returncode != 0 or not found:
        said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        command = f"{python} -m pip install {shlex.quote(install.this_package())}"
        return "", f"{python} cannot run ranks: {said}; install dtrain {__version__} for it: {command}"
    if found != __version__:
        return "", f"{python} has dtrain {found}, and dtrain {__version__} starts the ranks; install the same for both"
    return version, ""


def _ask(host: Host, question: Question, own: Answer) -> Report:
    """What another host says, or why it cannot be used."""
    argv = [sys.executable, "-m", "dtrain.launch.preflight", orjson.dumps(asdict(question)).decode()]
    asked = time.time()

    def problem(name: str, said: str) -> Report:
        return Report(host=host.name, checks=[Check(name=name, level="problem", said=said)])

    try:
        done = subprocess.run(
            ssh.command(host.name, Path("/"), ssh.starting_variables(), argv),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_ANSWER_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return problem("ssh", f"does not answer within {_ANSWER_S:g} s; try: ssh {host.name} true")
    except OSError as error:
        return problem("ssh", f"the ssh client cannot be started: {error.strerror}; install openssh-client")
    said = ssh.last_words(done.stderr.decode(errors="replace"))
    if done.returncode == ssh.FAILED:
        return problem("ssh", f"ssh cannot connect: {said}; {ssh.advice(said) or f'try: ssh {host.name} true'}")
    lines = done.stdout.decode(errors="replace").splitlines()
    try:
        answer = Answer.from_json(orjson.loads(lines[-1] if lines else ""))
    except (orjson.JSONDecodeError, TypeError, KeyError):
        advice = ssh.advice(said) or "it has to be the same there as here"
        return problem("python", f"{sys.executable} -m dtrain fails there: {said}; {advice}")
    ahead_s = max(0.0, answer.time - time.time()) or min(0.0, answer.time - asked)
    beside = compared(answer, own, ahead_s, tried_back=question.back is not None and question.addresses is None)
    checks = [Check(name="ssh", level="ok", said="connects"), *beside]
    return Report(host=host.name, checks=checks, answer=answer)


def main() -> None:
    answer = answer_to(Question(**orjson.loads(sys.argv[1])))
    sys.stdout.write(orjson.dumps(answer.to_json()).decode() + "\n")


if __name__ == "__main__":
    main()
