"""What the answers of a job's hosts mean, beside this host's own and one another's: the preflight's table and its problems."""

from __future__ import annotations

import collections
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from dtrain import install
from dtrain.binding import HostTopology
from dtrain.hosts import Host
from dtrain.launch.scratch import ON_HOSTS

# Of failures on several hosts the first by time is named, and the ranks' clocks say which that is.
_CLOCK_S = 1.0

Level = Literal["ok", "warning", "problem"]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a host said about itself. ``mpi`` is empty where it was not asked for, ``mpi_problem`` says why there is none;
    ``back`` is why a connection to the host that asks failed, or empty; ``reached`` are its addresses at which one did not.
    ``ranks`` is the version of the ranks' Python, where that is another one, and ``ranks_problem`` why they cannot run by it.
    ``interface`` is the one in the network that was asked for, and ``network_problem`` says why there is none. ``scratch`` is why
    mpirun could keep no files there: empty where it can, None where that was not asked. ``identity`` is the same of one host by
    whatever name it was asked, and of no two hosts; empty where that is not known."""

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
    identity: str = ""

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


def compare_sight(reports: list[Report], shared_fs: bool) -> None:
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


def compare_identities(asked: Sequence[tuple[Host, Report]]) -> None:
    """Note of each other host that it was named before, by another name: Open MPI's ranks there crash, or compute wrong sums."""
    first: dict[str, Host] = {}
    slots: collections.Counter[str] = collections.Counter()
    for host, report in asked:
        if report.answer is None or not report.answer.identity:
            continue
        identity = report.answer.identity
        earlier = first.setdefault(identity, host)
        slots[identity] += host.slots
        if earlier is not host:
            said = f"is {earlier.name} again: name it once, as {Host(earlier.name).address(slots[identity])}"
            report.checks.append(Check(name="name", level="problem", said=said))


def compare_reach(reports: Sequence[Report], mpi: str, *, ipv6: bool) -> None:
    """Note of each of these hosts, whose names, or this one's, mean IPv6 alone, whether its ranks can connect to this one.

    ``mpi`` starts them (empty: Horovod over Gloo does), and ``ipv6`` is whether it knows IPv6; its daemons connect to this host,
    and fail after a while, or never, where they cannot.
    """
    for report in reports:
        if report.answer is None:
            continue
        if report.answer.reached:
            check = Check(name="network", level="ok", said=f"connects to this host ({report.answer.reached[0]})")
        elif ipv6:
            said = f"cannot connect to this host by IPv4 or IPv6 ({report.answer.back}); hosts must reach each other on all ports"
            check = Check(name="network", level="problem", said=f"{said}, at addresses that are not link-local")
        else:
            said = f"cannot connect to this host by IPv4 ({report.answer.back}), and {mpi or 'Horovod over Gloo'} knows no IPv6"
            other = f"an Open MPI that was built with it ({install.MPI})" if mpi else "start the ranks by MPI (--controller mpi)"
            advice = f"give the hosts IPv4 addresses in one network, or {other}{'' if mpi else '; an elastic job has Gloo alone'}"
            check = Check(name="network", level="problem", said=f"{said}; {advice}")
        report.checks.append(check)


def compare_gpus(asked: Sequence[tuple[Report, int]]) -> None:
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


def compared(answer: Answer, own: Answer, ahead_s: float, *, tried_back: bool = False) -> list[Check]:
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
