"""What goes between a run folder and its copies: live, as an archive, and merged. Over ssh: tests/cluster."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest

from dtrain.files import write_json
from dtrain.launch import archive
from dtrain.launch.merging import merge
from dtrain.launch.mirror import Incoming, Outgoing
from dtrain.launch.plan import PlannedHost
from dtrain.layout import RunLayout


def make_run(folder: Path) -> RunLayout:
    run = RunLayout(folder / "runs" / "train-1")
    run.make_folders(2)
    return run.begin_attempt(0, 2)


class Mirrored:
    """A run folder, a copy of it elsewhere, and the way of rank 1's files from there to here, in small pieces."""

    def __init__(self, folder: Path) -> None:
        self.here, self.there = make_run(folder / "here"), make_run(folder / "there")
        write_json(self.there.copy_record, {"files": {}, "besides": []})
        self._read, self._write = os.pipe()
        for end in (self._read, self._write):
            os.set_blocking(end, False)
        self.said: list[str] = []
        self.outgoing, self.incoming = Outgoing(self.there, [1], self._write), Incoming(self.here, self.said.append)

    def look(self) -> list[bytes]:
        lines = []
        self.outgoing.confirm(b"all here\n")
        while b"all here" not in lines:
            self.outgoing.write()
            lines += self.incoming.feed(self.receive())
        return lines[:-1]

    def receive(self) -> bytes:
        try:
            return os.read(self._read, 7)
        except BlockingIOError:
            return b""


@pytest.fixture
def mirrored(tmp_path: Path) -> Mirrored:
    return Mirrored(tmp_path)


def test_what_a_rank_writes_is_here_as_it_is_written(mirrored: Mirrored) -> None:
    here, there = mirrored.here.rank(1), mirrored.there.rank(1)
    there.stack.touch()
    there.output_log.write_bytes(b"one\nfile 3 0 no\n")
    there.heartbeat.write_text("{1}")
    mirrored.there.rank(0).output_log.write_text("another rank's")
    mirrored.outgoing.say(b"gone 1\n")
    assert mirrored.look() == [b"gone 1"]
    assert (here.stack.read_bytes(), here.output_log.read_bytes(), here.heartbeat.read_text()) == (
        b"",
        b"one\nfile 3 0 no\n",
        "{1}",
    )
    assert not mirrored.here.rank(0).output_log.exists()

    with open(here.output_log, "rb") as reader:  # as the console does
        reader.read()
        with open(there.output_log, "ab") as log:
            log.write(b"two\n")
        write_json(there.heartbeat, {"count": 2})
        there.orders.write_text("end\n")
        (mirrored.there.metrics / "rank-00001-attempt-1.jsonl").write_text("{}\n")
        assert mirrored.look() == []
        assert reader.read() == b"two\n"
    assert here.heartbeat.read_bytes() == there.heartbeat.read_bytes()
    assert (mirrored.here.metrics / "rank-00001-attempt-1.jsonl").read_text() == "{}\n"
    assert not here.orders.exists()
    there.output_log.write_bytes(b"new\n")
    mirrored.look()
    assert here.output_log.read_bytes() == b"new\n"


def test_what_is_left_is_sent_in_the_end(mirrored: Mirrored) -> None:
    mirrored.look()
    mirrored.there.rank(1).done.write_text("{}")
    mirrored.outgoing.finish()
    while data := mirrored.receive():
        mirrored.incoming.feed(data)
    assert mirrored.here.rank(1).done.read_text() == "{}"


@pytest.mark.parametrize("name", [b"../../elsewhere", b"/etc/elsewhere", b"attempts/nowhere/done.json"])
def test_what_cannot_be_kept_is_said_once(mirrored: Mirrored, name: bytes) -> None:
    assert mirrored.incoming.feed(b"file 2 - %s\n{}file 2 0 %s\n{}\n" % (name, name)) == [b""]
    (said,) = mirrored.said
    assert "cannot be kept here meanwhile" in said


def test_an_archive_holds_what_was_there(tmp_path: Path) -> None:
    run, data = make_run(tmp_path / "from"), io.BytesIO()
    (run.code / "start.sh").write_text("#!/bin/sh")
    (run.code / "start.sh").chmod(0o755)
    os.link(run.code / "start.sh", run.code / "also.sh")
    (run.code / "data").symlink_to("/data")
    (run.outputs / "empty").mkdir()
    (run.code / "__pycache__").mkdir()
    os.mkfifo(run.outputs / "pipe")
    (run.checkpoints / "step-000000001").mkdir()
    (run.checkpoints / "step-000000001" / "manifest.json").write_text("{}")
    run.rank(0).output_log.write_text("said")
    named = list(archive.names(run))
    assert named[-1] == "outputs/checkpoints/step-000000001/manifest.json"
    assert not [name for name in named if name.startswith(("attempts", "ranks")) or "__pycache__" in name or ".attempt" in name]

    archive.pack(data, run.root, named)
    made: list[Path] = []
    archive.unpack(io.BytesIO(data.getvalue()), tmp_path / "to", made)
    copy = RunLayout(tmp_path / "to")
    assert (copy.code / "also.sh").read_text() == (copy.code / "start.sh").read_text() == "#!/bin/sh"
    assert os.access(copy.code / "start.sh", os.X_OK)
    assert [os.readlink(copy.code / name) for name in ("data", "outputs")] == ["/data", "../outputs"]
    assert (copy.outputs / "empty").is_dir()
    assert {path for path in (tmp_path / "to").rglob("*")} | {tmp_path / "to"} == set(made)
    for size in range(0, len(data.getvalue()) - 20_000, 5_000):
        with pytest.raises(OSError, match=r"not whole|before all had come"):
            archive.unpack(io.BytesIO(data.getvalue()[:size]), tmp_path / f"cut-{size}", [])


@pytest.mark.parametrize(
    ("sent", "here", "there", "ranks", "kept", "beside"),
    [
        (None, None, "b", (1,), "b", None),
        ("a", "a", "b", (1,), "b", None),
        ("a", "c", "b", (1,), "c", "b"),
        (None, "c", "b", (1, 2), "c", "b"),
        (None, "c", "b", (0, 2), "b", "c"),
        (None, "b", "b", (1,), "b", None),
    ],
    ids=["new", "changed there", "changed on both", "new on both", "new on both, rank 0 there", "the same"],
)
def test_of_two_files_none_is_lost(
    tmp_path: Path, sent: str | None, here: str | None, there: str, ranks: tuple[int, ...], kept: str, beside: str | None
) -> None:
    run, host = make_run(tmp_path), PlannedHost(name="node2", ranks=ranks, copied=True)
    file, stats = run.outputs / "model", {}
    if sent is not None:
        file.write_text(sent)
        os.utime(file, ns=(1, 1))
        stats["outputs/model"] = archive.stat(file)
    if here not in (None, sent):
        file.write_text(str(here))
    arrived = RunLayout(run.arriving("node2"))
    arrived.outputs.mkdir(parents=True)
    (arrived.outputs / "model").write_text(there)
    told = merge(run, host, stats)  # type: ignore[arg-type]
    others = [path for path in run.outputs.glob("model.from-*")]
    assert file.read_text() == kept
    assert [path.read_text() for path in others] == ([beside] if beside else [])
    assert told == ({"outputs/model": others[0].name} if beside else {})
    assert not arrived.root.exists()


def test_what_is_a_ranks_own_replaces_what_came_before(tmp_path: Path) -> None:
    run, arrived = make_run(tmp_path), RunLayout(tmp_path / "runs" / "train-1" / ".from-node2", 0)
    for layout, said in ((run, "one\n"), (arrived, "one\ntwo\n")):
        layout.rank(1).root.mkdir(parents=True, exist_ok=True)
        layout.metrics.mkdir(parents=True, exist_ok=True)
        layout.rank(1).output_log.write_text(said)
        layout.metrics_file(1).write_text(said)
    assert merge(run, PlannedHost(name="node2", ranks=(1,), copied=True), {}) == {}
    assert run.rank(1).output_log.read_text() == run.metrics_file(1).read_text() == "one\ntwo\n"
