"""Ports of this host on which nobody listens."""

from __future__ import annotations

import errno
import random
import socket

from dtrain.errors import NotRunnable

# Below the range from which Linux takes the ports of outgoing connections (32768 on), one of which could else come to sit on a
# worker's port between its death and its restart.
_PORTS = range(10_000, 32_000)


def free_ports(count: int) -> list[int]:
    """Ports of this host on which nobody listens now, all different. Raises NotRunnable when there are not that many."""
    candidates = iter(random.SystemRandom().sample(_PORTS, len(_PORTS)))
    found = [port for port, _ in zip((port for port in candidates if is_free(port)), range(count), strict=False)]
    if len(found) < count:
        raise NotRunnable(f"{count} ports are needed, and only {len(found)} of {_PORTS.start} to {_PORTS.stop - 1} are free")
    return found


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a worker's last connections may linger on its port
        try:
            probe.bind(("", port))
            probe.listen()  # with the option alone, Linux binds beside another that has not begun to listen
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                return False
            raise
    return True
