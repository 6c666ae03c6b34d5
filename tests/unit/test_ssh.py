"""The connection to a process on another host. By ssh itself: tests/cluster."""

from __future__ import annotations

import json
import time
from pathlib import Path

from dtrain.launch import ssh

_ENVIRONMENT = {"LONG": "x" * 1_000_000}


def test_a_long_environment_comes_whole_and_nobody_waits_for_it(tmp_path: Path) -> None:
    """More than a pipe holds, to a host that takes its time; what is said after it comes after it."""
    script = "until [ -e go ]; do sleep 0.05; done; exec cat >got"
    connection = ssh.connect(["sh", "-c", script], tmp_path, {}, lambda: None)
    began = time.monotonic()
    connection.introduce(_ENVIRONMENT)
    connection.tell("leave")
    connection.attend()
    assert time.monotonic() - began < 5  # and not until somebody reads
    (tmp_path / "go").touch()
    got = tmp_path / "got"
    while not got.exists() or not got.read_bytes().endswith(b"leave\n"):
        assert time.monotonic() - began < 60
        connection.attend()
    connection.close()
    assert connection.process.wait() == 0
    connection.release()
    told, word = got.read_bytes().splitlines()
    assert (json.loads(told), word) == (_ENVIRONMENT, b"leave")


def test_words_to_one_that_is_gone_are_dropped(tmp_path: Path) -> None:
    connection = ssh.connect(["true"], tmp_path, {}, lambda: None)
    connection.process.wait()
    connection.introduce(_ENVIRONMENT)
    connection.tell("end")
    connection.close()
    connection.tell("end")
    connection.release()
