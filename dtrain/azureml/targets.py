"""What compute targets stand for: named entries of the workspace, each this machine, hosts, or a Slurm partition."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtrain.azureml import records
from dtrain.azureml.errors import ComputeTargetException
from dtrain.errors import UsageError, did_you_mean
from dtrain.hosts import Host, parse_hosts
from dtrain.job_options import SlurmOptions
from dtrain.launch.sbatch import list_partitions
from dtrain.layout import Workspace as WorkspaceFolder

LOCAL = "local"


@dataclass(frozen=True, kw_only=True)
class Partition:
    """A Slurm partition that is a compute target; ``cores`` are those of its smallest node, 0 where that is not known."""

    name: str
    sbatch_args: tuple[str, ...]
    cores: int

    def options(self, nodes: int, per_node: int) -> SlurmOptions:
        """The options of a job on it. Raises UsageError for more processes than a node of it has cores."""
        if self.cores and per_node > self.cores:
            raise UsageError(
                f"process_count_per_node={per_node} exceeds {self.cores}, the cores of each node of Slurm partition {self.name}; "
                "lower it, and raise node_count"
            )
        args = (f"--partition={self.name}", *self.sbatch_args)
        return SlurmOptions(nodes=nodes, tasks_per_node=per_node, sbatch_args=args)


def _path(folder: WorkspaceFolder) -> Path:
    return folder.azureml / "compute"


def read_entries(folder: WorkspaceFolder) -> dict[str, dict[str, Any]]:
    """The compute targets of a workspace's folder, as they are kept, by name."""
    return records.read_entries(_path(folder))


def write_entry(folder: WorkspaceFolder, name: str, entry: Mapping[str, Any] | None) -> None:
    """Set an entry, or with None remove it. Raises ComputeTargetException for a name that cannot be."""
    if name == LOCAL:
        raise ComputeTargetException("compute target name 'local' is taken: it is this machine, always there; use another one")
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9-]{1,23}", name):
        raise ComputeTargetException(
            f"compute target name {name!r} is not allowed; use 2 to 24 letters, digits or '-', beginning with a letter"
        )
    records.write_entry(_path(folder), name, entry)


def new_entry(max_nodes: int, *, vm_size: str, vm_priority: str = "dedicated", min_nodes: int = 0) -> dict[str, Any]:
    """An entry that stands for this machine."""
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    sizes = {"min_nodes": min_nodes, "max_nodes": max_nodes, "vm_size": vm_size, "vm_priority": vm_priority}
    return {"kind": "AmlCompute", "created": created, **sizes}


def hosts_entry(hosts: str) -> dict[str, Any]:
    """An entry of hosts (``node1:2,node2:2``), each a node. Raises UsageError."""
    count = len(parse_hosts(hosts))
    return {**new_entry(count, vm_size="hosts", min_nodes=count), "hosts": hosts}


def partition_entry(partition: str, sbatch_args: Sequence[str], max_nodes: int | None) -> dict[str, Any]:
    """An entry of a Slurm partition, of which jobs may have ``max_nodes`` (None: all).

    Asks Slurm, where its commands are here. Raises UsageError for a partition or a number that it does not have.
    """
    known = list_partitions()
    if known is None and max_nodes is None:
        raise UsageError("there is no sinfo on PATH that could say how many nodes the partition has; give --max-nodes")
    if known is not None and partition not in known:
        raise UsageError(
            f"no Slurm partition {partition!r}{did_you_mean(partition, known)}; there are {', '.join(known) or 'none'}"
        )
    most, cores = known[partition] if known is not None else (max(1, max_nodes or 1), 0)
    nodes = most if max_nodes is None else max_nodes
    if not 1 <= nodes <= most:
        raise UsageError(f"--max-nodes {nodes} is not a number from 1 to {most}, the nodes of Slurm partition {partition}")
    Partition(name=partition, sbatch_args=tuple(sbatch_args), cores=0).options(1, 1)
    slurm = {"partition": partition, "sbatch_args": list(sbatch_args), "cores": cores}
    return {**new_entry(nodes, vm_size="slurm"), "slurm": slurm}


def describe(entry: Mapping[str, Any]) -> str:
    """What an entry stands for, in words."""
    if "slurm" in entry:
        return " ".join([f"Slurm partition {entry['slurm']['partition']}", *entry["slurm"]["sbatch_args"]])
    return f"hosts {entry['hosts']}" if "hosts" in entry else "this machine"


def hosts_of(entry: Mapping[str, Any]) -> tuple[Host, ...]:
    """The hosts of a target; none where it is something else."""
    hosts = entry.get("hosts")
    return parse_hosts(hosts) if hosts else ()


def partition_of(entry: Mapping[str, Any]) -> Partition | None:
    """The Slurm partition of a target; None where it is something else."""
    slurm = entry.get("slurm")
    if slurm is None:
        return None
    return Partition(name=slurm["partition"], sbatch_args=tuple(slurm["sbatch_args"]), cores=slurm["cores"])
