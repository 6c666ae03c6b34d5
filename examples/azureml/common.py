"""What the control scripts here have in common: the workspace and a compute target of up to four nodes."""

from azureml.core import Workspace
from azureml.core.compute import AmlCompute, ComputeTarget
from azureml.core.compute_target import ComputeTargetException


def workspace():
    return Workspace.from_config()


def cluster(ws, name="gpu-cluster"):
    try:
        target = ComputeTarget(workspace=ws, name=name)
        print("Found existing compute target.")
    except ComputeTargetException:
        print("Creating a new compute target...")
        configuration = AmlCompute.provisioning_configuration(vm_size="STANDARD_NC6", max_nodes=4)
        target = ComputeTarget.create(ws, name, configuration)
        target.wait_for_completion(show_output=True, min_node_count=None, timeout_in_minutes=20)
    return target
