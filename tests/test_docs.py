"""What the documents say is so: links lead somewhere, commands and options exist, launch scripts do what they claim."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from dtrain import cli, install

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")),
]
LAUNCHERS = sorted((ROOT / "launchers").glob("*"))


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    lines += [line.removeprefix("$ ") for block in blocks("console") for line in block.splitlines() if line.startswith("$ ")]
    return [line.split("  #")[0].split(" > ")[0].strip() for line in lines if line.strip()]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / document).read_text()):
        assert ((ROOT / document).parent / target).exists(), f"{document} links to {target}"


@pytest.mark.parametrize("command", [command for command in commands() if command.startswith("dtrain ")])
def test_commands_and_their_options_exist(command: str) -> None:
    _, verb, *args = shlex.split(command)
    assert verb in cli.main.commands
    # Parses options as the real command does, and runs nothing.
    with click.Context(cli.main) as parent:
        cli.main.commands[verb].make_context(verb, args, parent=parent, resilient_parsing=True)


@pytest.mark.parametrize("target", re.findall(r"^make ([\w-]+)", "\n".join(commands()), re.MULTILINE))
def test_make_targets_exist(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_python_blocks_run(tmp_path: Path) -> None:
    """The first as it is, twice, the second time resumed; of those for frameworks, that they are Python: they need a model."""
    own, *frameworks = blocks("python")
    (tmp_path / "train.py").write_text(own)
    for resume in ([], ["--resume", "latest"]):
        argv = [sys.executable, "-m", "dtrain.cli", "run", *resume, "train.py"]
        environ = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(argv, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    for block in frameworks:
        compile(block, "README.md", "exec")


def test_every_command_of_the_command_line_is_in_the_readme() -> None:
    for verb in cli.main.commands:
        assert f"dtrain {verb}" in README


def test_install_lines_for_chainer_are_those_that_dtrain_says() -> None:
    for line in install.CHAINER.split(" && "):
        assert line in README


# What each launch script says to `dtrain run` for RANKS=3, WORKERS=3, SERVERS=2, NODES=3 and TASKS_PER_NODE=2.
ASKED = {
    "horovod.sh": ["-n", "3", "--launcher", "horovod"],
    "mpi.sh": ["-n", "3", "--launcher", "mpi"],
    "parameter_server.sh": ["--launcher", "parameter_server", "--workers", "3", "--servers", "2", "--chief"],
    "slurm.sh": ["--launcher", "slurm", "--nodes", "3", "--tasks-per-node", "2"],
}


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=lambda path: path.name)
def test_launch_scripts_are_short_and_say_what_dtrain_run_says(launcher: Path, tmp_path: Path) -> None:
    text = launcher.read_text()
    assert len(text.splitlines()) <= 30
    assert text.splitlines()[-1].startswith("exec dtrain run ")
    if launcher.name == "horovod.sh" and importlib.util.find_spec("horovod") is None:
        pytest.skip("Horovod is not installed, and its launcher looks for it")
    (tmp_path / "train.py").write_text("")
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    dtrain = bin_folder / "dtrain"
    dtrain.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m dtrain.cli "$@"\n')
    dtrain.chmod(0o755)
    path = os.pathsep.join([str(bin_folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    environ = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "RANKS": "3", "WORKERS": "3", "SERVERS": "2"}
    environ |= {"NODES": "3", "TASKS_PER_NODE": "2"}

    def told(*command: str) -> str:
        argv = [*command, "--dry-run", "train.py", "--epochs", "3"]
        done = subprocess.run(argv, cwd=tmp_path, env=environ, capture_output=True, text=True, check=True)
        return re.sub(r"127\.0\.0\.1:\d+", "127.0.0.1:PORT", done.stdout)  # taken free each time

    plan = told(str(launcher))
    assert plan == told("dtrain", "run", *ASKED[launcher.name])
    assert "train.py --epochs 3" in plan or launcher.name == "slurm.sh"
    if launcher.name == "parameter_server.sh":
        environ["LEADER"] = ""
        assert told(str(launcher)) == told("dtrain", "run", *ASKED[launcher.name][:-1])
