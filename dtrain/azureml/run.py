"""``Run``: one run of an experiment, in the control script that submitted it and in its ranks."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from dtrain.azureml import files, records, state
from dtrain.azureml.console import warn
from dtrain.azureml.details import details_of, environment_of, inputs_of
from dtrain.azureml.errors import UserErrorException, take_options
from dtrain.azureml.family import Family, runs_of
from dtrain.azureml.interactive import keep_files, keep_source
from dtrain.azureml.logged import RUN_TYPE, Logged
from dtrain.azureml.names import SECRETS
from dtrain.azureml.streaming import wait
from dtrain.errors import DtrainError, WorkspaceError
from dtrain.layout import RunLayout

if TYPE_CHECKING:
    from dtrain.azureml.datapath import DataPath
    from dtrain.azureml.environment import Environment
    from dtrain.azureml.experiment import Experiment
    from dtrain.azureml.model import Model
    from dtrain.azureml.workspace import Workspace


class Run(Family):
    """A run by its experiment and id. Raises UserErrorException when there is none.

    Only :meth:`wait_for_completion` blocks for long; the others read the run's folder, or write to it.
    """

    _fields: ClassVar = ("experiment",)
    _refused: ClassVar = {
        "add_type_providers": "there is one type of run here",
        "get_detailed_status": "use get_details()",
        "get_docs_url": "see docs/azureml.md",
        "output_datasets": "let the script write to ./outputs",
        **dict.fromkeys(("get_secret", "get_secrets"), SECRETS),
        "remove_tags": "tags are kept; set another value with tag(key, value)",
        "start": "a run that was submitted begins by itself",
    }
    _differs: ClassVar = {
        **Logged._differs,
        "get_metrics": "rank 0's, whichever rank logs; ranks='all' gives every rank's",
        "get_details": "also 'runFolder', dtrain's folder of the run, and 'warnings'",
        "get_status": "told from the run's processes and files; Queued until the first rank has begun",
        "cancel": "ends the ranks by SIGTERM, and SIGKILL after 10 s",
        "complete": "in a job it has no effect: the job ends when its script does; in a control script refused for one that has "
        "not completed",
        "fail": "in a job, this rank ends with exit code 1 when its script has ended; in a control script the job's run is "
        "Failed from then on, and ended where it still runs",
        "restore_snapshot": "copies what the run's code folder began with, to ./ID-code where no path is given",
        "register_model": "model_path is a file or folder of the run; None: all outputs",
        "get_snapshot_id": "the run's id",
        "get_portal_url": "there is no portal: the run's folder, as a file:// URL",
    }

    RUN_TYPE = RUN_TYPE

    def __init__(self, experiment: Experiment, run_id: str, outputs: str | None = None, **given: Any) -> None:
        for name in given:
            raise TypeError(f"Run() has no argument {name!r} here")
        if outputs is not None:
            raise UserErrorException("outputs= has no effect here; ./outputs of the script is the run's")
        self.experiment = experiment
        layout = RunLayout(experiment.workspace._folder.runs / run_id)
        if Path(run_id).name != run_id or not layout.spec.is_file():
            raise UserErrorException(f"no run {run_id!r} in workspace {experiment.workspace.name!r} ({layout.root.parent})")
        if (its := records.read_submitted(layout).experiment) != experiment.name:
            raise UserErrorException(
                f"run {run_id!r} is of experiment {its!r}, and not of {experiment.name!r}: use Run(Experiment(ws, {its!r}), id), "
                "or Run.get(ws, id)"
            )
        self._layout = layout

    @staticmethod
    def get_context(allow_offline: bool = True, used_for_context_manager: bool = False) -> Any:
        """The run that this process is a rank of; outside of a job an offline run, which records locally all the same.

        Called in training scripts. Raises RunEnvironmentException outside of a job unless ``allow_offline``.
        """
        from dtrain.azureml.context import current_run

        return current_run(allow_offline)

    @staticmethod
    def get(workspace: Workspace, run_id: str) -> Run:
        """The run of that id. Raises UserErrorException when there is none."""
        from dtrain.azureml.experiment import Experiment
        from dtrain.azureml.hyperdrive_run import run_of

        try:
            layout = workspace._folder.find_run(run_id)
        except WorkspaceError as error:
            raise UserErrorException(str(error)) from error
        return run_of(Experiment(workspace, records.read_submitted(layout).experiment), layout.id)

    @staticmethod
    def get_submitted_run(allow_offline: bool = True) -> Any:
        """The older name of :meth:`get_context`."""
        return Run.get_context(allow_offline)

    @property
    def _submitted(self) -> records.Submitted:
        return records.read_submitted(self._layout)

    @property
    def number(self) -> int:
        """Its place among the experiment's runs, from 1."""
        layouts = runs_of(self.experiment.workspace._folder, self.experiment.name)
        return 1 + [layout.id for layout in layouts].index(self.id)

    @property
    def name(self) -> str:
        return self._submitted.display_name

    @property
    def display_name(self) -> str:
        names = [event["text"] for event in records.events(self._layout, "name")]
        return names[-1] if names else self._submitted.display_name or self.id

    @display_name.setter
    def display_name(self, name: str) -> None:
        records.note(self._layout, "name", text=str(name))

    @property
    def type(self) -> str:
        return RUN_TYPE

    @property
    def status(self) -> str:
        return self.get_status()

    def get_status(self) -> str:
        """Preparing, Queued, Running, Finalizing; Completed, Failed or Canceled."""
        return state.told_status(self._layout)

    def get_details(self) -> dict[str, Any]:
        """What was submitted, its state and times, and where its logs are."""
        return details_of(self._layout)

    def get_details_with_logs(self) -> dict[str, Any]:
        """:meth:`get_details`, with the logs' texts in place of their paths."""
        logs = {name: path.read_text(errors="replace") for name, path in files.log_files(self._layout).items()}
        return {**self.get_details(), "logFiles": logs}

    def get_environment(self) -> Environment:
        """The environment that the job was submitted with. Raises UserErrorException for a run that is no job."""
        return environment_of(self._layout)

    def get_portal_url(self) -> str:
        """The run's folder, as a URL."""
        return self._layout.root.as_uri()

    def get_all_logs(self, destination: str | None = None) -> list[str]:
        """Copy the ranks' logs to folder ``destination`` (None: this one), and return their paths there."""
        names = list(files.log_files(self._layout))
        targets = [str(Path(destination or ".") / name) for name in names]
        for name, target in zip(names, targets, strict=True):
            self.download_file(name, target)
        return targets

    def wait_for_completion(
        self, show_output: bool = False, wait_post_processing: bool = False, raise_on_error: bool = True
    ) -> dict[str, Any]:
        """Block until the run has ended, and return :meth:`get_details`; ``show_output`` prints what the ranks print.

        Ctrl-C stops the waiting with ExperimentExecutionException, not the run. Raises ActivityFailedException with the
        traceback of the rank that failed first, unless ``raise_on_error`` is false.
        """
        wait(self._layout, show_output=show_output, raise_on_error=raise_on_error)
        return self.get_details()

    def cancel(self) -> None:
        """Ask the job to end; returns at once, or within 2 s where it has not begun. Of one that has ended only a warning."""
        if (now := self.get_status()) in state.ENDED:
            warn(f"run {self.id} is {now} already; cancel() changes nothing")
        keep_files(self._layout)
        state.cancel(self._layout)
        self._recorder = None

    def complete(self, _set_status: bool = True) -> None:
        """End a run of ``start_logging`` or ``child_run``; a job ends when its script does. UserErrorException else.

        Of a run that has failed, or was canceled, only a warning.
        """
        from dtrain.azureml.context import is_rank_of

        status = state.status_of(self._layout)
        if self._submitted.kind != "script":
            if status.state == "running":
                self._end("", exit_code=0)
            elif status.state != "completed":
                warn(f"run {self.id} is {self.get_status()} already; complete() changes nothing")
        elif status.state != "completed" and not is_rank_of(self._layout):
            raise UserErrorException(
                f"run {self.id} is a job, and {self.get_status()}, as its processes tell; complete() is for runs of "
                "start_logging() and child_run(). wait_for_completion() waits for a job, cancel() ends it"
            )

    def _end(self, message: str, *, exit_code: int) -> None:
        """End a run that this process, or another one, keeps by hand; who logs to it afterwards is told."""
        keep_files(self._layout)
        state.end_by_hand(self._layout, message, exit_code=exit_code)
        self._recorder = None

    def fail(self, error_details: Any = None, error_code: Any = None, _set_status: bool = True) -> None:
        """End a run of ``start_logging`` or ``child_run`` as failed; in a job, let this rank fail when its script has ended.

        A run that has completed, and a job's run elsewhere, counts as failed from now on; a job that still runs is ended.
        ``error_code`` is told by :meth:`get_details`.
        """
        from dtrain.azureml.context import fail_at_exit, is_rank_of

        message = str(error_details or error_code or "fail() was called")
        if error_code is not None:
            records.note(self._layout, "error_code", text=str(error_code))
        if self._submitted.kind != "script":
            if state.status_of(self._layout).state == "running":
                self._end(message, exit_code=1)
            else:
                records.note(self._layout, "fail", text=message)
        elif is_rank_of(self._layout):
            fail_at_exit(message)
        else:
            state.fail_job(self._layout, message)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            if self.get_status() not in state.ENDED:  # else the block has ended it
                self.complete()
        else:
            self.fail(f"{kind.__name__}: {error}")

    def get_file_names(self) -> list[str]:
        """The names of the run's files: outputs/, logs/, what was uploaded, and the ranks' logs."""
        return list(files.run_files(self._layout))

    def download_file(self, name: str, output_file_path: str | None = None, **given: Any) -> None:
        """Copy one file to ``output_file_path`` (a file or folder; None: here). Raises UserErrorException for an unknown name."""
        take_options("download_file", given, {"_validate_checksum": False}, {})
        source = files.find_file(self._layout, name)
        target = Path(output_file_path or ".")
        if target.is_dir() or str(output_file_path).endswith("/"):
            target = target / Path(name).name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)

    def download_files(
        self,
        prefix: str | None = None,
        output_directory: str | None = None,
        output_paths: Sequence[str] | None = None,
        batch_size: int = 100,
        append_prefix: bool = True,
        timeout_seconds: Any = None,
    ) -> None:  # long because the SDK's signature is this
        """Copy the files whose names begin with ``prefix`` (None: all) into ``output_directory`` (None: here), with their paths.

        ``append_prefix`` False leaves the prefix's folder out of them; ``output_paths`` names each file's target instead.
        """
        names = [name for name in self.get_file_names() if name.startswith(prefix or "")]
        if output_paths is not None and len(output_paths) != len(names):
            raise UserErrorException(f"{len(output_paths)} output_paths for {len(names)} files: {', '.join(names)}")
        folder = (prefix or "").rstrip("/")
        for number, name in enumerate(names):
            shown = name if append_prefix or not folder else name.removeprefix(folder).lstrip("/")
            target = output_paths[number] if output_paths is not None else str(Path(output_directory or ".") / shown)
            self.download_file(name, target)

    def _get_outputs_datapath(self) -> DataPath:
        """The run's outputs, for another one's ``resume_from``; public samples call it in spite of its name."""
        from dtrain.azureml.datapath import DataPath

        return DataPath._of_outputs(self)

    def restore_snapshot(self, snapshot_id: str | None = None, path: str | None = None) -> str:
        """Copy the files that the run was submitted with to folder ``path`` (None: ./ID-code), and return its absolute path.

        A file that the job has changed since is copied as it is now. Raises UserErrorException for an id that is not
        :meth:`get_snapshot_id`, and when the folder is there and not empty.
        """
        if snapshot_id not in (None, self.get_snapshot_id()):
            raise UserErrorException(f"snapshot_id={snapshot_id!r}: run {self.id} has one snapshot, and its id is the run's")
        target = Path(path or f"./{self.id}-code").absolute()
        if target.exists() and any(target.iterdir()):
            raise UserErrorException(f"{target} is not empty; choose a folder that is new or empty")
        files.copy_source(self._layout, target)
        return str(target)

    def take_snapshot(self, file_or_folder_path: str) -> str:
        """Keep a source file or folder with a run of ``start_logging`` or ``child_run``, in place of one that was kept before.

        Returns :meth:`get_snapshot_id`. Raises UserErrorException for what is not there or too big, and in a job, which has one.
        """
        if self._submitted.kind == "script":
            raise UserErrorException(f"run {self.id} is a job: its source was kept when it was submitted")
        keep_source(self._layout, Path(file_or_folder_path))
        return self.get_snapshot_id()

    @property
    def input_datasets(self) -> dict[str, str]:
        """The paths that the job was given of datasets and datastores, by the names of those inputs."""
        return inputs_of(self._layout)

    def get_snapshot_id(self) -> str:
        """The run's id, by which :meth:`restore_snapshot` knows its source."""
        return self.id

    def register_model(
        self, model_name: str, model_path: str | None = None, tags: Any = None, properties: Any = None, **given: Any
    ) -> Model:
        """Register a file or folder of the run (None: all its outputs) as the next version of ``model_name``.

        Takes description, model_framework, model_framework_version, too. Raises UserErrorException.
        """
        from dtrain.azureml.model import REGISTER, REGISTER_REFUSED, register_from_run

        placed = {"tags": tags, "properties": properties}
        options = take_options("register_model", {**placed, **given}, REGISTER, REGISTER_REFUSED)
        try:
            return register_from_run(self.experiment.workspace, self._layout, model_name, model_path, options)
        except UserErrorException:
            raise
        except DtrainError as error:
            raise UserErrorException(str(error)) from error

    @staticmethod
    def list(
        experiment: Experiment, type: str | None = None, tags: Any = None, properties: Any = None, **given: Any
    ) -> Iterator[Run]:
        """The runs of an experiment, as its :meth:`get_runs` gives them."""
        options = take_options("Run.list", given, {"status": None, "include_children": False, "_rehydrate_runs": True}, {})
        del options["_rehydrate_runs"]
        return experiment.get_runs(type, tags, properties, **options)

    def __repr__(self) -> str:
        return f"Run(experiment={self.experiment.name!r}, id={self.id!r}, status={self.get_status()!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Run) and other._layout.root == self._layout.root

    def __hash__(self) -> int:
        return hash(self._layout.root)
