"""Ports of this host on which nobody listens, and whether somebody listens on one of any host."""

from __future__ import annotations

import contextlib
import errno
import random
import socket
import time

from dtrain.errors import NotRunnable

# Below the range from which Linux takes the ports of outgoing connections (32768 on), one of which could else come to sit on a
# worker's port between its death and its restart.
_PORTS = range(10_000, 32_000)
# How long a host may take to answer, and how long after its answer it is asked again.
_ANSWER_S = 1.0
_PAUSE_S = 0.2
# A name that was not found is asked for again after so long, and after so many times what that took: a name server that is away
# lets each question wait for 5 to 20 s.
_LOOK_UP_PAUSE_S = 10.0
_LOOK_UP_SHARE = 10
_UNDER_WAY = (errno.EINPROGRESS, errno.EALREADY)


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


class PortProbe:
    """Whether somebody listens at an address, for who does not wait for the answer.

    Blocks for the look-up of the name: once; where it is not found, now and then.
    """

    def __init__(self, address: tuple[str, int]) -> None:
        self._host, self._port = address
        self._addresses: list[tuple[int, tuple[object, ...]]] = []
        """Family and address of each that the name has."""
        self._tries: list[tuple[socket.socket, tuple[object, ...]]] = []
        self._next_try = self._answer_by = self._next_look_up = 0.0

    def look(self) -> bool | None:
        """Whether somebody listens; None while that is not known: ask again. No answer in :data:`_ANSWER_S` is a no."""
        now = time.monotonic()
        if not self._tries:
            if now < self._next_try:
                return None
            self._begin(now)
        codes = [each.connect_ex(address) for each, address in self._tries]
        listens = 0 in codes or errno.EISCONN in codes
        if not listens and now < self._answer_by and any(code in _UNDER_WAY for code in codes):
            return None
        self.close()
        self._next_try = now + _PAUSE_S
        return listens

    def close(self) -> None:
        """Give up what is under way."""
        for each, _ in self._tries:
            each.close()
        self._tries = []

    def _begin(self, now: float) -> None:
        self._answer_by = now + _ANSWER_S
        if not self._addresses and now >= self._next_look_up:
            self._look_up()
        with contextlib.suppress(OSError):  # no descriptor left: then nobody can be seen to listen, as without an address
            for family, address in self._addresses:
                connecting = socket.socket(family, socket.SOCK_STREAM)
                self._tries.append((connecting, address))
                connecting.setblocking(False)
                connecting.connect_ex(address)

    def _look_up(self) -> None:
        began = time.monotonic()
        try:
            found = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
            self._addresses = [(family, address) for family, _, _, _, address in found]
        except OSError:  # no such name
            now = time.monotonic()
            self._next_look_up = now + max(_LOOK_UP_PAUSE_S, _LOOK_UP_SHARE * (now - began))
