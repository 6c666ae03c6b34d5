"""The environment is the lane's: the versions of constraints/LANE.txt, all of them and no others."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

import pytest

CONSTRAINTS = Path(__file__).parents[2] / "constraints"
# What a virtual environment brings along, and what is under test.
FREE = {"pip", "dtrain"}


def pins(name: str) -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)==(\S+)", (CONSTRAINTS / f"{name}.txt").read_text(), re.MULTILINE))


def test_what_is_installed_is_what_the_lane_says(request: pytest.FixtureRequest) -> None:
    lane = request.config.getoption("--lane")
    if lane is None:
        pytest.skip("for an environment that make installed, which says --lane")
    expected = pins(lane) | pins("build")
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"].lower().replace("_", "-")
        if name not in FREE:
            assert (name, distribution.version) == (name, expected.get(name))


def test_lanes_differ_only_where_they_say_why() -> None:
    """What both pin has one version, unless the line has a comment with the reason."""
    newer, text = pins("keras3"), (CONSTRAINTS / "keras2.txt").read_text()
    for name, version in pins("keras2").items():
        reason = re.search(rf"^{re.escape(name)}==\S+ +# \S", text, re.MULTILINE)
        assert version == newer.get(name, version) or reason, f"{name}=={version} in keras2.txt, {newer[name]} in keras3.txt"
