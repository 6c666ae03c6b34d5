"""Whether other hosts reach this one, as the ranks that are started there will have to."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from dtrain.errors import MissingDependency, NotRunnable
from dtrain.hosts import Host
from dtrain.launch.mpi_families import find_mpi, has_ipv6

_CONNECT_S = 3.0


def mpi_talks_by_ipv6(python: str) -> bool:
    """Whether the MPI of the ranks' ``python`` (empty: this one) can do with IPv6 alone; True where there is none, which is told
    as that. Blocks for a moment."""
    try:
        return has_ipv6(find_mpi(python))
    except (MissingDependency, NotRunnable):
        return True


def is_ipv6_alone(host: Host) -> bool:
    """Whether a host is called by an IPv6 address, or by a name that this host knows to stand for such alone. May block for a
    moment, as looking up a name does."""
    if host.is_ipv6:
        return True
    try:
        return {family for family, *_ in socket.getaddrinfo(host.name, 0, type=socket.SOCK_STREAM)} == {socket.AF_INET6}
    except OSError:  # a name of ~/.ssh/config's alone
        return False


def listen() -> socket.socket:
    """A port of this host to which others can connect, by IPv4 and by IPv6 where it has both."""
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=256)
    return socket.create_server(("", 0), backlog=256)


def connect_back(port: int | None, addresses: Sequence[str] | None) -> tuple[list[str], str]:
    """Connect to the host at the other end of this ssh connection: at ``addresses``, None: at the one by which it came.

    Those at which it answers, and why none does, empty where one does, or nothing was tried. Blocks for seconds at most.
    """
    caller = os.environ.get("SSH_CONNECTION", "").partition(" ")[0]
    if port is None or not caller:
        return [], ""
    tried = [caller] if addresses is None else addresses
    if not tried:
        return [], "it has no such address"
    with ThreadPoolExecutor(max_workers=len(tried)) as pool:
        failures = dict(zip(tried, pool.map(lambda address: _failure(address, port), tried), strict=True))
    reached = [address for address in tried if not failures[address]]
    return reached, "" if reached else ", ".join(failures.values())


def _failure(address: str, port: int) -> str:
    """Why a connection fails; empty when it does not."""
    try:
        socket.create_connection((address, port), timeout=_CONNECT_S).close()
    except OSError as error:
        return f"{Host(address).address(port)}: {error.strerror or error}"
    return ""
