"""What to run: a JobSpec, checked on construction."""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dtrain.binding import BINDS, Bind
from dtrain.errors import NotRunnable, UsageError, did_you_mean
from dtrain.hosts import Host, place
from dtrain.job_options import (
    CLUSTER_LAUNCHERS,
    LAUNCHERS,
    MPI_LAUNCHERS,
    ClusterOptions,
    Hangs,
    HorovodOptions,
    Launcher,
    Restarts,
    SlurmOptions,
    check_seconds,
    default_max_ranks,
)
from dtrain.layout import check_name
from dtrain.masking import MASK, SHORTEST, Masker
from dtrain.roles import Task, cluster_tasks

_PYTHON = re.compile(r"python\d*(\.\d+)?")


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    """One job: a script or module, its arguments, and how many ranks run it.

    ``target`` is the path of a script, or a module's name when ``is_module``. ``source`` is the folder that is copied into the
    run folder and in which the ranks then work: by default the script's folder; the current folder for a module.
    ``launcher`` None means ``local`` for one rank and ``mpi`` for more, or where there are ``hosts``. ``cluster`` is for the
    launchers that have one, ``slurm`` and ``horovod`` for those launchers.
    ``hosts`` are filled with tasks by rank; none means this host, for as many as there are. ``network`` is the one, as
    10.0.0.0/24, by which their ranks talk; None: MPI chooses. Without ``preflight`` hosts are not asked before the start.
    ``shared_fs`` False: also where only some of them do not see the workspace, those are given copies of the run folder.
    ``secrets`` are names of variables, of ``environment`` or of this process's, whose values nothing that dtrain writes shows.
    ``bind`` gives each rank cores and a GPU of its own (see :func:`dtrain.binding.plan_binding`).
    ``resume_from`` is the folder of the run whose newest whole checkpoint the ranks start from.
    ``python`` is the Python that runs the ranks, where dtrain has to be installed too; None: the one that runs this.

    Raises UsageError for values that cannot be, NotRunnable when there is no such script.
    """

    target: str
    is_module: bool = False
    args: tuple[str, ...] = ()
    source: Path | None = None
    workers: int = 1
    max_ranks: int = field(default_factory=default_max_ranks)
    launcher: Launcher | None = None
    cluster: ClusterOptions | None = None
    hosts: tuple[Host, ...] = ()
    network: str | None = None
    preflight: bool = True
    shared_fs: bool = True
    slurm: SlurmOptions | None = None
    horovod: HorovodOptions | None = None
    experiment: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    secrets: tuple[str, ...] = ()
    bind: Bind = "none"
    timeout_s: float | None = None
    grace_s: float = 10.0
    resume_from: Path | None = None
    python: Path | None = None
    restarts: Restarts = field(default_factory=Restarts)
    hangs: Hangs = field(default_factory=Hangs)

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise UsageError(f"-n {self.workers}: a job has at least 1 rank")
        if self.launcher is not None and self.launcher not in LAUNCHERS:
            raise UsageError(
                f"unknown launcher {self.launcher!r}{did_you_mean(self.launcher, LAUNCHERS)}; there are {', '.join(LAUNCHERS)}"
            )
        if self.cluster is not None and self.launcher not in CLUSTER_LAUNCHERS:
            raise UsageError(
                f"servers, a chief and what belongs to them go with --launcher {' or '.join(CLUSTER_LAUNCHERS)}, "
                f"not with {self.launcher_name}"
            )
        # Asking for the tasks also refuses options that this launcher does not have.
        if self.slurm is not None and self.launcher != "slurm":
            raise UsageError(
                "--nodes, --tasks-per-node, --sbatch-arg and --slurm-start go with --launcher slurm, "
                f"not with {self.launcher_name}"
            )
        if self.size > self.max_ranks and self.launcher != "slurm":  # Slurm has limits of its own
            asked = f"-n {self.workers}" + (f" (with all tasks {self.size})" if self.size > self.workers else "")
            raise UsageError(f"{asked} exceeds --max-ranks {self.max_ranks}; lower -n, or raise --max-ranks if you mean it")
        self._check_horovod()
        self._check_hosts()
        if self.launcher == "local" and self.workers > 1:
            raise UsageError(f"launcher 'local' runs one rank, and -n {self.workers} asks for more; use --launcher mpi")
        if not 0 <= self.grace_s < float("inf"):
            raise UsageError(f"--grace {self.grace_s:g} is not a number of seconds from 0")
        check_seconds("--timeout", self.timeout_s)
        for name in self.environment:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise UsageError(f"--env {name!r} is not a variable's name; use --env NAME=VALUE")
        if self.bind not in BINDS:
            raise UsageError(f"unknown --bind {self.bind!r}{did_you_mean(self.bind, BINDS)}; there are {', '.join(BINDS)}")
        self._check_secrets()
        if self.python is not None and (not self.python.is_file() or not os.access(self.python, os.X_OK)):
            raise NotRunnable(
                f"--python {self.python} is not a program (from {Path.cwd()}); give a Python's path, as .venv/bin/python"
            )
        check_name("experiment", self.experiment_name)
        self._check_target()

    def _check_horovod(self) -> None:
        if self.horovod is not None and self.launcher != "horovod":
            raise UsageError(
                "--controller, --min-workers, --max-workers, --discovery and --elastic-timeout go with --launcher horovod, "
                f"not with {self.launcher_name}"
            )
        options = self.horovod_options
        if options.gloo and not self.shared_fs:
            raise UsageError(
                "--no-shared-fs does not go with Horovod over Gloo, whose ranks all have to see the workspace: choose one on a "
                "file system that the hosts share, or start the ranks by MPI (--controller mpi)"
            )
        if not options.elastic:
            return
        if self.workers < options.least or (options.max_workers is not None and self.workers > options.max_workers):
            most = "no limit" if options.max_workers is None else options.max_workers
            raise UsageError(
                f"-n {self.workers}, with which the job begins, is not in --min-workers {options.least} and --max-workers {most}"
            )
        if options.max_workers is not None and options.max_workers > self.max_ranks:
            raise UsageError(
                f"--max-workers {options.max_workers} exceeds --max-ranks {self.max_ranks}; lower one, or raise the other"
            )
        if self.bind != "none":
            raise UsageError(
                "--bind cannot be where workers come and go: it shares a host out among ranks that stay; leave it out"
            )
        if options.discovery is None:
            return
        if self.hosts:
            raise UsageError("--discovery says which hosts there are; leave out -H and --hostfile")
        if not options.discovery.is_file():
            raise NotRunnable(f"--discovery {options.discovery}: there is no such file; name a program that prints a host a line")
        if not os.access(options.discovery, os.X_OK):
            raise NotRunnable(f"--discovery {options.discovery} is not executable; run: chmod +x {options.discovery}")

    def _check_hosts(self) -> None:
        if self.launcher_name in CLUSTER_LAUNCHERS:
            if self.hosts and not self.tasks:
                raise UsageError("one worker without servers runs where dtrain does; leave out -H and --hostfile, or add workers")
            if local := [host.name for host in self.hosts if host.is_link_local]:
                raise UsageError(
                    f"the address {local[0]} is link-local: other tasks cannot reach it; give an address that is not, or a name"
                )
            if not self.preflight:
                raise UsageError(f"--launcher {self.launcher} has to ask its hosts for free ports; leave out --skip-preflight")
        elif self.hosts and self.launcher_name not in MPI_LAUNCHERS:
            raise UsageError(
                f"-H and --hostfile go with --launcher {', '.join((*MPI_LAUNCHERS, *CLUSTER_LAUNCHERS))}, "
                f"not with {self.launcher_name}"
            )
        if self.hosts:
            place(self.size, self.hosts)
        elif not self.shared_fs:
            raise UsageError("--no-shared-fs goes with -H or --hostfile: on one host there is nothing to copy")
        if self.network is not None:
            named = self.hosts or self.horovod_options.discovery is not None
            if not named or self.launcher_name not in MPI_LAUNCHERS:
                raise UsageError(f"--network goes with -H or --hostfile and --launcher {' or '.join(MPI_LAUNCHERS)}")
            try:
                ipaddress.ip_network(self.network)
            except ValueError as error:
                raise UsageError(f"--network {self.network}: {error}; give a network as 10.0.0.0/24") from None

    def _check_secrets(self) -> None:
        for name in self.secrets:
            value = self.environment.get(name, os.environ.get(name))
            if value is None:
                raise UsageError(
                    f"--secret {name}: there is no such variable; export it first ({name}=... dtrain run ...): "
                    "--secret takes a variable's name, not its value"
                )
            if len(value) < SHORTEST:
                raise UsageError(
                    f"--secret {name}: its value is shorter than {SHORTEST} characters, which stand in many other words too and "
                    "cannot be masked; use a longer secret, or leave out --secret"
                )

    def secret_values(self) -> dict[str, str]:
        """The secrets by their names."""
        return {name: self.environment.get(name, os.environ.get(name, "")) for name in self.secrets}

    @property
    def open_environment(self) -> dict[str, str]:
        """``environment`` without the secrets: what everybody may see."""
        return {name: value for name, value in self.environment.items() if name not in self.secrets}

    def _check_target(self) -> None:
        if self.is_module:
            if not re.fullmatch(r"\w+(\.\w+)*", self.target):
                raise UsageError(f"-m {self.target!r} is not a module's name; use -m package.module")
            return
        script = Path(self.target)
        if _PYTHON.fullmatch(script.name) and (not script.is_file() or _is_program(script)):
            options, runs = _split_python(self.args)
            ranks = f"-n {self.workers} " if self.workers > 1 else ""
            example = f" (dtrain run {ranks}{' '.join(runs)})" if runs else ""
            instead = "; for Python's own options there are variables, as --env PYTHONUNBUFFERED=1 for -u" if options else ""
            raise UsageError(
                f"leave {self.target} out: dtrain starts Python itself{example}, which --python PATH chooses{instead}"
            )
        if script.is_dir():
            raise NotRunnable(f"{self.target} is a folder, not a script; name the script to run")
        if not script.is_file():
            siblings = [path.name for path in script.parent.glob("*.py")] if script.parent.is_dir() else []
            raise NotRunnable(f"no such script: {self.target} (from {Path.cwd()}){did_you_mean(script.name, siblings)}")
        if _is_program(script):
            failed = NotRunnable(f"{self.target} is no Python script but a program; start it from a script, by subprocess.run")
            failed.exit_code = 126
            raise failed
        if not _beside_itself(script).is_relative_to(self.source_folder.resolve()):
            raise UsageError(f"script {self.target} is not in {self.source_folder}; the ranks work in a copy of that folder")

    @property
    def source_folder(self) -> Path:
        if self.source is not None:
            return self.source.absolute()
        return Path.cwd() if self.is_module else Path(self.target).absolute().parent

    @property
    def script_in_source(self) -> str:
        """The script's path relative to the source folder, or the module's name."""
        return self.target if self.is_module else str(_beside_itself(Path(self.target)).relative_to(self.source_folder.resolve()))

    @property
    def interpreter(self) -> str:
        """The path of the Python that runs the ranks, its links kept: a virtual environment's knows by its place what it is."""
        return sys.executable if self.python is None else str(self.python.absolute())

    @property
    def launcher_name(self) -> Launcher:
        return self.launcher or ("local" if self.workers == 1 and not self.hosts else "mpi")

    @property
    def cluster_options(self) -> ClusterOptions:
        """The cluster's options, complete. Only for the launchers that have a cluster."""
        return (self.cluster or ClusterOptions()).resolved(self.launcher_name)

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks of the cluster by rank; none when ranks have no roles, as a single worker alone has none."""
        if self.launcher_name not in CLUSTER_LAUNCHERS:
            return ()
        options = self.cluster_options
        tasks = cluster_tasks(options.dialect, workers=self.workers, servers=options.servers or 0, evaluator=options.evaluator)
        return tasks if len(tasks) > 1 else ()

    @property
    def slurm_options(self) -> SlurmOptions:
        return self.slurm or SlurmOptions()

    @property
    def horovod_options(self) -> HorovodOptions:
        return self.horovod or HorovodOptions()

    @property
    def size(self) -> int:
        """How many ranks the job has, tasks of all roles counted; an elastic one, when it begins."""
        return len(self.tasks) or self.workers

    @property
    def experiment_name(self) -> str:
        return experiment_from(self.target) if self.experiment is None else self.experiment

    def to_json(self) -> dict[str, Any]:
        """The content of ``spec.json``, secrets masked."""
        values = dataclasses.asdict(self)
        values["environment"] = {name: MASK if name in self.secrets else value for name, value in self.environment.items()}
        values.update(
            launcher=self.launcher_name,
            experiment=self.experiment_name,
            source=self.source_folder,
            script=self.script_in_source,
            args=list(self.args),
            python=None if self.python is None else self.interpreter,
        )
        if self.launcher_name in CLUSTER_LAUNCHERS:
            values["cluster"] = dataclasses.asdict(self.cluster_options)
        masked: dict[str, Any] = Masker(self.secret_values().values()).value(values)
        return masked

    @staticmethod
    def from_json(values: Mapping[str, Any], code: Path) -> JobSpec:
        """The job whose :meth:`to_json` this is, of the copy of its source in ``code``: for who runs it later, elsewhere.

        For ranks without roles, on hosts that are not named. Its secrets are taken from this process's environment.
        """
        script = values["script"]
        given = {
            **{name: value for name, value in values.items() if name != "script"},
            "target": script if values["is_module"] else str(code / script),
            "source": code,
            "args": tuple(values["args"]),
            "hosts": (),
            "environment": {name: value for name, value in values["environment"].items() if name not in values["secrets"]},
            "secrets": tuple(values["secrets"]),
            "resume_from": Path(values["resume_from"]) if values["resume_from"] is not None else None,
            "python": Path(values["python"]) if values["python"] is not None else None,
            "restarts": Restarts(**{**values["restarts"], "restart_on": tuple(values["restarts"]["restart_on"])}),
            "hangs": Hangs(**values["hangs"]),
        }
        if values["slurm"] is not None:
            given["slurm"] = SlurmOptions(**{**values["slurm"], "sbatch_args": tuple(values["slurm"]["sbatch_args"])})
        return JobSpec(**given)


def _split_python(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments of ``python``: its own options, and what it runs: a script, or ``-m`` and a module. Pure."""
    options, rest = [], list(args)
    while rest and rest[0].startswith("-") and rest[0] != "-m":
        options.append(rest.pop(0))
        if options[-1] in ("-W", "-X"):  # a value follows
            options += rest[:1]
            rest = rest[1:]
        elif options[-1] in ("-c", "-"):  # no script does
            return options, []
    return options, rest[:2] if rest[:1] == ["-m"] else rest[:1]


def _is_program(path: Path) -> bool:
    """Whether the file holds machine code (ELF)."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return file.read(4) == b"\x7fELF"
    return False


def _beside_itself(script: Path) -> Path:
    """The script's absolute path; a script that is a symbolic link counts where the link is."""
    return script.absolute().parent.resolve() / script.name


def experiment_from(target: str) -> str:
    """An experiment's name from a script's or module's."""
    stem = target.rpartition("/")[2].removesuffix(".py").rpartition(".")[2]
    return re.sub(r"[^A-Za-z0-9._-]", "-", stem).lstrip("._-")[:64] or "run"
