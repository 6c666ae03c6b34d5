"""Starts, from a plain pytest, what needs an MPI world: the communicator's contract, tests/ranks, and what only a launch shows.

Open MPI is the one of this Python. ``DTRAIN_TEST_MPICH_PYTHON`` names a Python with mpi4py, MPICH's wheel and pytest; where it is
not set, those tests are skipped.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet

from dtrain.errors import RankError

ROOT = Path(__file__).resolve().parents[2]
CONTRACT = ROOT / "tests" / "contract" / "test_communicator.py"
OPEN_MPI_FLAGS = ["--oversubscribe", "--bind-to", "none", "--map-by", "slot", "--mca", "mpi_yield_when_idle", "1"]


@dataclass(frozen=True, kw_only=True)
class Mpi:
    """An MPI to test with: how to start ranks, and the Python whose mpi4py belongs to it."""

    mpirun: list[str]
    python: str

    def run(self, ranks: int, arguments: list[str], timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMPI_", "PMIX_", "PMI_", "PRTE_"))}
        environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1"}
        command = [*self.mpirun, "-np", str(ranks), self.python, *arguments]
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)  # mpirun ends its ranks
            output, _ = process.communicate(timeout=20)
            pytest.fail(f"{command} did not end within {timeout_s} s:\n{output[-6000:]}")
        return subprocess.CompletedProcess(command, process.returncode, output)


def open_mpi() -> Mpi:
    beside = Path(sys.executable).with_name("mpirun")
    mpirun = str(beside) if beside.exists() else shutil.which("mpirun")
    pytest.importorskip("mpi4py", reason="mpi: mpi4py is not installed")
    if mpirun is None:
        pytest.skip("mpi: no mpirun beside this Python or on PATH")
    root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    return Mpi(mpirun=[mpirun, *root, *OPEN_MPI_FLAGS], python=sys.executable)


def mpich() -> Mpi:
    python = os.environ.get("DTRAIN_TEST_MPICH_PYTHON")
    if python is None:
        pytest.skip("mpich: DTRAIN_TEST_MPICH_PYTHON is not set")
    return Mpi(mpirun=[str(Path(python).with_name("mpiexec"))], python=python)


@pytest.fixture
def mpi(request: pytest.FixtureRequest) -> Mpi:
    return {"openmpi": open_mpi, "mpich": mpich}[request.param]()


MPIS = [pytest.param("openmpi", marks=pytest.mark.needs("mpi")), pytest.param("mpich", marks=pytest.mark.needs("mpich"))]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("mpi", MPIS, indirect=True)
def test_the_contract_holds(mpi: Mpi, ranks: int) -> None:
    check_tests(mpi, ranks, CONTRACT)


def rank_tests() -> list[ParameterSet]:
    """The files of tests/ranks with the numbers of ranks to run them at, each marked with what the file itself needs."""
    found = []
    for file in sorted((ROOT / "tests" / "ranks").glob("test_*.py")):
        marks = re.findall(r"^pytestmark = .*\bneeds\(([^)]*)\)", file.read_text(), re.MULTILINE)
        needs = {"mpi", *re.findall(r"\w+", " ".join(marks))}
        # TensorFlow takes 4 s of a core in every rank until it is imported: two ranks show it.
        for ranks in [2] if "tensorflow" in needs else [2, 4]:
            found.append(pytest.param(file, ranks, marks=pytest.mark.needs(*sorted(needs)), id=f"{file.stem}-{ranks}"))
    return found


@pytest.mark.timeout(300)
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.needs("horovod", "tensorflow", "mpi")
def test_the_contract_holds_over_horovod(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DTRAIN_TEST_COMMUNICATOR", "horovod")
    check_tests(open_mpi(), ranks, CONTRACT)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("file", "ranks"), rank_tests())
def test_rank_tests_pass(file: Path, ranks: int) -> None:
    check_tests(open_mpi(), ranks, file)


@pytest.mark.timeout(300)
@pytest.mark.needs("mpich")
def test_rank_tests_of_mpi_itself_pass_on_mpich() -> None:
    # Two ranks only: MPICH's ranks spin while they wait, and four on two cores take a minute.
    check_tests(mpich(), 2, ROOT / "tests" / "ranks" / "test_mpi_communicator.py")


def check_tests(mpi: Mpi, ranks: int, file: Path) -> None:
    """Run a test file with pytest in every rank, and see all of them pass it."""
    # No -x: a rank that stopped alone would leave the others waiting. The timeout is for that case: its thread ends the process
    # (a signal would not be seen by a rank that waits inside MPI), and mpirun then ends the others.
    options = ["-q", "--with-mpi", "--timeout=60", "-o", "timeout_method=thread", "--color=no", "-p", "no:cacheprovider"]
    result = mpi.run(ranks, ["-m", "pytest", *options, str(file)])
    assert result.returncode == 0, result.stdout[-8000:]
    # mpirun's 0 is every rank's 0; the ranks' lines may run into each other, so they are not counted.
    assert re.search(r"\d+ passed", result.stdout), result.stdout[-8000:]


ABORT = """
import sys, time
from dtrain.comm.mpi import MpiCommunicator
comm = MpiCommunicator()
if comm.rank == 1:
    print("last words")
    comm.abort(7)
time.sleep(60)
"""


@pytest.mark.parametrize("mpi", MPIS, indirect=True)
def test_abort_ends_all_ranks_with_the_code(mpi: Mpi) -> None:
    result = mpi.run(2, ["-c", ABORT], timeout_s=30)
    assert result.returncode == 7, result.stdout
    assert "last words" in result.stdout


WORLD = """
import sys
from dtrain.comm.mpi import MpiCommunicator
from dtrain.errors import RankError
try:
    MpiCommunicator(expected_size=2)
except RankError as error:
    sys.stdout.write(f"RankError: {error}\\n")
"""


@pytest.mark.needs("mpi", "mpich")
def test_an_mpirun_of_another_mpi_is_found_out() -> None:
    """Open MPI's mpi4py under MPICH's mpiexec: two worlds of one, which would train the same thing twice."""
    mixed = Mpi(mpirun=mpich().mpirun, python=sys.executable)
    result = mixed.run(2, ["-c", WORLD], timeout_s=60)
    told = [line for line in result.stdout.splitlines() if line.startswith(f"{RankError.__name__}: ")]
    assert len(told) == 2, result.stdout
    assert "the launcher started 2 ranks" in told[0]
    assert "Open MPI v" in told[0]
    assert "a world of 1" in told[0]
    assert str(Path(mixed.python).with_name("mpirun")) in told[0]


@pytest.mark.needs("mpi", "mpich")
def test_mpich_under_the_mpirun_of_open_mpi_does_not_run() -> None:
    """MPICH 5 finds out by itself, and earlier than we could: its initialisation ends the process."""
    result = Mpi(mpirun=open_mpi().mpirun, python=mpich().python).run(2, ["-c", WORLD + "print('ran on')"], timeout_s=60)
    assert "RankError: " in result.stdout or (result.returncode != 0 and "ran on" not in result.stdout), result.stdout


KILL = """
import os, signal, sys
import numpy as np
from pathlib import Path
from dtrain import _shards
from dtrain.checkpoint import Checkpointer
from dtrain.comm.mpi import MpiCommunicator
comm = MpiCommunicator()
checkpointer = Checkpointer(Path(sys.argv[1]), comm)
checkpointer.save(1, {"w": np.full(1000, 1.0)})
if comm.rank == int(sys.argv[2]):
    setattr(_shards, sys.argv[3], lambda *arguments: os.kill(os.getpid(), signal.SIGKILL))
checkpointer.save(2, {"w": np.full(1000, 2.0)})
"""
RESTORE = """
import sys
from pathlib import Path
from dtrain.checkpoint import Checkpointer
from dtrain.comm.mpi import MpiCommunicator
comm = MpiCommunicator()
checkpointer = Checkpointer(Path(sys.argv[1]), comm)
restored = checkpointer.restore()
assert restored.step == 1 and (restored.shared["w"] == 1).all(), restored
checkpointer.save(2, restored.shared)
assert checkpointer.restore().step == 2
"""


@pytest.mark.needs("mpi")
@pytest.mark.parametrize(("rank", "at"), [(0, "write_shard"), (1, "write_shard"), (0, "write_manifest")])
def test_a_rank_killed_while_saving_leaves_the_older_step(tmp_path: Path, rank: int, at: str) -> None:
    killed = open_mpi().run(2, ["-c", KILL, str(tmp_path), str(rank), at], timeout_s=60)
    assert killed.returncode != 0, killed.stdout
    assert (tmp_path / "step-000000002").is_dir(), killed.stdout
    assert not (tmp_path / "step-000000002" / "manifest.json").exists()
    restored = open_mpi().run(2, ["-c", RESTORE, str(tmp_path)], timeout_s=60)
    assert restored.returncode == 0, restored.stdout
