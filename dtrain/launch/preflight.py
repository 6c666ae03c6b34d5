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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import orjson

from dtrain import __version__, install
from dtrain.binding import HostTopology
from dtrain.errors import MissingDependency, NotRunnable, UsageError, WorkspaceError
from dtrain.hosts import Host
from dtrain.launch import ssh
from dtrain.launch.interfaces import addresses_of, interface_in
from dtrain.launch.mpi_families import find_mpi
from dtrain.launch.ports import free_ports
from dtrain.launch.reach import connect_back, listen, mpi_talks_by_ipv6
from dtrain.launch.scratch import ON_HOSTS, why_not_made
from dtrain.layout import Workspace

_ANSWER_S = 30.0
# Of failures on several hosts the first by time is named, and the ranks' clocks say which that is.
_CLOCK_S = 1.0

Level = Literal["ok", "warning", "problem"]


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
    ``scratch``: whether mpirun can keep its files there; the rest as in :class:`Wanted`."""

    ports: int = 0
    token: str | None = None
    mpi: bool = False
    scratch: bool = False
    back: int | None = None
    addresses: list[str] | None = None
    python: str = ""
    network: str = ""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a host said about itself. ``mpi`` is empty where it was not asked for, ``mpi_problem`` says why there is none;
    ``back`` is why a connection to the host that asks failed, or empty; ``reached`` are its addresses at which one did not.
    ``ranks`` is the version of the ranks' Python, where that is another one, and ``ranks_problem`` why they cannot run by it.
    ``interface`` is the one in the network that was asked for, and ``network_problem`` says why there is none. ``scratch`` is why
    mpirun could keep no files there: empty where it can, None where that was not asked."""

    python: str
    dtrain: str
    topology: HostTopology
    ports: list[int]
    shared: bool
    time: float
    mpi: str = ""
    mpi_problem: str = ""
    back: str = ""
    reached: list[str] = field(default_factory=list)
    ranks: str = ""
    ranks_problem: str = ""
    interface: str = ""
    network_problem: str = ""
    scratch: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "topology": self.topology.to_json()}

    @staticmethod
    def from_json(values: dict[str, Any]) -> Answer:
        """Raises TypeError and KeyError for what is no answer of this dtrain's."""
        return Answer(**{**values, "topology": HostTopology.from_json(values["topology"])})


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked at; ``said`` of a problem also says what to do."""

    name: str
    level: Level
    said: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """What became of one host. ``answer`` is None of one that gave none."""

    host: str
    checks: list[Check] = field(default_factory=list)
    answer: Answer | None = None

    def of(self, level: Level) -> list[str]:
        """What was said at this level, each with the host in front."""
        return [f"host {self.host}: {check.said}" for check in self.checks if check.level == level]


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
        named = [host for host in hosts if host.is_ipv6 and not local[host]] if listens else []
        ipv6 = bool(named) and wanted.mpi and mpi_talks_by_ipv6(wanted.python)
        addresses = addresses_of(own.interface, ipv6=ipv6)

        def ask(host: Host) -> Report:
            ports = hosts[host] if wanted.ports else 0
            if not local[host]:
                return _ask(host, replace(question, ports=ports, addresses=addresses if host in named else None), own)
            answer = replace(own, ports=free_ports(ports))
            return Report(host=host.name, checks=_compared(answer, answer, 0.0), answer=answer)

        with concurrent.futures.ThreadPoolExecutor(max_workers=min(64, len(hosts))) as pool:
            reports = dict(zip(hosts, pool.map(ask, hosts), strict=True))
    if token is not None:
        _compare_sight([reports[host] for host in hosts if not local[host]], wanted.shared_fs)
    _compare_reach([reports[host] for host in named], own.mpi or "Horovod over Gloo", ipv6=ipv6)
    _compare_gpus([(report, hosts[host] if wanted.gpus else 0) for host, report in reports.items()])
    return reports


def examine_this_host(workspace: Workspace, python: str = "") -> Report:
    """Look at this host alone; ``python`` is the ranks' (empty: this one). Writes nothing."""
    own = answer_to(Question(mpi=True, python=python))
    checks = _compared(own, own, 0.0)
    folder = next(path for path in (workspace.root, *workspace.root.parents) if path.exists())
    if folder.is_dir() and os.access(folder, os.W_OK | os.X_OK):
        checks.append(Check(name="workspace", level="ok", said=str(workspace.root)))
    else:
        said = f"workspace {workspace.root} cannot be written; choose another with --workspace or DTRAIN_WORKSPACE"
        checks.append(Check(name="workspace", level="problem", said=said))
    report = Report(host=socket.gethostname(), checks=checks, answer=own)
    _compare_gpus([(report, 0)])
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
    if question.mpi:
        try:
            found = find_mpi(question.python)
            mpi = f"{found.family.title} {found.version}"
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
        scratch=why_not_made(ON_HOSTS) if question.scratch else None,
        time=time.time(),
    )


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
    compared = _compared(answer, own, ahead_s, tried_back=question.back is not None and question.addresses is None)
    checks = [Check(name="ssh", level="ok", said="connects"), *compared]
    return Report(host=host.name, checks=checks, answer=answer)


def _compare_sight(reports: list[Report], shared_fs: bool) -> None:
    """Note of each other host that has answered whether it sees the workspace, and what that means beside the others."""
    answers = {report.host: report.answer for report in reports if report.answer is not None}
    seeing = [name for name, answer in answers.items() if answer.shared]
    for report in reports:
        if report.host not in answers:
            continue
        if report.host in seeing:
            check = Check(name="workspace", level="ok", said="sees it")
        elif seeing and shared_fs:
            said = (
                f"does not see this workspace, and host {seeing[0]} does; mount it there too, at the same path, or choose "
                "another (--workspace, DTRAIN_WORKSPACE); --no-shared-fs copies the run folder to hosts that do not see it"
            )
            check = Check(name="workspace", level="problem", said=said)
        else:
            check = Check(
                name="workspace", level="ok", said="does not see it: the run folder is copied, and outputs brought back"
            )
        report.checks.append(check)


def _compare_reach(reports: Sequence[Report], starter: str, *, ipv6: bool) -> None:
    """Note of each host that is named by an IPv6 address whether its ranks can connect to this one. ``starter`` starts them, and
    ``ipv6`` is whether it knows IPv6; its daemons connect to this host, and fail after a while, or never, where they cannot."""
    for report in reports:
        if report.answer is None:
            continue
        if report.answer.reached:
            check = Check(name="network", level="ok", said=f"connects to this host ({report.answer.reached[0]})")
        elif ipv6:
            said = f"cannot connect to this host by IPv4 or IPv6 ({report.answer.back}); hosts must reach each other on all ports"
            check = Check(name="network", level="problem", said=f"{said}, at addresses that are not link-local")
        else:
            said = f"cannot connect to this host by IPv4 ({report.answer.back}), and {starter} knows no IPv6"
            advice = f"give the hosts IPv4 addresses in one network, or an Open MPI that was built with it ({install.MPI})"
            check = Check(name="network", level="problem", said=f"{said}; {advice}")
        report.checks.append(check)


def _compare_gpus(asked: Sequence[tuple[Report, int]]) -> None:
    """Note of each host whether each of its ranks, of which there are so many, can have a GPU of its own.

    No more than a warning: whether the script computes on GPUs is known to it alone.
    """
    found = [(report, ranks, report.answer.topology.gpus) for report, ranks in asked if report.answer is not None]
    best, _, most = max(found, key=lambda each: each[2], default=(None, 0, 0))
    for report, ranks, gpus in found:
        said = ""
        if best is not None and ranks > 0 and gpus == 0 < most:
            said = f"has no GPU, and host {best.host} has {most}; use hosts that are alike"
        elif 0 < gpus < ranks:
            said = (
                f"has {gpus} GPU{'s' * (gpus > 1)} for {ranks} ranks: every rank sees all of them, and none has one of its own; "
                f"give it fewer (-H {Host(report.host).address(gpus)})"
            )
        advice = "; where ranks need no GPU, add --env CUDA_VISIBLE_DEVICES="
        level: Level = "warning" if said else "ok"
        report.checks.append(Check(name="gpus", level=level, said=f"{said}{advice}" if said else str(gpus)))


def _compared(answer: Answer, own: Answer, ahead_s: float, *, tried_back: bool = False) -> list[Check]:
    """What an answer means beside this host's own; ``ahead_s``: how far its clock is at least ahead of this one's;
    ``tried_back``: a connection to this host was tried."""
    checks = []

    def check(name: str, fine: bool, value: str, said: str, level: Level = "problem") -> None:
        checks.append(Check(name=name, level="ok" if fine else level, said=value if fine else said))

    versions = answer.python.split(".")[:2], own.python.split(".")[:2]
    said = f"has dtrain {answer.dtrain}, and this host has {own.dtrain}; install the same on all"
    check("dtrain", answer.dtrain == own.dtrain, answer.dtrain, said)
    said = f"has Python {answer.python} at {sys.executable}, and this host has {own.python}; use the same on all"
    check("python", versions[0] == versions[1], answer.python, said)
    if answer.ranks or answer.ranks_problem:
        check("ranks' python", not answer.ranks_problem, answer.ranks, answer.ranks_problem)
    if own.mpi or answer.mpi or answer.mpi_problem:
        said = answer.mpi_problem or f"has {answer.mpi}, and this host has {own.mpi or 'none'}; use the same MPI on all"
        check("mpi", bool(answer.mpi) and answer.mpi == own.mpi, answer.mpi, said, "problem" if answer is not own else "warning")
    if answer.scratch is not None:
        check("temporary files", not answer.scratch, f"{ON_HOSTS} takes them", answer.scratch)
    if tried_back:
        said = f"cannot connect to this host at {answer.back}; hosts must reach each other on all ports (--network names one)"
        check("network", not answer.back, "connects to this host", said, "warning")
    said = (
        f"its clock is {abs(ahead_s):.1f} s {'ahead' if ahead_s > 0 else 'behind'}, and so the wrong rank may be named the "
        "first to fail; let NTP set the clocks of all hosts"
    )
    check("clock", abs(ahead_s) < _CLOCK_S, "as here", said, "warning")
    if answer.interface or answer.network_problem:
        check("--network", not answer.network_problem, answer.interface, answer.network_problem)
    checks.append(Check(name="cores", level="ok", said=str(answer.topology.processors)))
    return checks


def main() -> None:
    answer = answer_to(Question(**orjson.loads(sys.argv[1])))
    sys.stdout.write(orjson.dumps(answer.to_json()).decode() + "\n")


if __name__ == "__main__":
    main()
