"""The hosts of a job: how they are named on the command line and in hostfiles, and how many tasks each takes."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dtrain.errors import UsageError

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
_FORM = "use NAME or NAME:SLOTS, as node1:2,node2:2; an IPv6 address in brackets, as [fd00::1]:2"
# An empty part makes it no name of DNS: MPICH's mpirun looks each host up, which took 6 s a host where no server answered.
_LABEL = "..ipv6"


@dataclass(frozen=True)
class Host:
    """A host as the user calls it, by which ssh and the other hosts reach it, and how many tasks it takes."""

    name: str
    slots: int = 1

    def address(self, port: int) -> str:
        return f"[{self.name}]:{port}" if self.is_ipv6 else f"{self.name}:{port}"

    @property
    def is_ipv6(self) -> bool:
        """Whether it is called by an IPv6 address."""
        return ":" in self.name

    @property
    def is_link_local(self) -> bool:
        """Whether it is called by an address that means something on this host alone, by one of its interfaces."""
        return self.is_ipv6 and ipaddress.IPv6Address(self.name).is_link_local

    @property
    def label(self) -> str:
        """What it is called by programs that take no colon in a host's name: for fd00::1 ``fd00--1..ipv6``.

        As on Windows (ipv6-literal.net), an ``s`` stands for the ``%`` before an interface. Open MPI knows a host by what comes
        before the first dot: so ``_d`` stands for one in the interface's name, and ``_u`` for ``_``. Nobody knows a host by that
        name but :meth:`labelled`.
        """
        if not self.is_ipv6:
            return self.name
        address = f"0{self.name}" if self.name.startswith(":") else self.name  # what begins with - is taken for an option
        return address.replace("_", "_u").replace(".", "_d").replace(":", "-").replace("%", "s") + _LABEL

    @staticmethod
    def labelled(label: str, slots: int = 1) -> Host:
        """The host of a :attr:`label`."""
        if not label.endswith(_LABEL):
            return Host(label, slots)
        written = label.removesuffix(_LABEL).replace("_d", ".").replace("_u", "_")
        address, _, interface = written.partition("s")
        zone = f"%{interface}" if interface else ""
        return Host(str(ipaddress.IPv6Address(address.replace("-", ":") + zone)), slots)


def parse_hosts(text: str) -> tuple[Host, ...]:
    """The hosts of ``-H node1:2,node2``. A host without a number has one slot; one that is named twice has the sum of both.

    Raises UsageError.
    """
    return _merged(_parse(part.strip(), f"-H {text}") for part in text.split(","))


def read_hostfile(path: Path) -> tuple[Host, ...]:
    """The hosts of a file, one a line: ``host slots=N`` (Open MPI, DeepSpeed; blanks may stand around ``=``), ``host:N`` (MPICH),
    or a bare host.

    What follows ``#`` is a comment; so are blank lines. Raises UsageError: also when the file is absent or names no host, for a
    job on one host is not what was asked for.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # an editor of Windows begins a file with a mark
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise UsageError(f"--hostfile {path} cannot be read: {why}; name a file with a host a line") from None
    hosts = parse_host_lines(lines, f"--hostfile {path}")
    if not hosts:
        raise UsageError(f"--hostfile {path} names no host; give it a host a line, as `node1 slots=2`")
    return hosts


def parse_host_lines(lines: Iterable[str], where: str) -> tuple[Host, ...]:
    """The hosts of a hostfile's lines; ``where`` they stand, for messages. Raises UsageError for one that names none."""
    return _merged(_parse_line(line, f"{where}, line {n}") for n, line in enumerate(lines, 1) if _content(line))


def place(count: int, hosts: tuple[Host, ...]) -> list[Host]:
    """The host of every rank: hosts are filled one after the other, by rank. Raises UsageError when they have too few slots."""
    seats = [host for host in hosts for _ in range(host.slots)]
    if count > len(seats):
        same = len({host.slots for host in hosts}) == 1
        have = f"{len(hosts)} host{'s' * (len(hosts) > 1)} x {hosts[0].slots} slot{'s' * (hosts[0].slots > 1)}"
        have = have if same else " + ".join(f"{host.name}:{host.slots}" for host in hosts)
        raise UsageError(f"{count} tasks exceed {have} = {len(seats)}; add hosts or slots (-H NAME:SLOTS), or lower --workers")
    return seats[:count]


def _content(line: str) -> str:
    return line.partition("#")[0].strip()


def _parse_line(line: str, where: str) -> Host:
    name, *settings = re.sub(r"\s*=\s*", "=", _content(line)).split()
    host = _parse(name, where)
    for setting in settings:
        key, _, value = setting.partition("=")
        if key != "slots":
            continue  # Open MPI's max_slots and the like say nothing about how many are wanted
        if name != host.name and name != f"[{host.name}]":
            raise UsageError(f"{where}: {name} and {setting} both say how many; leave one of them out")
        host = Host(host.name, _slots(value, setting, where))
    return host


def _parse(text: str, where: str) -> Host:
    match = re.fullmatch(r"\[(?P<v6>[^\]]*)\](:(?P<n>.*))?|(?P<name>[^:]*)(:(?P<m>.*))?", text)
    if match is None:
        raise UsageError(f"{where}: {text!r} is not a host; {_FORM}")
    slots = match["n"] if match["v6"] is not None else match["m"]
    if match["v6"] is not None:
        name = _parse_ipv6(match["v6"], where)
    else:
        name = match["name"]
        if "@" in name:
            raise UsageError(f"{where}: {name!r} names a user; name the host alone, and its user in ~/.ssh/config")
        if not _NAME.fullmatch(name):
            raise UsageError(f"{where}: {text!r} is not a host; {_FORM}")
    return Host(name) if slots is None else Host(name, _slots(slots, text, where))


def _parse_ipv6(text: str, where: str) -> str:
    try:
        address = ipaddress.IPv6Address(text)
    except ValueError:
        raise UsageError(f"{where}: {text!r} is not an IPv6 address; {_FORM}") from None
    if address.scope_id is None and address.is_link_local:
        raise UsageError(f"{where}: {text} is link-local; name the interface by which it is reached, as [{text}%eth0]")
    if address.scope_id is not None and not (address.is_link_local and re.fullmatch(r"\w[\w.-]*", address.scope_id, re.ASCII)):
        raise UsageError(f"{where}: {text!r} is no address with an interface, as fe80::1%eth0 is, which is link-local; {_FORM}")
    return str(address)


def _slots(text: str, shown: str, where: str) -> int:
    if not re.fullmatch(r"[0-9]{1,6}", text) or int(text) < 1:
        raise UsageError(f"{where}: {shown!r} gives no number of slots from 1; {_FORM}")
    return int(text)


def _merged(hosts: Iterable[Host]) -> tuple[Host, ...]:
    slots: dict[str, int] = {}
    for host in hosts:
        slots[host.name] = slots.get(host.name, 0) + host.slots
    return tuple(Host(name, count) for name, count in slots.items())
