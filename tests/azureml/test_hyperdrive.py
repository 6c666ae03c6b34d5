"""Sweeps: what is drawn, which runs are ended early, and what becomes of a HyperDriveConfig that is submitted."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable
from typing import Any

import pytest

from dtrain.azureml import parameters
from dtrain.azureml.errors import UserErrorException
from dtrain.azureml.estimator import Estimator
from dtrain.azureml.hyperdrive import HyperDriveConfig, HyperDriveRunConfig, PrimaryMetricGoal
from dtrain.azureml.parameters import GridParameterSampling, RandomParameterSampling, choice, quniform, randint, uniform
from dtrain.azureml.policies import (
    BanditPolicy,
    EarlyTerminationPolicy,
    MedianStoppingPolicy,
    NoTerminationPolicy,
    TruncationSelectionPolicy,
)
from dtrain.azureml.runconfig import ScriptRunConfig
from tests.azureml.conftest import BEGIN, AzureProject
from tests.azureml.test_submit import told

# Distribution: its arguments, and the range of all values.
RANGES: dict[str, tuple[tuple[float, ...], float, float]] = {
    "randint": ((5,), 0, 4),
    "uniform": ((2, 3), 2, 3),
    "quniform": ((0, 1, 0.1), 0, 1),
    "loguniform": ((-3, 0), math.exp(-3), 1),
    "qloguniform": ((0, 3, 2), 0, 22),
    "normal": ((10, 1), 0, 20),
    "qnormal": ((10, 1, 0.5), 0, 20),
    "lognormal": ((0, 1), 0, math.inf),
    "qlognormal": ((0, 1, 3), 0, math.inf),
}


@pytest.mark.parametrize("name", RANGES)
def test_values_are_of_their_distribution(name: str) -> None:
    arguments, least, most = RANGES[name]
    source = random.Random(1)
    values = [getattr(parameters, name)(*arguments).draw(source) for _ in range(200)]
    assert all(least <= value <= most for value in values)
    assert max(values) - min(values) > (min(most, 22) - least) / 20
    if name[0] == "q":
        q = arguments[-1]
        assert all(value == float(f"{round(value / q) * q:.12g}") for value in values)
        assert len(set(values)) < 50
    if "normal" in name and "log" not in name:
        assert 9 < sum(values) / len(values) < 11


def test_settings_are_drawn_once_and_by_a_seed_again() -> None:
    space = {"--a": choice(1, 2), "b": choice([True, "x"]), "c": choice(range(2))}
    grid = list(GridParameterSampling(space)._settings())
    assert (grid[0], grid[1], len(grid)) == ({"--a": 1, "b": True, "c": 0}, {"--a": 1, "b": True, "c": 1}, 8)
    drawn = list(RandomParameterSampling(space)._settings())
    assert sorted(map(repr, drawn)) == sorted(map(repr, grid))
    first, again = ([next(RandomParameterSampling({"x": uniform(0, 1)}, {"seed": 7})._settings())] for _ in range(2))
    assert first == again
    assert list(RandomParameterSampling({"n": randint(3)})._settings()) != []


# Values by run, signed so that more is better; at which interval "a" is looked at, by which policy; and whether it goes on.
JUDGED: dict[str, tuple[EarlyTerminationPolicy, dict[str, list[float]], bool]] = {
    "no policy": (NoTerminationPolicy(), {"a": [0.0], "b": [9.0]}, False),
    "bandit, within": (BanditPolicy(slack_factor=0.2), {"a": [0.7], "b": [0.8]}, False),
    "bandit, beyond": (BanditPolicy(slack_factor=0.2), {"a": [0.6], "b": [0.8]}, True),
    "bandit, its best counts": (BanditPolicy(slack_factor=0.2), {"a": [0.7, 0.1], "b": [0.8, 0.8]}, False),
    "bandit, later values of others": (BanditPolicy(slack_factor=0.2), {"a": [0.7], "b": [0.8, 9.0]}, False),
    "bandit, small is better": (BanditPolicy(slack_factor=0.2), {"a": [-1.3], "b": [-1.0]}, True),
    "bandit, small within": (BanditPolicy(slack_factor=0.2), {"a": [-1.1], "b": [-1.0]}, False),
    "bandit, amount": (BanditPolicy(slack_amount=0.2), {"a": [0.5], "b": [0.8]}, True),
    "bandit, nothing else yet": (BanditPolicy(slack_amount=0.0), {"a": [0.5], "b": []}, False),
    "median, worse": (MedianStoppingPolicy(), {"a": [1, 1], "b": [2, 2], "c": [3, 3]}, True),
    "median, best counts": (MedianStoppingPolicy(), {"a": [1, 3], "b": [2, 2], "c": [3, 3]}, False),
    "median, not yet there": (MedianStoppingPolicy(), {"a": [1, 1], "b": [2], "c": [3]}, False),
    "truncation": (TruncationSelectionPolicy(40), {"a": [1], "b": [2], "c": [3]}, True),
    "truncation, less than one": (TruncationSelectionPolicy(30), {"a": [1], "b": [2], "c": [3]}, False),
    "truncation, not the worst": (TruncationSelectionPolicy(40), {"a": [2], "b": [1], "c": [3]}, False),
    "truncation, finished": (TruncationSelectionPolicy(50), {"a": [2], "b": [3], "done": [1]}, False),
    "truncation, all the same": (TruncationSelectionPolicy(40), {"a": [1], "b": [1], "c": [1]}, False),
    "truncation, the same as one that stays": (TruncationSelectionPolicy(40), {"a": [1], "b": [1], "c": [3]}, False),
    "truncation, the same as one that does not": (TruncationSelectionPolicy(70), {"a": [1], "b": [1], "c": [3]}, True),
    "truncation, without them": (
        TruncationSelectionPolicy(50, exclude_finished_jobs=True),
        {"a": [2], "b": [3], "done": [1]},
        True,
    ),
}


@pytest.mark.parametrize("case", JUDGED)
def test_a_policy_ends_what_is_not_worth_its_end(case: str) -> None:
    policy, values, expected = JUDGED[case]
    assert policy._stops("a", policy._due(len(values["a"])), values, {"done"}) == expected


def test_a_policy_is_applied_at_its_intervals() -> None:
    policy = BanditPolicy(evaluation_interval=3, slack_amount=1, delay_evaluation=5)
    assert [policy._due(logged) for logged in range(10)] == [0, 0, 0, 0, 0, 0, 6, 6, 6, 9]
    assert [NoTerminationPolicy()._due(logged) for logged in range(3)] == [0, 1, 2]


def config(**given: Any) -> HyperDriveConfig:
    values = {
        "run_config": ScriptRunConfig(".", "t.py"),
        "hyperparameter_sampling": GridParameterSampling({"x": choice(1, 2)}),
        "primary_metric_name": "loss",
        "primary_metric_goal": PrimaryMetricGoal.MINIMIZE,
        "max_total_runs": 4,
    }
    return HyperDriveConfig(**{**values, **given})


def test_the_older_name_takes_the_estimator_first() -> None:
    estimator, sampling = Estimator(".", entry_script="t.py"), GridParameterSampling({"x": choice(1)})
    made = HyperDriveRunConfig(estimator, sampling, "loss", PrimaryMetricGoal.MINIMIZE, 7)
    assert (made._job, made._options_given["max_total_runs"]) == (estimator, 7)
    assert HyperDriveConfig(sampling, "loss", PrimaryMetricGoal.MINIMIZE, 7, 2, 5, None, estimator)._job is estimator


WRONG: dict[str, Callable[[], object]] = {
    r"no argument 'max_total_run' \(did you mean max_total_runs": lambda: config(max_total_run=3),
    "takes estimator=, or run_config=": lambda: config(run_config=None),
    "run_config='t.py', and takes a ScriptRunConfig": lambda: config(run_config="t.py"),
    "primary_metric_goal='MAXIMIZE', and takes PrimaryMetricGoal": lambda: config(primary_metric_goal="MAXIMIZE"),
    "hyperparameter_sampling={}, and takes RandomParameterSampling": lambda: config(hyperparameter_sampling={}),
    "policy='bandit', and takes BanditPolicy": lambda: config(policy="bandit"),
    "primary_metric_name=None, and takes the name": lambda: config(primary_metric_name=None),
    "max_total_runs=None is not a number from 1": lambda: config(max_total_runs=None),
    "max_total_runs=1001 is not a number from 1 to 1000": lambda: config(max_total_runs=1001),
    "max_concurrent_runs=101 is not a number from 1 to 100": lambda: config(max_concurrent_runs=101),
    "max_duration_minutes=0 is not": lambda: config(max_duration_minutes=0),
    "resume_from=1.* is not available without Azure: submit a sweep": lambda: config(resume_from=1),
    "parameter_space has uniform for 'x'; a grid is": lambda: GridParameterSampling({"x": uniform(0, 1)}),
    "parameter_space has 3 for 'x'; give choice": lambda: RandomParameterSampling({"x": 3}),  # type: ignore[dict-item]
    "parameter_space is empty": lambda: RandomParameterSampling({}),
    "parameter_space=.* has to be a dict": lambda: RandomParameterSampling([1]),  # type: ignore[arg-type]
    "rule='sobol': there is 'random'": lambda: RandomParameterSampling({"x": choice(1)}, {"rule": "sobol"}),
    r"choice\(\) has no options": lambda: choice([]),
    r"choice\(\) has None; a script is given": lambda: choice(1, None),
    r"choice\(\) has 1180591620717411303424; .* numbers of up to 64 bits": lambda: choice(2**70),
    r"choice\(\) has \[1180591620717411303424\]; ": lambda: choice(1, [2**70]),
    r"uniform\(min_value=2, max_value=1\) has no values": lambda: uniform(2, 1),
    r"uniform\(min_value=0, max_value=1, q=0\) has no values": lambda: quniform(0, 1, 0),
    r"uniform\(min_value='0', max_value=1\): give numbers": lambda: uniform("0", 1),  # type: ignore[arg-type]
    r"randint\(upper=0\) is not": lambda: randint(0),
    r"randint\(upper=1180591620717411303424\) is not a whole number from 1 to 2\*\*64": lambda: randint(2**70),
    "slack_factor=None, slack_amount=None.: give one": BanditPolicy,
    "truncation_percentage=100 is not a number from 1 to 99": lambda: TruncationSelectionPolicy(100),
    "evaluation_interval=0 is not a number from 1": lambda: MedianStoppingPolicy(0),
}


@pytest.mark.parametrize("text", WRONG)
def test_what_no_sweep_can_be_made_of_is_refused_by_name(text: str) -> None:
    with pytest.raises((UserErrorException, TypeError), match=text):
        WRONG[text]()


SWEEP = f"""{BEGIN}
from azureml.train.hyperdrive import *
from azureml.widgets import RunDetails
def sweep(space, **given):
    options = dict(primary_metric_name="accuracy", primary_metric_goal=PrimaryMetricGoal.MAXIMIZE, max_total_runs=4)
    job = ScriptRunConfig("src", "train.py", arguments=["--fixed", 1], compute_target=cluster)
    if "estimator" not in given:
        options["run_config"] = job
    return HyperDriveConfig(hyperparameter_sampling=GridParameterSampling(space), **{{**options, **given}})
"""
TRAIN = """
import argparse, os, time
from azureml.core import Run
parser = argparse.ArgumentParser()
parser.add_argument("--fixed", type=int)
parser.add_argument("--kind")
args = parser.parse_args()
run = Run.get_context()
assert args.fixed == 1
for step in range(3):
    run.log("accuracy", {"good": 0.92, "fair": 0.82, "bad": 0.12}[args.kind] - step / 100)
while args.kind == "bad":
    run.log("accuracy", 0.1)
    time.sleep(0.1)
open("outputs/model.txt", "w").write(args.kind)
"""


def test_four_runs_two_at_once_and_the_bad_one_is_ended(azure: AzureProject) -> None:
    """The one that the policy does not let go on would never end by itself; it is judged at each value that it logs."""
    azure.train(TRAIN)
    done = azure.control(
        """
space = {"kind": choice("bad", "good", "fair", "good", "fair")}
run = experiment.submit(sweep(space, max_concurrent_runs=2, policy=BanditPolicy(slack_factor=0.2, delay_evaluation=2)))
details = run.wait_for_completion(show_output=True)
best = run.get_best_run_by_primary_metric()
rows = run.get_children_sorted_by_primary_metric()
print(json.dumps({
    "type": run.type, "status": details["status"], "told": details["runDefinition"]["hyperDrive"], "rows": rows,
    "worst": run.get_children_sorted_by_primary_metric(top=1, reverse=True), "metrics": run.get_metrics(),
    "parameters": run.get_hyperparameters(), "best": [best.id, best.get_details()["runDefinition"]["Arguments"]],
    "not canceled": run.get_best_run_by_primary_metric(include_canceled=False).id, "parent": type(best.parent).__name__,
    "shown": RunDetails(run).get_widget_data()["run_metrics"] == run.get_metrics(),
    "runs": [[each.id == run.id, type(each).__name__] for each in experiment.get_runs(type="hyperdrive")],
    "children": [each.id for each in run.get_children()], "again": type(ws.get_run(run.id)).__name__,
    "model": best.register_model("swept", "outputs/model.txt").id,
}))
""",
        begin=SWEEP,
    )
    found = told(done)
    rows: Any = found["rows"]
    assert [json.loads(row["hyperparameters"])["kind"] for row in rows[:1]] == ["good"]
    assert sorted(row["status"] for row in rows) == ["Canceled", "Completed", "Completed", "Completed"]
    assert [round(row["best_primary_metric"], 2) for row in rows] == [0.92, 0.92, 0.82, 0.12]
    (bad,) = [row for row in rows if row["status"] == "Canceled"]
    assert (json.loads(bad["hyperparameters"]), found["worst"]) == ({"kind": "bad"}, [bad])
    assert re.search(rf"{bad['run_id']} is canceled by BanditPolicy after \d+ values of accuracy", done.stdout)
    ids = {row["run_id"] for row in rows}
    assert set(found["children"]) == set(found["metrics"]) == set(found["parameters"]) == ids  # type: ignore[call-overload]
    assert found["best"] == [rows[0]["run_id"], ["--fixed", "1", "--kind", "good"]]
    assert (found["not canceled"], found["model"], found["type"]) == (rows[0]["run_id"], "swept:1", "hyperdrive")
    assert found["shown"]
    assert (found["parent"], found["again"], found["runs"]) == ("HyperDriveRun", "HyperDriveRun", [[True, "HyperDriveRun"]])
    told_of: Any = found["told"]
    assert (told_of["primaryMetricGoal"], told_of["maxConcurrentRuns"], told_of["policy"]) == ("MAXIMIZE", 2, "BanditPolicy")
    # Two at once: a third begins when one of the first two has ended.
    begun = re.findall(r" (begins) with| (?:Completed|Canceled): ", done.stdout)
    assert begun[:3] == ["begins", "begins", ""]
    assert azure.json("show", rows[0]["run_id"])["tags"] == {"hyperparameters": '{"kind":"good"}'}


def test_a_sweep_goes_on_without_its_script_and_is_canceled_with_its_children(
    azure: AzureProject, wait_until: Callable[..., None]
) -> None:
    """Of a target with one node its runs go one after another. The source may change meanwhile."""
    azure.train(
        """
import time
from azureml.core import Run
Run.get_context().log("accuracy", 1)
open("outputs/begun", "w").close()
while True: time.sleep(0.1)
"""
    )
    job = 'estimator=Estimator("src", entry_script="train.py")'
    done = azure.control(f'print(experiment.submit(sweep({{"kind": choice(1, 2, 3)}}, {job})).id)', begin=SWEEP)
    assert "1 of 3 runs go on at once: compute target 'local' has nodes for no more" in done.stderr
    assert "max_total_runs=4, but there are 3 settings to try" in done.stderr
    azure.train("raise SystemExit('this is not what was submitted')")
    runs = azure.folder / "workspace" / "runs"
    wait_until(lambda: bool(list(runs.glob("*/outputs/begun"))), timeout=60)
    name = done.stdout.split()[-1]
    found = told(
        azure.control(
            f"""
run = ws.get_run({name!r})
before = [[child.get_status() for child in run.get_children()], run.get_status()]
assert run.cancel() is True
run.wait_for_completion()
print(json.dumps({{
    "before": before, "after": [[child.get_status() for child in run.get_children()], run.get_status()],
    "best": [each and each.get_status() for canceled in (True, False)
             for each in [run.get_best_run_by_primary_metric(include_canceled=canceled)]],
}}))
"""
        )
    )
    assert (found["before"], found["after"]) == ([["Running"], "Running"], [["Canceled"], "Canceled"])
    assert found["best"] == ["Canceled", None]


def test_a_run_of_a_sweep_that_is_killed_goes_on(azure: AzureProject, wait_until: Callable[..., None]) -> None:
    azure.train("import os, time\nwhile not os.path.exists(os.environ['GO']): time.sleep(0.05)\nopen('outputs/x', 'w').close()")
    done = azure.control(
        f"""
import signal, time
environment = Environment("e")
environment.environment_variables = {{"GO": {str(azure.folder / "go")!r}}}
job = ScriptRunConfig("src", "train.py", environment=environment)
run = experiment.submit(sweep({{"kind": choice(1, 2, 3)}}, run_config=job))
while not [child for child in run.get_children() if child.get_status() == "Running"]:
    time.sleep(0.05)
folder = run.get_details()["runFolder"]
os.kill(json.load(open(os.path.join(folder, "azureml", "supervisor.json")))["pid"], signal.SIGKILL)
while run.get_status() != "Failed" or not os.path.exists(os.path.join(folder, "ranks", "00000", "error.json")):
    time.sleep(0.05)  # until the sweep's rank is gone, too
child, = run.get_children()
before = child.get_status()
open("go", "w").close()
child.wait_for_completion()
print(json.dumps([before, child.get_status(), child.get_file_names()[-2], len(list(run.get_children()))]))
""",
        begin=SWEEP,
    )
    assert json.loads(done.stdout.splitlines()[-1]) == ["Running", "Completed", "outputs/x", 1]


def test_the_runs_of_a_sweep_that_was_killed_are_canceled_by_it(azure: AzureProject) -> None:
    azure.train("import time\nwhile True: time.sleep(0.1)")
    done = azure.control(
        """
import signal, time
run = experiment.submit(sweep({"kind": choice(1, 2)}))
while [child.get_status() for child in run.get_children()] != ["Running"] * 2:
    time.sleep(0.05)
os.kill(json.load(open(os.path.join(run.get_details()["runFolder"], "azureml", "supervisor.json")))["pid"], signal.SIGKILL)
while run.get_status() != "Failed":
    time.sleep(0.05)
again = run.cancel()
children = list(run.get_children())
for child in children:
    child.wait_for_completion(raise_on_error=False)
print(json.dumps([again, [child.id for child in children], [child.get_status() for child in children], run.get_status()]))
""",
        begin=SWEEP,
    )
    again, ids, ended, status = json.loads(done.stdout.splitlines()[-1])
    assert (again, ended, status) == (True, ["Canceled"] * 2, "Failed")
    assert f"is Failed already; its children that go on are canceled: {', '.join(ids)}" in done.stderr


def test_a_sweep_whose_runs_fail_ends_and_one_that_takes_too_long(azure: AzureProject) -> None:
    azure.train("raise ValueError('bad data')", "fails.py")
    azure.train("import time\ntime.sleep(600)", "slow.py")
    assert azure.dtrain("compute", "add", "pair", "--hosts", "localhost:1,127.0.0.1:1").returncode == 0
    done = azure.control(
        """
space = {"kind": choice(*range(9))}
job = Estimator("src", entry_script="fails.py", compute_target="pair")
fails = experiment.submit(sweep(space, max_total_runs=9, max_concurrent_runs=2, estimator=job))
slow = experiment.submit(sweep(space, max_duration_minutes=0.03, estimator=Estimator("src", entry_script="slow.py")))
told = {}
for name, run in (("fails", fails), ("slow", slow)):
    try:
        run.wait_for_completion()
    except Exception as error:
        told[name] = [run.get_details()["error"]["error"]["message"], str(error)]
    told[name + " children"] = [child.get_status() for child in run.get_children()]
told["best"] = fails.get_best_run_by_primary_metric()
told["discarded"] = fails.get_children_sorted_by_primary_metric(discard_no_metric=True)
told["kept"] = [row["best_primary_metric"] for row in fails.get_children_sorted_by_primary_metric()]
fails.wait_for_completion(show_output=True, raise_on_error=False)
print(json.dumps(told))
""",
        begin=SWEEP,
    )
    found = told(done)
    cause, raised = found["fails"]  # type: ignore[misc]
    assert re.search(r"tests-\S+ failed: rank 0 on \S+: ValueError: bad data; no run .* \(3 Failed, 6 not tried\)$", cause)
    assert "in <module>\n    raise ValueError(" in raised
    assert "sweep_rank.py" not in raised + done.stdout
    cause, _ = found["slow"]  # type: ignore[misc]
    assert re.search(
        r"max_duration_minutes=\S+ are over; no run of the sweep has completed \(1 Canceled, \d+ not tried\)$", cause
    )
    assert (found["fails children"], found["slow children"]) == (["Failed"] * 3, ["Canceled"])
    assert (found["best"], found["discarded"], found["kept"]) == (None, [], [None] * 3)
    assert "1 of 2 runs go on at once: compute target 'pair' is of hosts, and all runs are on the same ones" in done.stderr


def test_a_child_that_cannot_be_canceled_leaves_the_others_none_the_worse(azure: AzureProject) -> None:
    """One that another host supervises, here; of those that could be told to end, all are."""
    done = azure.control(
        """
from dtrain.azureml.sweep_rank import cancel_children
run = experiment.start_logging()
children = [run.child_run() for _ in range(3)]
with open(os.path.join(children[1].get_details()["runFolder"], "azureml", "supervisor.json"), "w") as file:
    json.dump({"host": "elsewhere", "pid": 1, "started": 1.0}, file)
cancel_children(run)
print(json.dumps([child.get_status() for child in children]))
children[1].complete()
run.complete()
"""
    )
    assert "is not canceled: run tests-" in done.stdout
    assert "is supervised on elsewhere; call cancel() there" in done.stdout
    assert json.loads(done.stdout.splitlines()[-1]) == ["Canceled", "Running", "Canceled"]


def test_a_secret_reaches_every_run_and_no_file(azure: AzureProject) -> None:
    """Nor does it matter what bytes it has, or that classes of dtrain's have a name with it."""
    azure.env["KEY"] = "7kQz-a-secret-9"
    azure.env.update(BYTES="7kQz-\udcff", WORD="azureml")
    azure.train("import os; print('key', os.environ['KEY'], len(os.environ['KEY']))")
    done = azure.control(
        """
def submit(*arguments):
    run = experiment.submit(sweep({"kind": choice(1)}, run_config=ScriptRunConfig("src", "train.py", arguments=arguments)))
    run.wait_for_completion()
    child, = run.get_children()
    child.download_file("user_logs/std_log_process_00.txt", "log.txt")
for key in ("KEY", "BYTES"):
    try:
        submit("--key", os.environ[key])
    except Exception as error:
        print(error)
submit()
print(open("log.txt").read())
""",
        *("--secret", "KEY", "--secret", "BYTES", "--secret", "WORD"),
        begin=SWEEP,
    )
    for key in ("KEY", "BYTES"):
        assert f"has the value of secret {key} in its arguments, variables or packages" in done.stdout
    assert "key *** 15" in done.stdout
    files = [path for path in (azure.folder / "workspace").rglob("*") if path.is_file()]
    assert files
    assert not [path for path in files if azure.env["KEY"].encode() in path.read_bytes()]


def test_a_metric_that_no_run_logged_is_told_with_those_that_they_did(azure: AzureProject) -> None:
    azure.train("from azureml.core import Run\nrun = Run.get_context()\nrun.log('validation_acc', 1)\nrun.log('final_acc', 1)")
    done = azure.control(
        """
options = dict(primary_metric_name="val_acc", run_config=ScriptRunConfig("src", "train.py"), max_total_runs=1)
run = experiment.submit(sweep({"kind": choice(1)}, **options))
details = run.wait_for_completion(show_output=True)
print(json.dumps([details["status"], details["warnings"]]))
""",
        begin=SWEEP,
    )
    text = "no run logged 'val_acc'; they logged validation_acc, final_acc"
    assert json.loads(done.stdout.splitlines()[-1]) == ["Completed", [{"message": text}]]
    assert f"warning: {text}" in done.stdout


def test_a_sweep_is_a_child_as_a_job_is(azure: AzureProject) -> None:
    azure.train("")
    done = azure.control(
        """
with experiment.start_logging() as parent:
    run = parent.submit_child(sweep({"kind": choice(1)}), tags={"of": "parent"})
    run.wait_for_completion()
child, = run.get_children()
below = list(parent.get_children(recursive=True)) == [run, child]
asked = [each.get_details()["runDefinition"]["arguments"] for each in (run, child)]
print(json.dumps([run.type, run.get_status(), run.parent == parent, run.get_tags(), below, asked, [parent.id, run.id, child.id]]))
""",
        begin=SWEEP,
    )
    *found, asked, (parent, run, child) = json.loads(done.stdout.splitlines()[-1])
    assert found == ["hyperdrive", "Completed", True, {"of": "parent"}, True]
    assert asked == [["--fixed", "1"], ["--fixed", "1", "--kind", "1"]]
    shown = azure.json("show", run)
    assert (shown["parent"], shown["children"]) == (parent, [child])
    assert f"parent   {parent}\nchildren {child}\n" in azure.dtrain("show", run).stdout


@pytest.mark.needs("mpi")
def test_a_run_of_a_sweep_is_as_one_that_is_submitted_alone(azure: AzureProject) -> None:
    """Its ranks, their threads, its packages and data; and no variable of the sweep's own rank."""
    azure.train(
        """
import json, os, sys
from azureml.core import Run
names = ("OMP_NUM_THREADS", "DTRAIN_LEGACY", "AZUREML_NODE_COUNT", "OMPI_COMM_WORLD_SIZE", "MINE")
Run.get_context().log("seen", json.dumps([*map(os.environ.get, names), open(sys.argv[1] + "/numbers.txt").read()]))
"""
    )
    (azure.folder / "numbers.txt").write_text("1 2 3")
    done = azure.control(
        """
store = ws.get_default_datastore()
store.upload_files(["numbers.txt"], target_path="data")
environment = Environment("e")
environment.environment_variables = {"MINE": "yes"}
job = ScriptRunConfig("src", "train.py", arguments=[store.path("data").as_mount()], compute_target=cluster,
    environment=environment, distributed_job_config=MpiConfiguration(1, 2))
alone = experiment.submit(job)
alone.wait_for_completion()
run = experiment.submit(sweep({"kind": choice(1)}, run_config=job))
run.wait_for_completion(raise_on_error=False)
child, = run.get_children()
print(json.dumps([each.get_metrics(ranks="all") for each in (alone, child)]))
""",
        begin=SWEEP,
    )
    expected, seen = json.loads(done.stdout.splitlines()[-1])
    assert expected == seen
    assert json.loads(seen["1"]["seen"])[2:] == ["2", "2", "yes", "1 2 3"]
