"""Compute targets by the SDK's names: each stands for an entry of the workspace (see targets.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from dtrain.azureml.console import say
from dtrain.azureml.errors import ComputeTargetException, Named, Settings, check_kind, take_options
from dtrain.azureml.targets import LOCAL, describe, hosts_of, new_entry, partition_of, read_entries, write_entry
from dtrain.azureml.workspace import Workspace
from dtrain.errors import did_you_mean
from dtrain.job_options import available_cores

_PROVISIONING = {
    "vm_size": "",
    "vm_priority": "dedicated",
    "min_nodes": 0,
    "max_nodes": None,
    "idle_seconds_before_scaledown": None,
    "tags": None,
    "description": None,
    "location": None,
}
_NO_CLUSTER = "the nodes are this machine, hosts or Slurm's, which dtrain does not make"
_PROVISIONING_REFUSED = dict.fromkeys(
    (
        "admin_username",
        "admin_user_password",
        "admin_user_ssh_key",
        "remote_login_port_public_access",
        "vnet_resourcegroup_name",
        "vnet_name",
        "subnet_name",
        "identity_type",
        "identity_id",
    ),
    _NO_CLUSTER,
)


class AmlComputeProvisioningConfiguration(Settings):
    """What ``AmlCompute.provisioning_configuration`` returns."""

    _fields: ClassVar = ("vm_size", "vm_priority", "min_nodes", "max_nodes")

    def __init__(self, options: dict[str, Any]) -> None:
        self.vm_size: str = options["vm_size"]
        self.vm_priority: str = options["vm_priority"]
        least, most = options["min_nodes"], options["max_nodes"]
        self.min_nodes: int = 0 if least is None else least
        self.max_nodes: int = max(1, least or 0) if most is None else most

    def _check(self) -> None:
        """Raises ComputeTargetException for node counts that cannot be; they may have been set since it was made."""
        for name in ("min_nodes", "max_nodes"):
            if not isinstance(getattr(self, name), int) or isinstance(getattr(self, name), bool):
                raise ComputeTargetException(f"{name}={getattr(self, name)!r} is not a whole number of nodes")
        if not 0 <= self.min_nodes <= self.max_nodes or self.max_nodes < 1:
            raise ComputeTargetException(
                f"min_nodes={self.min_nodes}, max_nodes={self.max_nodes} cannot be: 0 <= min_nodes <= max_nodes, "
                "and max_nodes at least 1"
            )


_NODE_STATES = (
    "preparingNodeCount",
    "runningNodeCount",
    "idleNodeCount",
    "unusableNodeCount",
    "leavingNodeCount",
    "preemptedNodeCount",
)


class AmlComputeStatus(Named):
    """What ``get_status()`` returns."""

    _fields: ClassVar = (
        "vm_size",
        "vm_priority",
        "errors",
        "provisioning_state",
        "allocation_state",
        "current_node_count",
        "target_node_count",
        "scale_settings",
        "node_state_counts",
        "creation_time",
    )

    def __init__(self, entry: dict[str, Any]) -> None:
        self.vm_size: str = entry["vm_size"]
        self.vm_priority: str = entry["vm_priority"]
        self.errors: list[dict[str, Any]] | None = None
        self.provisioning_state = "Succeeded"
        self.allocation_state = "Steady"
        self.current_node_count: int = entry["max_nodes"]
        self.target_node_count: int = entry["max_nodes"]
        self.scale_settings = {"minNodeCount": entry["min_nodes"], "maxNodeCount": entry["max_nodes"]}
        self.node_state_counts = dict.fromkeys(_NODE_STATES, 0) | {"idleNodeCount": self.current_node_count}
        self.creation_time: str = entry["created"]

    def serialize(self) -> dict[str, Any]:
        """The same as a dict, with the SDK's keys."""
        return {
            "currentNodeCount": self.current_node_count,
            "targetNodeCount": self.target_node_count,
            "nodeStateCounts": self.node_state_counts,
            "allocationState": self.allocation_state,
            "creationTime": self.creation_time,
            "errors": self.errors,
            "provisioningState": self.provisioning_state,
            "scaleSettings": self.scale_settings,
            "vmPriority": "LowPriority" if self.vm_priority.lower() == "lowpriority" else "Dedicated",
            "vmSize": self.vm_size,
        }


class ComputeTarget(Named):
    """A compute target of a workspace, by its name. Called by control scripts; nothing here blocks.

    Raises ComputeTargetException when there is none of that name.
    """

    _fields: ClassVar = ("workspace", "name")
    _refused: ClassVar = {
        "attach": "`dtrain compute add` names hosts or a Slurm partition, for ComputeTarget(ws, NAME)",
        "detach": "use delete(), which removes the entry",
        "add_identity": _NO_CLUSTER,
        "list_nodes": _NO_CLUSTER,
        "update": "delete the entry, and create it anew",
    }
    _differs: ClassVar = {
        "create": "an entry of the workspace, there at once; any vm_size is this machine, with max_nodes as its nodes; a name "
        "that exists with other sizes is an error; what `dtrain compute add` has named (hosts, a Slurm partition) stays that",
    }

    def __new__(cls, *_: Any, **__: Any) -> ComputeTarget:
        return object.__new__(AmlCompute)  # as the SDK's returns an object of the target's own class

    def __init__(self, workspace: Workspace, name: str) -> None:
        entries = read_entries(workspace._folder)
        if name not in entries:
            raise ComputeTargetException(
                f"ComputeTargetNotFound: no compute target {name!r} in workspace {workspace.name!r}"
                f"{did_you_mean(name, entries)}; it has {', '.join(entries) or 'none'} (and 'local'): "
                "ComputeTarget.create makes one"
            )
        self.workspace, self.name = workspace, name
        self._entry = entries[name]

    @staticmethod
    def create(workspace: Workspace, name: str, provisioning_configuration: AmlComputeProvisioningConfiguration) -> AmlCompute:
        """Make an entry of the workspace, and return it; one that exists and is the same is returned as it is, and so are hosts
        and Slurm partitions.

        Raises ComputeTargetException for a name that cannot be, and for one that exists with other sizes.
        """
        asked = provisioning_configuration
        check_kind("ComputeTarget.create", "provisioning_configuration", asked, AmlComputeProvisioningConfiguration.__name__)
        asked._check()
        known = read_entries(workspace._folder).get(name, {})
        if hosts_of(known) or partition_of(known) is not None:
            say(f"compute target {name} is {describe(known)}, and stays so; `dtrain compute remove {name}` takes it away")
            return AmlCompute(workspace, name)
        if known:
            _check_same(name, known, asked)
            say(f"compute target {name} exists, and is used as it is: {describe(known)}, max_nodes={known['max_nodes']}")
            return AmlCompute(workspace, name)
        entry = new_entry(asked.max_nodes, vm_size=asked.vm_size, vm_priority=asked.vm_priority, min_nodes=asked.min_nodes)
        write_entry(workspace._folder, name, entry)
        say(
            f"compute target {name}: vm_size {asked.vm_size!r} is this machine ({available_cores()} cores); up to "
            f"{asked.max_nodes} nodes, each a group of processes on it"
        )
        return AmlCompute(workspace, name)

    @staticmethod
    def list(workspace: Workspace) -> list[AmlCompute]:
        """All compute targets of the workspace."""
        return [AmlCompute(workspace, name) for name in read_entries(workspace._folder)]

    @property
    def type(self) -> str:
        return str(self._entry["kind"])

    @property
    def vm_size(self) -> str:
        return str(self._entry["vm_size"])

    @property
    def max_nodes(self) -> int:
        return int(self._entry["max_nodes"])

    @property
    def provisioning_state(self) -> str:
        return "Succeeded"

    def wait_for_completion(
        self, show_output: bool = False, min_node_count: int | None = None, timeout_in_minutes: float = 25, **given: Any
    ) -> None:
        """Returns at once: what the target stands for is there."""
        take_options("wait_for_completion", given, {"is_delete_operation": False}, {})
        if show_output:
            say(f"Succeeded: {self.name} is {describe(self._entry)}; nothing had to be provisioned")

    def get_status(self) -> AmlComputeStatus:
        """The state of the target, as of now."""
        return AmlComputeStatus(self._entry)

    @property
    def status(self) -> AmlComputeStatus:
        return self.get_status()

    def refresh_state(self) -> None:
        """Read the entry again. Raises ComputeTargetException when it is gone."""
        self._entry = type(self)(self.workspace, self.name)._entry

    def serialize(self) -> dict[str, Any]:
        """The target as a dict, with the SDK's keys."""
        return {"name": self.name, "computeType": self.type, "properties": {"status": self.get_status().serialize()}}

    def delete(self) -> None:
        """Remove the entry; runs are left alone."""
        write_entry(self.workspace._folder, self.name, None)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(name={self.name!r}, max_nodes={self.max_nodes})"


class AmlCompute(ComputeTarget):
    """A cluster of the SDK's: here this machine, hosts, or a Slurm partition."""

    _called: ClassVar = "ComputeTarget"
    _differs: ClassVar = {
        "provisioning_configuration": "vm_priority is kept as a word; idle_seconds_before_scaledown, tags, description and "
        "location have no effect: there is nothing to provision",
    }

    @staticmethod
    def provisioning_configuration(
        vm_size: str = "", vm_priority: str = "dedicated", min_nodes: int = 0, max_nodes: int | None = None, **given: Any
    ) -> AmlComputeProvisioningConfiguration:
        """What ``ComputeTarget.create`` takes. Raises ComputeTargetException for node counts that cannot be."""
        placed = {"vm_size": vm_size, "vm_priority": vm_priority, "min_nodes": min_nodes, "max_nodes": max_nodes}
        options = take_options("AmlCompute.provisioning_configuration", {**placed, **given}, _PROVISIONING, _PROVISIONING_REFUSED)
        made = AmlComputeProvisioningConfiguration(options)
        made._check()
        return made

    @staticmethod
    def supported_vmsizes(workspace: Workspace, location: str | None = None) -> list[dict[str, Any]]:
        """One size, ``local``: this machine."""
        return [{"name": LOCAL, "vCPUs": available_cores()}]


def _check_same(name: str, known: Mapping[str, Any], asked: AmlComputeProvisioningConfiguration) -> None:
    """Raises ComputeTargetException where an entry is not what is asked for."""
    sizes = {field: (known[field], getattr(asked, field)) for field in asked._fields}
    other = [f"{field}={old!r}, and not {new!r}" for field, (old, new) in sizes.items() if str(old).lower() != str(new).lower()]
    if other:
        raise ComputeTargetException(
            f"compute target {name!r} exists, with {', '.join(other)}: use it by ComputeTarget(ws, {name!r}), remove it by its "
            f"delete() or `dtrain compute remove {name}`, or give the new one another name"
        )


def find_entry(workspace: Workspace, target: Any) -> tuple[str, Mapping[str, Any]]:
    """The name of ``target`` (a ComputeTarget, its name, ``local`` or None), and its entry as it is now; none of ``local``.

    Raises ComputeTargetException when there is none of that name, or no more, or it is another workspace's.
    """
    if target is None or target == LOCAL:
        return LOCAL, {}
    if not isinstance(target, ComputeTarget):
        return str(target), ComputeTarget(workspace, str(target))._entry
    own, others = workspace._folder.root.absolute(), target.workspace._folder.root.absolute()
    if own != others:
        raise ComputeTargetException(
            f"compute target {target.name!r} is one of workspace {target.workspace.name!r} ({others}), and the experiment's is "
            f"{workspace.name!r} ({own}); use ComputeTarget(experiment.workspace, name)"
        )
    return target.name, ComputeTarget(workspace, target.name)._entry


def check_nodes(name: str, entry: Mapping[str, Any], counts: Mapping[str, int]) -> None:
    """Raises ComputeTargetException where the target of that entry has fewer nodes than one of the ``counts``, by option.

    Of ``local``, which is one node, only ``node_count`` is looked at: workers and servers are processes of this machine.
    """
    if name == LOCAL:
        if (node_count := counts["node_count"]) > 1:
            raise ComputeTargetException(
                f"node_count={node_count} exceeds compute target 'local', which is 1 node; lower node_count, or use "
                f"AmlCompute.provisioning_configuration(max_nodes={node_count}) for more nodes on this machine"
            )
        return
    for option, count in counts.items():
        if count > entry["max_nodes"]:
            one = "" if option == "node_count" else ", and takes one a node"
            raise ComputeTargetException(
                f"{option}={count} exceeds compute target {name!r}, which has max_nodes={entry['max_nodes']}{one}; "
                f"lower {option}, or create the target with more nodes"
            )
