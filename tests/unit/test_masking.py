"""Secrets are found wherever a stream is cut, and in every form in which they are usually written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dtrain.masking import MaskedStream, Masker

CASES = [
    (["secret"], "a secret, secre, secretsecret secsecret", "a ***, secre, ****** sec***"),
    (["abcd", "abcdef"], "abcd abcdef abcdeabcd", "*** *** ***e***"),
    (["aXbc", "bcdef"], "aXbc aXbcdef bcdef", "*** ***def ***"),
    (["aaaab"], "aaaaaaaab aaaa", "aaaa*** aaaa"),
    (["two\nlines"], "two\nlines, two and lines", "***, two and ***"),
    (["\u00e4\u00f6\u00fc\u00df"], "x\u00e4\u00f6\u00fc\u00dfy", "x***y"),
    ([], "secret", "secret"),
]


@pytest.mark.parametrize(("secrets", "text", "masked"), CASES)
@pytest.mark.parametrize("size", [1, 2, 3, 5, 1000])
def test_in_a_stream_however_it_is_cut(secrets: list[str], text: str, masked: str, size: int) -> None:
    data, stream = text.encode(), MaskedStream(Masker(secrets))
    told = b"".join(stream.feed(data[begin : begin + size]) for begin in range(0, len(data), size)) + stream.flush()
    assert told.decode() == masked == Masker(secrets).text(text)


def test_nothing_is_held_back_that_cannot_become_a_secret() -> None:
    stream = MaskedStream(Masker(["secret"]))
    assert stream.feed(b"epoch 1 sec") == b"epoch 1 "
    assert stream.feed(b"onds\n") == b"seconds\n"


def test_in_values_and_in_the_forms_of_repr_and_json() -> None:
    secret = 'it\'s\n"quoted" \u00e4'
    mask = Masker([secret])
    told = {"a": [secret, (1, f"--token={secret}")], secret: Path("/x") / "b", "c": None, "d": 1.5}
    assert mask.value(told) == {"a": ["***", (1, "--token=***")], "***": Path("/x/b"), "c": None, "d": 1.5}
    assert mask.text(f"KeyError: {secret!r}") == "KeyError: '***'"
    assert mask.text(json.dumps({"token": secret})) == '{"token": "***"}'
