"""What the console makes of the bytes that ranks write."""

from __future__ import annotations

import os
import pty
from pathlib import Path

import pytest

from dtrain.launch.console import Console, LineReader


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_a_bar_is_what_stands_there_when_its_line_ends(tmp_path: Path, size: int) -> None:
    """However its bytes are cut up; also with Windows' line ends, colours, and characters of several bytes."""
    data = "first\r\n\r 10% \u2588\r 55% \u2588\u2588\r\x1b[A\x1b[32mgreen\x1b[0m\nbad \udc80\n\nrest".encode(
        errors="surrogateescape"
    )
    reader, lines = LineReader(tmp_path / "output.log"), []
    for begin in range(0, len(data), size):
        lines += reader.lines(data[begin : begin + size])
    assert lines == ["first", "\x1b[32mgreen\x1b[0m", "bad \ufffd", ""]
    assert reader.bar() == ""  # a line that is not whole yet is no bar
    assert reader.lines(b"", final=True) == ["rest"]
    assert reader.lines(b"", final=True) == []


def test_an_unfinished_bar_is_known(tmp_path: Path) -> None:
    reader = LineReader(tmp_path / "output.log")
    seen = []
    for data in (b"begin\n", b"10%\r", b"20%\r30%", b"35", b"\r40%\ntext", b"\r50%", b"\n"):
        reader.lines(data)
        seen.append(reader.bar())
    assert seen == ["", "10%", "30%", "30%35", "", "50%", ""]


def test_a_file_that_another_host_writes_is_read_on_when_it_is_opened_anew(tmp_path: Path) -> None:
    """A file replaced by a longer copy stands for one of a network file system: only who opens it sees what came."""
    log, longer = tmp_path / "output.log", tmp_path / "longer"
    reader = LineReader(log)
    assert (reader.read(), reader.grows()) == (b"", False)
    log.write_bytes(b"one\n")
    assert (reader.read(), reader.grows(), reader.grows()) == (b"one\n", True, False)
    longer.write_bytes(b"one\ntwo\n")
    longer.rename(log)
    assert (reader.read(), reader.grows()) == (b"", False)
    reader.look_again()
    assert (reader.grows(), reader.read(), reader.read()) == (True, b"two\n", b"")
    log.unlink()
    reader.look_again()
    assert reader.read() == b""
    log.write_bytes(b"one\ntwo\nthree\n")
    assert reader.read() == b"three\n"


@pytest.mark.parametrize(
    "bar",
    [
        " 50%|#####     | 1/2 [00:00<00:00,  1.00it/s]",
        "epoch 1:  50%|#####     | 1/2 [1:00:00<1:00:00,  1.00s/it, loss=0.5, top=[1, 5]]",
        "7img [00:00, 12.3img/s]",
    ],
)
def test_what_is_printed_after_a_bar_is_a_line_of_its_own(tmp_path: Path, bar: str) -> None:
    reader = LineReader(tmp_path / "output.log")
    assert reader.lines(f"\r{bar}\r{bar}step 1\n\r{bar}".encode()) == [bar, "step 1"]
    assert reader.bar() == bar
    assert reader.lines(b"  \n") == [f"{bar}  "]
    assert reader.lines(f"{bar}step 2\n".encode()) == [f"{bar}step 2"]  # what is not drawn over is no bar


def test_no_colour_outlasts_its_line(tmp_path: Path) -> None:
    reader, red, off = LineReader(tmp_path / "output.log"), "\x1b[1;31m", "\x1b[0m"
    shown = reader.lines(f"{red}on\nnext\n{red}on{off}\n{red}on\x1b[m\n{off}{red}\n".encode())
    assert shown == [f"{red}on{off}", "next", f"{red}on{off}", f"{red}on\x1b[m", f"{off}{red}{off}"]


def test_bars_stand_below_all_else_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "20")
    master, slave = pty.openpty()
    with open(slave, "w") as terminal:
        console = Console(terminal, terminal)
        console.rank_bars({0: ("vm", "", "10%"), 1: ("vm", "", "x" * 100)}, final=True)
        console.rank_lines("vm", 0, ["one", "two"])
        console.rank_bars({1: ("vm", "", "30%")}, final=True)
        console.rank_bars({1: ("vm", "", "30%")}, final=True)
        console.rank_bars({}, final=True)
        console.say("end")
        told = ""
        while not told.endswith("end\n"):  # it comes in pieces
            told += os.read(master, 10_000).decode().replace("\r\n", "\n")
    os.close(master)
    up_1, up_2 = "\x1b[1A\x1b[J", "\x1b[2A\x1b[J"
    assert told == f"[vm:0] 10%\n[vm:1] {'x' * 13}\n{up_2}[vm:0] one\n[vm:0] two\n[vm:1] 30%\n{up_1}end\n"


def test_no_bars_but_on_a_terminal(tmp_path: Path) -> None:
    with open(tmp_path / "out", "w") as out:
        console = Console(out, out, ranks=[1])
        console.rank_bars({1: ("vm", "", "30%")}, final=True)
        assert (console.shows(0), console.shows(1), Console(out, out).shows(0)) == (False, True, True)
    assert (tmp_path / "out").read_text() == ""
