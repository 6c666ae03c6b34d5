"""What is kept of a run, and of a workspace, beyond what dtrain keeps by itself: in folders called ``azureml``.

``run.json`` is written once, by who submits. What changes (tags, properties, wishes) are lines that are only ever appended,
each in one write: control script and ranks may do so at once, and the later line counts.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import orjson

from dtrain.azureml.errors import UserErrorException
from dtrain.files import read_json, write_json
from dtrain.layout import RunLayout
from dtrain.spec import JobSpec

EventKind = Literal[
    "tag", "property", "cancel", "fail", "error_code", "warning", "name", "preparing", "prepared", "mounted", "uploaded"
]


@dataclass(frozen=True)
class AzureLayout:
    """The files of one run's ``azureml`` folder."""

    run: RunLayout

    @property
    def root(self) -> Path:
        return self.run.azureml

    @property
    def submitted(self) -> Path:
        return self.root / "run.json"

    @property
    def supervisor(self) -> Path:
        """The process on the submitting host that sees to the run; a Slurm job's ranks are another's, on its first node."""
        return self.root / "supervisor.json"

    @property
    def events(self) -> Path:
        return self.root / "events.jsonl"

    @property
    def console(self) -> Path:
        """What the job's supervisor shows: every rank's lines, and how it ended."""
        return self.root / "console.log"

    @property
    def build_log(self) -> Path:
        """What pip said when it made the job's environment; absent where none had to be made."""
        return self.root / "build.log"

    @property
    def source(self) -> Path:
        """The names of the files that the job's folder began with; absent before it begins, and of a run that is no job."""
        return self.root / "source.json"

    def metrics(self, rank: int) -> Path:
        """What a rank logged by the SDK's names, as it was logged; numbers are in dtrain's own metrics file as well."""
        return self.root / f"metrics-{rank:05d}.jsonl"

    @property
    def sweep(self) -> Path:
        """What the rank of a sweep is to do; absent of another run. No secret's value is in it."""
        return self.root / "sweep.pickle"

    @property
    def data(self) -> Path:
        """Copies of what lies in datastores, each in a folder of its reference's name."""
        return self.root / "data"

    @property
    def uploads(self) -> Path:
        """Files of names outside of outputs/ and logs/; in outputs, where the registry takes models from."""
        return self.run.outputs / ".azureml-uploads"


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """What was submitted. ``definition`` is the run definition that ``get_details`` shows; ``parent`` a run's id or empty;
    ``master`` the host of rank 0, empty where Slurm chooses it; ``workspace`` its name and the like, for the job."""

    experiment: str
    display_name: str = ""
    target: str = "local"
    node_count: int = 1
    master: str = "127.0.0.1"
    kind: Literal["script", "interactive", "offline"] = "script"
    parent: str = ""
    workspace: dict[str, str] = field(default_factory=dict)
    definition: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Copy:
    """A copy of what is called ``name`` in the store of ``url``, to be made at ``path``: of a file, or of a folder (empty: all).

    Of a ``mount`` there need not be anything yet, and what the job changes is uploaded; a ``download`` is only read.
    """

    path: str
    url: str
    name: str
    mode: Literal["mount", "download"]


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a supervisor is to do: install ``packages``, make ``copies``, run ``spec`` from the ``folder`` of who submitted it."""

    spec: JobSpec
    folder: str
    packages: tuple[str, ...] = ()
    copies: tuple[Copy, ...] = ()


def read_submitted(run: RunLayout) -> Submitted:
    """The record of ``run``; of one that an ordinary ``dtrain run`` made, what its spec says."""
    try:
        return Submitted(**read_json(AzureLayout(run).submitted))
    except FileNotFoundError:
        spec = read_json(run.spec)
        python: dict[str, Any] = {"pip": [], "conda": [], "interpreterPath": spec.get("python") or "python"}
        environment = {"name": "", "environmentVariables": spec.get("environment", {}), "python": python}
        definition = {"script": spec["target"], "arguments": spec["args"], "nodeCount": 1, "environment": environment}
        return Submitted(experiment=spec["experiment"], definition=definition)


def write_submitted(run: RunLayout, submitted: Submitted) -> None:
    """Write the record once, when the run is made."""
    AzureLayout(run).root.mkdir(exist_ok=True)
    write_json(AzureLayout(run).submitted, vars(submitted))


def relatives(run: RunLayout) -> tuple[str, list[str]]:
    """The id of the run above ``run`` (empty: none), and of those right below it, oldest first. Called by `dtrain show`."""
    parents = {}
    for each in run.workspace.list_runs():
        with contextlib.suppress(FileNotFoundError):  # of an ordinary `dtrain run`
            parents[each.id] = read_json(AzureLayout(each).submitted)["parent"]
    return parents.get(run.id, ""), [name for name, parent in parents.items() if parent == run.id]


def append_line(path: Path, value: dict[str, Any]) -> None:
    """Append one JSON line in one write. Raises UserErrorException for what is no JSON."""
    try:
        line = orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS)
    except TypeError as error:
        raise UserErrorException(f"{value!r:.200} cannot be recorded: {error}; use numbers, text, lists and dicts") from error
    path.parent.mkdir(exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        os.write(descriptor, line)
    finally:
        os.close(descriptor)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of :func:`append_line`; none when it is absent."""
    try:
        return [orjson.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    except FileNotFoundError:
        return []


def read_entries(folder: Path) -> dict[str, Any]:
    """Entries of a workspace of one kind, by name: each a file of its own, and none is lost where several are written at once."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile
            found[path.stem] = read_json(path)
    return found


def write_entry(folder: Path, name: str, entry: Any | None) -> None:
    """Set an entry, or with None remove it. Raises OSError."""
    path = folder / f"{name}.json"
    if entry is None:
        path.unlink(missing_ok=True)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, entry)


def note(run: RunLayout, kind: EventKind, **values: Any) -> None:
    """Append an event to the run's."""
    append_line(AzureLayout(run).events, {"t": time.time(), "kind": kind, **values})


def events(run: RunLayout, kind: EventKind) -> list[dict[str, Any]]:
    return [line for line in read_lines(AzureLayout(run).events) if line["kind"] == kind]


def set_tag(run: RunLayout, key: str, value: str | None) -> None:
    """Set a tag; it is also one of dtrain's own (`dtrain show`), where a tag without a value has an empty one."""
    note(run, "tag", key=str(key), value=None if value is None else str(value))
    write_json(run.tags, {name: text or "" for name, text in tags(run).items()})


def tags(run: RunLayout) -> dict[str, str | None]:
    """The run's tags: those that a script set by dtrain itself, and those set by the SDK's names."""
    try:
        found: dict[str, str | None] = read_json(run.tags)
    except FileNotFoundError:
        found = {}
    return {**found, **{event["key"]: event["value"] for event in events(run, "tag")}}


def add_properties(run: RunLayout, values: dict[str, str]) -> None:
    """Add properties, each once. Raises UserErrorException for one that has another value already; none is added then."""
    known = properties(run)
    texts = {str(key): str(value) for key, value in values.items()}
    changed = [key for key, value in texts.items() if known.get(key, value) != value]
    if changed:
        raise UserErrorException(
            f"property {changed[0]!r} of run {run.id} is {known[changed[0]]!r} and cannot be changed; use tag() for what changes"
        )
    for key, value in texts.items():
        note(run, "property", key=key, value=value)


def properties(run: RunLayout) -> dict[str, str]:
    found: dict[str, str] = {}
    for event in events(run, "property"):
        found.setdefault(event["key"], event["value"])  # of two writers at once the first one's holds
    return found
