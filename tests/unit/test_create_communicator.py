"""The choice of a communicator, and what of it needs no second rank."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from dtrain.comm import create_communicator
from dtrain.comm._agreement import name_ranks, sign_mean
from dtrain.comm._fusion import plan_messages
from dtrain.comm.local import LocalCommunicator
from dtrain.env import RankEnv
from dtrain.errors import UsageError


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60, check=False)


@pytest.mark.parametrize("kind", ["auto", "local"])
def test_one_rank_gets_the_null_object(kind: str) -> None:
    assert isinstance(create_communicator(RankEnv(), kind), LocalCommunicator)


def test_an_unknown_kind_is_refused_with_the_nearest_right_one() -> None:
    with pytest.raises(UsageError, match=r"'mpy' is not known \(did you mean mpi\?\); choose one of auto, local, mpi, horovod"):
        create_communicator(RankEnv(), "mpy")


def test_local_is_refused_for_several_ranks() -> None:
    with pytest.raises(UsageError, match="'local' serves one rank, but the launcher started 4; use 'mpi'"):
        create_communicator(RankEnv(size=4), "local")


def test_mpi_without_mpi4py_says_how_to_get_it() -> None:
    result = run_python(
        "import sys; sys.modules['mpi4py'] = None\n"
        "from dtrain.env import RankEnv\n"
        "from dtrain.comm import create_communicator\n"
        "create_communicator(RankEnv(size=2, vocabulary='openmpi'))\n"
    )
    assert "MissingDependency" in result.stderr
    assert "pip install 'dtrain[mpi]'" in result.stderr


def test_nothing_of_mpi_is_imported_before_it_is_used() -> None:
    result = run_python("import sys, dtrain.comm, dtrain.comm.mpi, dtrain.checkpoint; print('mpi4py' in sys.modules)")
    assert result.stdout.strip() == "False", result.stderr


def test_abort_of_one_rank_ends_the_process_with_the_code() -> None:
    code = "from dtrain.comm.local import LocalCommunicator as C\nprint('last words')\ntry: C().abort(9)\nfinally: print('no')"
    result = run_python(code)
    assert (result.returncode, result.stdout) == (9, "last words\n")


def test_counts_beyond_32_bits_are_planned() -> None:
    arrays = (((70000, 70000), "<f4"), ((3,), "<f4"), ((2**33,), "<f2"))
    messages = plan_messages(arrays, 2**22, {"f": "f", "e": "f"})
    assert {message.members[0][2] for message in messages} == {70000 * 70000, 3, 2**33}


@pytest.mark.parametrize("limit_bytes", [64, 4096])
def test_a_plan_covers_every_element_once_within_the_limit(limit_bytes: int) -> None:
    shapes = [(index % 7, 3) for index in range(40)]
    messages = plan_messages(
        tuple((shape, "<f8" if index % 3 else "<f4") for index, shape in enumerate(shapes)), limit_bytes, {"d": "d", "f": "f"}
    )
    covered = sorted(index for message in messages for index, _, _ in message.members)
    assert covered == [index for index, shape in enumerate(shapes) if shape[0]]
    for message in messages:
        end = 0
        for index, offset, length in message.members:
            assert (offset, length) == (end, np.prod(shapes[index]))
            end = offset + length
        assert len(message.members) == 1 or end * np.dtype(message.dtype).itemsize <= limit_bytes


@pytest.mark.parametrize(("ranks", "told"), [([3], "rank 3"), ([0, 1], "ranks 0-1"), ([0, 2, 3, 4, 7], "ranks 0, 2-4, 7")])
def test_ranks_are_named_shortly(ranks: list[int], told: str) -> None:
    assert name_ranks(ranks) == told


def test_the_digest_is_the_same_in_every_process() -> None:
    here = sign_mean([np.zeros((2, 3), np.float32)]).digest()
    code = (
        "import numpy as np; from dtrain.comm._agreement import sign_mean as s; print(s([np.zeros((2, 3), np.float32)]).digest())"
    )
    assert int(run_python(code).stdout) == here
    assert 0 <= here < 2**62
