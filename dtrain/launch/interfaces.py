"""The networks that this host is in, and by which interface."""

from __future__ import annotations

import contextlib
import ipaddress
from typing import Any

import psutil

from dtrain.errors import UsageError


def interface_in(network: str) -> str:
    """The interface of this host that has an address in a network, as 10.0.0.0/24; raises UsageError when there is none."""
    wanted, there = ipaddress.ip_network(network), []
    interfaces: dict[str, list[Any]] = psutil.net_if_addrs()
    for name, addresses in interfaces.items():
        for each in addresses:
            with contextlib.suppress(ValueError):  # no address of IP's
                address = ipaddress.ip_address(each.address)
                if address in wanted:
                    return name
                if not address.is_loopback and not address.is_link_local:
                    there.append(f"{_network(address, each.netmask)} ({name})")
    raise UsageError(
        f"--network {network}: this host has no address in it; it is in {', '.join(there) or 'none'}; name a network of all hosts"
    )


def addresses_of(interface: str, *, ipv6: bool) -> list[str]:
    """This host's addresses of an interface (empty: of any) by which MPI can reach it, those of IPv4 first: none of loopback, and
    none that is link-local, which MPIs pass over."""
    interfaces: dict[str, list[Any]] = psutil.net_if_addrs()
    found = []
    for name, addresses in interfaces.items():
        for each in addresses if interface in ("", name) else ():
            with contextlib.suppress(ValueError):
                address = ipaddress.ip_address(each.address)
                if not address.is_loopback and not address.is_link_local and (ipv6 or address.version == 4):
                    found.append(address)
    return [str(address) for address in sorted(found, key=lambda address: address.version)]


def _network(address: ipaddress.IPv4Address | ipaddress.IPv6Address, mask: str | None) -> str:
    bits = address.max_prefixlen if mask is None else int(ipaddress.ip_address(mask)).bit_count()
    return str(ipaddress.ip_network(f"{address}/{bits}", strict=False))
