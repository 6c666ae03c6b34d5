"""Secrets of jobs that control scripts submit: in the ranks' variables, and nowhere else."""

from __future__ import annotations

from tests.azureml.conftest import AzureProject
from tests.azureml.test_submit import told

SECRET = "correct-horse-battery"
CONTROL = """
run = experiment.submit(Estimator(
    "src", entry_script="train.py", script_params={"--password": os.environ["DB_PASSWORD"]},
    environment_variables={"URL": "sql://me:" + os.environ["DB_PASSWORD"] + "@host"},
))
details = run.wait_for_completion(show_output=True)
try:
    run.get_secret("db")
except Exception as error:
    print(error)
print(json.dumps(details["runDefinition"]))
"""


def test_a_secret_reaches_the_ranks_and_no_record(azure: AzureProject) -> None:
    azure.env["DB_PASSWORD"] = SECRET
    azure.train(
        "import os, sys\nassert os.environ['DB_PASSWORD'] == sys.argv[2] and len(sys.argv[2]) == 21\n"
        "print('connecting to', os.environ['URL'])\n"
    )
    done = azure.control(CONTROL, "--secret", "DB_PASSWORD")
    assert "connecting to sql://me:***@host" in done.stdout
    assert "`dtrain azureml --secret NAME submit.py`" in done.stdout
    definition = told(done)
    assert definition["arguments"] == ["--password", "***"]
    assert definition["environment"]["environmentVariables"] == {"URL": "sql://me:***@host"}  # type: ignore[index]
    files = [path for path in (azure.folder / "workspace").rglob("*") if path.is_file() and not path.is_symlink()]
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]
    assert SECRET not in done.stdout + done.stderr


def test_a_secret_that_is_not_there_is_refused(azure: AzureProject) -> None:
    azure.train("print('x')")
    done = azure.try_control('experiment.submit(ScriptRunConfig("src", "train.py"))', "--secret", "DB_PASWORD")
    assert done.returncode == 1
    assert "UserErrorException: --secret DB_PASWORD: there is no such variable" in done.stderr
