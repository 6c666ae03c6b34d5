"""Compute targets and datastores as entries of a workspace: many at once, those of others, and those that are gone."""

from __future__ import annotations

from tests.azureml.conftest import AzureProject
from tests.azureml.test_submit import told

ENTRIES = """
from concurrent.futures import ThreadPoolExecutor
def make(number):
    return ComputeTarget.create(ws, f"target-{number}", AmlCompute.provisioning_configuration("X", max_nodes=number)).max_nodes
with ThreadPoolExecutor(8) as pool:
    made = list(pool.map(make, range(1, 25)))
print(json.dumps({"made": made, "targets": len(ws.compute_targets), "stores": sorted(ws.datastores)}))
"""


def test_entries_that_are_made_at_once_are_all_there(azure: AzureProject) -> None:
    """Made by threads, and datastores by processes."""
    adding = []
    for number in range(5):
        (azure.folder / f"data{number}").mkdir()
        adding.append(azure.start("datastore", "add", f"store{number}", f"data{number}"))
    assert [each.wait(60) for each in adding] == [0] * 5
    found = told(azure.control(ENTRIES))
    assert (found["made"], found["targets"]) == (list(range(1, 25)), 25)
    assert found["stores"] == [*(f"store{number}" for number in range(5)), "workspaceblobstore", "workspacefilestore"]


STALE = """
def try_it(attempt):
    try:
        return attempt()
    except Exception as error:
        print(type(error).__name__, error)
hosts = ComputeTarget(ws, "hosts")
again = ComputeTarget.create(ws, "hosts", AmlCompute.provisioning_configuration("X", max_nodes=4))
print(again.max_nodes, again.vm_size)
other = Workspace("s", "g", "another", folder=__import__("pathlib").Path("another"))
foreign = ComputeTarget.create(other, "hosts", AmlCompute.provisioning_configuration("X", max_nodes=4))
hosts.delete()
for target in (hosts, foreign):
    job = ScriptRunConfig("src", "train.py", compute_target=target, distributed_job_config=MpiConfiguration(1, 2))
    try_it(lambda: experiment.submit(job))
"""


CREATED = """
def create(**given):
    made = ComputeTarget.create(ws, "cluster", AmlCompute.provisioning_configuration(**given))
    return made.max_nodes, made.vm_size
print(create(vm_size="standard_nc6", max_nodes=4))
for given in ({"vm_size": "STANDARD_D2", "max_nodes": 2}, {"vm_size": "STANDARD_NC6", "max_nodes": 8}):
    try:
        create(**given)
    except Exception as error:
        print(type(error).__name__, error)
configuration = AmlCompute.provisioning_configuration("X")
for name, value in (("max_node", 3), ("max_nodes", "3")):
    try:
        setattr(configuration, name, value)
        ComputeTarget.create(ws, "another", configuration)
    except Exception as error:
        print(type(error).__name__, error)
ComputeTarget(ws, "cluster").delete()
print(create(vm_size="STANDARD_D2", max_nodes=2), list(ws.compute_targets))
"""


def test_a_target_that_exists_is_returned_when_it_is_the_same(azure: AzureProject) -> None:
    """However its size is written; with other sizes it is an error, and stays as it was."""
    lines = azure.control(CREATED).stdout.splitlines()[1:]
    assert lines[0] == "compute target cluster exists, and is used as it is: this machine, max_nodes=4"
    assert lines[1] == "(4, 'STANDARD_NC6')"
    begin = "ComputeTargetException compute target 'cluster' exists, with "
    assert lines[2].startswith(f"{begin}vm_size='STANDARD_NC6', and not 'STANDARD_D2', max_nodes=4, and not 2: use it by ")
    assert lines[3].startswith(
        f"{begin}max_nodes=4, and not 8: use it by ComputeTarget(ws, 'cluster'), remove it by its delete()"
    )
    assert lines[4].startswith(
        "NoSuchName dtrain's AmlComputeProvisioningConfiguration has no 'max_node' (did you mean max_nodes?)"
    )
    assert lines[5] == "ComputeTargetException max_nodes='3' is not a whole number of nodes"
    assert lines[-1] == "(2, 'STANDARD_D2') ['cluster']"


def test_a_target_that_is_gone_or_anothers_starts_nothing_here(azure: AzureProject) -> None:
    """Nor does `create`, as samples call it each time, make this machine of the hosts that somebody named."""
    assert azure.dtrain("compute", "add", "hosts", "--hosts", "localhost:1").returncode == 0
    done = azure.dtrain("compute", "add", "hosts", "--hosts", "localhost:3,127.0.0.1:3")
    assert done.stderr.endswith("(before: hosts: 1 node, hosts localhost:1)\n")
    azure.train("print('x')")
    done = azure.control(STALE)
    kept, entry, gone, foreign = done.stdout.splitlines()[-5:-3] + done.stdout.splitlines()[-2:]
    assert (
        kept == "compute target hosts is hosts localhost:3,127.0.0.1:3, and stays so; `dtrain compute remove hosts` takes it away"
    )
    assert entry == "2 hosts"
    assert gone.startswith("ComputeTargetException ComputeTargetNotFound: no compute target 'hosts'")
    assert foreign.startswith("ComputeTargetException compute target 'hosts' is one of workspace 'another' (")
    assert not list((azure.folder / "workspace" / "runs").glob("*"))
