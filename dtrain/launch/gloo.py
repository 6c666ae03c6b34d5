"""Launcher ``horovod`` over Gloo: a driver process (:mod:`dtrain.launch.gloo_driver`) starts the ranks; they may come and go."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from dtrain import env, resources
from dtrain.errors import NotRunnable
from dtrain.hosts import Host
from dtrain.job_options import available_cores
from dtrain.launch import ssh
from dtrain.launch.discovery import discover_hosts
from dtrain.launch.horovod import THREAD_VARIABLES, find_built, horovod_variables
from dtrain.launch.interfaces import interface_in
from dtrain.launch.mpi import rank_threads
from dtrain.launch.places import Place, ask, check_loopback, find_places
from dtrain.launch.plan import LaunchPlan, PlannedProcess, rank_argv
from dtrain.layout import RunLayout, Workspace
from dtrain.spec import JobSpec

_LOOPBACK = "127.0.0.1"
# As horovodrun's.
_ELASTIC_TIMEOUT_S = 600.0
# How long workers of an elastic job wait for each other, in an exchange and in hvd.init(). There, Horovod aborts those that have
# waited in vain, and a worker that joins has to import TensorFlow first: its own 30 s may be too short on a busy host.
_GLOO_TIMEOUT = {"HOROVOD_GLOO_TIMEOUT_SECONDS": "60"}


@dataclass(frozen=True, kw_only=True)
class Site:
    """Where the ranks go: ``hosts`` as they are now, ``places`` of each rank that stays; the ``interface`` by which they talk."""

    hosts: tuple[Host, ...]
    places: tuple[Place, ...]
    interface: str


def find_site(spec: JobSpec, workspace: Workspace | None, say: Callable[[str], None] | None = None) -> Site:
    """Ask the machine, and the hosts of ``spec``, for what its plan needs. Blocks for seconds; ``workspace`` and ``say`` as for
    :func:`find_places`.

    Raises MissingDependency without a Horovod built with Gloo, NotRunnable and UsageError for hosts that cannot be used.
    """
    find_built(spec, "gloo")
    options = spec.horovod_options
    places = [] if options.elastic else find_places(spec, workspace, say) if spec.hosts else []
    if options.discovery is not None:
        hosts = discover_hosts(options.discovery)
    else:
        hosts = spec.hosts or (Host("localhost", options.max_workers or spec.workers),)
    if options.elastic and hosts:
        check_loopback(list(hosts))
        if spec.preflight and not all(ssh.is_here(host) for host in hosts):
            ask(spec, [host for host in hosts for _ in range(host.slots)], workspace, say)
    interface = interface_in(spec.network) if spec.network else _interface(hosts or (Host("localhost"),))
    _check_ipv4(interface)
    return Site(hosts=hosts, places=tuple(places), interface=interface)


def plan(spec: JobSpec, run: RunLayout, cwd: Path, site: Site) -> LaunchPlan:
    """Plan the driver that starts all ranks of ``spec``. Pure; ``cwd`` is the folder in which they will work."""
    options, environ = spec.horovod_options, {**os.environ, **spec.environment}
    if options.elastic:
        slots = max((host.slots for host in site.hosts), default=1)
        threads = [max(1, available_cores() // min(slots, options.max_workers or slots))]
    else:
        threads = rank_threads(spec, site.places)
    names = (*resources.THREAD_VARIABLES, *THREAD_VARIABLES)
    size = None if options.elastic else spec.workers
    environment = {
        **horovod_variables(environ),
        **({name: value for name, value in _GLOO_TIMEOUT.items() if name not in environ} if options.elastic else {}),
        **resources.share_variables(spec.bind, threads, environ, names),
        **env.launch_variables(
            run, size=size, vocabulary="horovod", resume_from=spec.resume_from, watched=spec.hangs.hang_timeout_s is not None
        ),
        **spec.open_environment,
    }
    argv = [spec.interpreter, "-m", "dtrain.launch.gloo_driver", "--workers", str(spec.workers), "--interface", site.interface]
    if options.discovery is not None:
        argv += ["--discovery", str(options.discovery)]
    else:
        argv += ["--hosts", ",".join(host.address(host.slots) for host in site.hosts)]
    if options.elastic:
        argv += ["--elastic", str(options.least), str(options.max_workers or spec.max_ranks)]
        argv += ["--timeout", f"{options.elastic_timeout_s or _ELASTIC_TIMEOUT_S:g}"]
    driver = PlannedProcess(
        name="Horovod's driver",
        host=socket.gethostname(),
        argv=(*argv, "--", *rank_argv(spec)),
        environment=environment,
        cwd=cwd,
    )
    return LaunchPlan(
        launcher="horovod",
        size=0 if options.elastic else spec.workers,
        elastic=options.elastic,
        processes=(driver,),
        ordered=options.discovery is not None or not all(ssh.is_here(host) for host in site.hosts),
    )


def _interface(hosts: tuple[Host, ...]) -> str:
    """The interface of this host by which the others are reached; where all are this one, that of the address that they go by."""
    host = next((host for host in hosts if not ssh.is_here(host)), hosts[0])
    family = socket.AF_INET6 if host.is_ipv6 else socket.AF_INET
    try:
        *_, to = socket.getaddrinfo(host.name, 9, family, socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:  # nothing is sent
            probe.connect(to)
            address = probe.getsockname()[0]
    except OSError as error:
        if host.is_ipv6:
            raise NotRunnable(f"host {host.name} is in no network that this host reaches: {error.strerror}") from error
        raise NotRunnable(
            f"host {host.name} has no IPv4 address, by which Horovod's ranks talk: {error.strerror}; give it one"
        ) from error
    address = _LOOPBACK if address.startswith("127.") else address
    interfaces: dict[str, list[Any]] = psutil.net_if_addrs()
    return next(name for name, found in interfaces.items() if any(each.address.partition("%")[0] == address for each in found))


def _check_ipv4(interface: str) -> None:
    """Raises NotRunnable for an interface by which ranks cannot talk."""
    if not any(each.family == socket.AF_INET for each in psutil.net_if_addrs()[interface]):
        raise NotRunnable(
            f"this host has no IPv4 address at {interface}, by which Horovod's ranks over Gloo would talk; give it one, name "
            "the network of another interface (--network), or start them by MPI (--controller mpi; not an elastic job)"
        )
