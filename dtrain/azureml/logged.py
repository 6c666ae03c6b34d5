"""What a run object records, in a job or in a control script: metrics, tags, files."""

from __future__ import annotations

import functools
import io
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, ClassVar

import orjson

from dtrain.azureml import files, records, state
from dtrain.azureml.console import warn
from dtrain.azureml.errors import Named, UserErrorException
from dtrain.azureml.recording import Recorder, logged_ranks, read_rank
from dtrain.azureml.values import dict_of, list_of
from dtrain.env import RankEnv
from dtrain.layout import RunLayout

RUN_TYPE = "azureml.scriptrun"
"""The type of all runs here."""
_CHART = {"schema_type", "schema_version", "data"}


class Logged(Named):
    """The part of a run that records. All methods write to local files and wait for nobody."""

    _differs: ClassVar = dict.fromkeys(
        ("log_accuracy_table", "log_confusion_matrix", "log_predictions", "log_residuals"),
        "kept as a JSON file of the run, whose name get_metrics() gives; no chart is drawn",
    )

    _layout: RunLayout
    _recorder: Recorder | None = None

    def _record(self) -> Recorder:
        if self._recorder is None:
            layout = RankEnv.read().layout
            is_own = layout is not None and layout.root == self._layout.root
            self._recorder = _own_recorder() if is_own else Recorder(self._layout, 0)
            if not is_own and (now := state.told_status(self._layout)) in state.ENDED:
                warn(f"run {self.id} is {now} already; what is logged to it now is recorded all the same")
        return self._recorder

    @property
    def id(self) -> str:
        return self._layout.id

    def log(self, name: str, value: Any, description: str = "", step: int | None = None) -> None:
        """Log one number or text; of this rank. Raises UserErrorException for anything else."""
        self._record().scalar(name, value, step)

    def log_list(self, name: str, value: Sequence[Any], description: str = "") -> None:
        """Log a list of numbers under one name."""
        self._record().values(name, value)

    def log_row(self, name: str, description: str | None = None, **kwargs: Any) -> None:
        """Log a row of several columns; rows of one name become a table."""
        if not kwargs:
            warn(f"log_row({name!r}) has no columns; give them by name: log_row({name!r}, loss=0.1, accuracy=0.9)")
        self._record().row(name, kwargs)

    def log_table(self, name: str, value: dict[str, Any], description: str = "") -> None:
        """Log a dict of columns, each a number or a list."""
        self._record().table(name, value)

    def log_image(self, name: str, path: str | None = None, plot: Any = None, description: str = "") -> None:
        """Keep an image file (``path``), or a matplotlib figure or module (``plot``, by its ``savefig``), under this name.

        Raises UserErrorException when neither or both are given, or there is no such file.
        """
        if (path is None) == (plot is None):
            raise UserErrorException(f"log_image({name!r}) takes path= or plot=, and one of them")
        if path is not None and not Path(path).is_file():
            raise UserErrorException(f"there is no file {path!r} to log (from {os.getcwd()})")
        target = files.new_file(self._layout, name, Path(path).suffix if path is not None else ".png", self._record().rank)
        if path is not None:
            shutil.copyfile(path, target)
        else:
            plot.savefig(target)
        self._record().artifact(name, target.name)

    def log_accuracy_table(self, name: str, value: Any, description: str = "") -> None:
        """Keep an accuracy table: a dict or JSON text of schema_type, schema_version and data. UserErrorException for others."""
        self._log_chart(name, value)

    def log_confusion_matrix(self, name: str, value: Any, description: str = "") -> None:
        """Keep a confusion matrix, as :meth:`log_accuracy_table`."""
        self._log_chart(name, value)

    def log_predictions(self, name: str, value: Any, description: str = "") -> None:
        """Keep bins of predictions, as :meth:`log_accuracy_table`."""
        self._log_chart(name, value)

    def log_residuals(self, name: str, value: Any, description: str = "") -> None:
        """Keep a histogram of residuals, as :meth:`log_accuracy_table`."""
        self._log_chart(name, value)

    def _log_chart(self, name: str, value: Any) -> None:
        try:
            chart = orjson.loads(value) if isinstance(value, str) else value
            text = orjson.dumps(chart, option=orjson.OPT_SERIALIZE_NUMPY)
        except (orjson.JSONDecodeError, TypeError) as error:
            raise UserErrorException(f"metric {name!r} is no JSON: {error}") from error
        if not isinstance(chart, Mapping) or _CHART - chart.keys():
            raise UserErrorException(
                f"metric {name!r} is {value!r:.80}; log a dict, or JSON text, of {', '.join(sorted(_CHART))}"
            )
        target = files.new_file(self._layout, name, ".json", self._record().rank)
        target.write_bytes(text)
        self._record().artifact(name, target.name)

    def get_metrics(
        self, name: str | None = None, recursive: bool = False, run_type: Any = None, populate: bool = False, ranks: str = "0"
    ) -> dict[Any, Any]:
        """Rank 0's metrics: of a name that was logged once its value, else the list of all; of rows a dict of columns.

        ``recursive``: a dict of them by run id, of this run and all below it that have some, those of a ``run_type`` alone;
        ``populate``: of what was logged as a JSON file, its content instead of its name.
        Beyond the SDK: ``ranks="all"`` gives a dict of them by rank.
        """
        if ranks not in ("0", "all"):
            raise UserErrorException(f"ranks={ranks!r}: there are '0' and 'all'")
        if run_type not in (None, RUN_TYPE):
            return {}
        if recursive:
            runs = [self, *self._below()]
            return {run.id: found for run in runs if (found := run.get_metrics(name, populate=populate, ranks=ranks))}
        if ranks == "all":
            logged = {rank: self._metrics_of(rank, name, populate) for rank in logged_ranks(self._layout)}
            return {rank: found for rank, found in logged.items() if found or name is None}
        return self._metrics_of(0, name, populate)

    def _metrics_of(self, rank: int, name: str | None, populate: bool) -> dict[str, Any]:
        found = read_rank(self._layout, rank, populate=populate)
        return found if name is None else {name: found[name]} if name in found else {}

    def _below(self) -> Sequence[Logged]:
        """The runs below this one, at any depth."""
        return []

    def tag(self, key: str, value: str | None = None) -> None:
        """Set a tag; a later value takes its place."""
        records.set_tag(self._layout, key, value)

    def set_tags(self, tags: Mapping[str, str | None]) -> None:
        """Set several tags."""
        for key, value in dict_of("tags", tags).items():
            self.tag(key, value)

    def get_tags(self) -> dict[str, str | None]:
        """The tags as of now; None is the value of one that has none."""
        return records.tags(self._layout)

    @property
    def tags(self) -> dict[str, str | None]:
        return self.get_tags()

    def add_properties(self, properties: dict[str, str]) -> None:
        """Add properties, which never change. Raises UserErrorException for one that has another value."""
        records.add_properties(self._layout, dict_of("properties", properties))

    def get_properties(self) -> dict[str, str]:
        """The properties as of now."""
        return records.properties(self._layout)

    @property
    def properties(self) -> dict[str, str]:
        return self.get_properties()

    def upload_file(self, name: str, path_or_stream: str | os.PathLike[str] | IO[Any], datastore_name: str | None = None) -> None:
        """Copy a local file, or what a stream holds, into the run as ``name``.

        Raises UserErrorException when there is no such file, or the run has one of that name.
        """
        _refuse_store(datastore_name)
        if isinstance(path_or_stream, str | os.PathLike):
            files.upload(self._layout, name, Path(path_or_stream))
            return
        if not hasattr(path_or_stream, "read"):
            raise UserErrorException(f"path_or_stream={path_or_stream!r:.80} is no path, as text, and no stream")
        data = path_or_stream.read()
        files.keep(self._layout, name, io.BytesIO(data.encode() if isinstance(data, str) else data))

    def upload_files(
        self, names: Sequence[str], paths: Sequence[str], return_artifacts: bool = False, timeout_seconds: Any = None
    ) -> None:
        """Copy local files into the run under these names. Raises UserErrorException as upload_file, and for return_artifacts."""
        if return_artifacts:
            raise UserErrorException(
                "return_artifacts=True is not available: get_file_names() and download_file() tell of the files"
            )
        names, paths = list_of("names", names), list_of("paths", paths)
        if len(names) != len(paths):
            raise UserErrorException(f"{len(names)} names and {len(paths)} paths: give one name for each path")
        for name, path in zip(names, paths, strict=True):
            self.upload_file(name, path)

    def upload_folder(self, name: str, path: str, datastore_name: str | None = None) -> None:
        """Copy all files of a local folder into the run, below ``name``."""
        _refuse_store(datastore_name)
        folder = Path(path)
        if not folder.is_dir():
            raise UserErrorException(f"there is no folder {path!r} to upload (from {os.getcwd()})")
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                files.upload(self._layout, f"{name}/{file.relative_to(folder).as_posix()}", file)

    def flush(self, timeout_seconds: int = 300) -> None:
        """Nothing waits to be written: what is logged is in its file already."""


@functools.cache
def _own_recorder() -> Recorder:
    """That of the rank that this process is: one, for scripts that ask ``Run.get_context()`` anew for each metric."""
    rank_env = RankEnv.read()
    assert rank_env.layout is not None
    return Recorder(rank_env.layout, rank_env.rank, str(rank_env.task or ""))


def _refuse_store(name: str | None) -> None:
    if name is not None:
        raise UserErrorException(
            f"datastore_name={name!r}: files of a run stay in its folder; use Datastore.upload_files for others"
        )
