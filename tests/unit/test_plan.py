"""Plans are values: what each launcher would start."""

from __future__ import annotations

import json
import os
import shlex
import socket
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dtrain import resources
from dtrain.errors import MissingDependency, UsageError
from dtrain.hosts import Host, parse_hosts
from dtrain.job_options import ClusterOptions, Hangs, HorovodOptions, available_cores
from dtrain.launch import gloo, horovod, local, mpi, parameter_server
from dtrain.launch.mpi_families import FAMILIES, MpiInstallation
from dtrain.launch.places import Place, find_places
from dtrain.launch.plan import rank_argv
from dtrain.launch.remote_shell import ssh_argv
from dtrain.layout import RunLayout
from dtrain.spec import JobSpec


@pytest.fixture
def script(tmp_path: Path) -> str:
    (tmp_path / "train.py").write_text("")
    return str(tmp_path / "train.py")


def installation(title: str) -> MpiInstallation:
    family = next(family for family in FAMILIES if family.title == title)
    return MpiInstallation(mpirun="/opt/mpirun", family=family, version="5")


def test_openmpi(script: str, tmp_path: Path) -> None:
    spec = JobSpec(target=script, workers=available_cores() + 1, max_ranks=10_000, args=("--n", "a b"))
    plan = mpi.plan(spec, RunLayout(tmp_path / "run"), tmp_path, installation("Open MPI"))
    (process,) = plan.processes
    assert process.argv[0] == "/opt/mpirun"
    assert process.argv[-4:] == ("dtrain._rank_main", "train.py", "--n", "a b")
    assert ("--allow-run-as-root" in process.argv) == (os.geteuid() == 0)
    assert "mpi_yield_when_idle" in process.argv
    assert process.argv[process.argv.index("--bind-to") + 1] == "none"
    assert process.environment["OMP_NUM_THREADS"] == "1"


def test_ranks_that_have_a_core_each_do_not_yield(script: str, tmp_path: Path) -> None:
    spec = JobSpec(target=script, workers=1, launcher="mpi")
    plan = mpi.plan(spec, RunLayout(tmp_path / "run"), tmp_path, installation("Open MPI"))
    assert "mpi_yield_when_idle" not in plan.processes[0].argv


def test_mpich(script: str, tmp_path: Path) -> None:
    plan = mpi.plan(JobSpec(target=script, workers=2), RunLayout(tmp_path / "run"), tmp_path, installation("MPICH"))
    assert plan.processes[0].argv[:5] == ("/opt/mpirun", "-bind-to", "none", "-n", "2")
    assert plan.processes[0].environment["DTRAIN_VOCABULARY"] == "pmi"


def on_two_hosts(cores: int) -> list[Place]:
    here = Place(host="a", name="a", port=0, cores=4)
    there = Place(host="b", name="b", port=0, cores=cores, over_ssh=True)
    return [here, here, there]


def test_openmpi_on_two_hosts(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("TOKEN", "hidden-word")
    monkeypatch.setenv("SSH_AUTH_SOCK", "/of/this/login")
    hosts = parse_hosts("a:2,b:2")
    hangs = Hangs(heartbeat_timeout_s=60)
    spec = JobSpec(target=script, workers=3, hosts=hosts, network="10.0.0.0/24", hangs=hangs, environment={"MODE": "fast"})
    plan = mpi.plan(spec, RunLayout(tmp_path / "run"), tmp_path, installation("Open MPI"), on_two_hosts(cores=2))
    (process,) = plan.processes
    argv = process.argv

    def after(flag: str) -> str:
        return argv[argv.index(flag) + 1]

    assert (after("--host"), after("-n"), after("btl_tcp_if_include")) == ("a:2,b:1", "3", "10.0.0.0/24")
    assert after("plm_ssh_agent").startswith("ssh -o BatchMode=yes")
    assert [after(f"oob_tcp_keepalive_{name}") for name in ("time", "intvl", "probes")] == ["60", "10", "6"]
    passed = {argv[n + 1] for n, flag in enumerate(argv) if flag == "-x"}
    assert {"TOKEN", "MODE", "DTRAIN_RUN_DIR", "OMP_NUM_THREADS", "PATH"} <= passed
    assert not passed & {"SSH_AUTH_SOCK", "HOME", "PRTE_MCA_prte_tmpdir_base"}
    assert "hidden-word" not in json.dumps(plan.to_json())
    assert process.environment["OMP_NUM_THREADS"] == "2"
    assert [(host.name, host.ranks) for host in plan.other_hosts] == [("b", (2,))]


def test_ranks_of_unequal_hosts_take_their_threads_out_of_a_list(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in resources.THREAD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    spec = JobSpec(target=script, workers=3, hosts=parse_hosts("a:2,b:1"), environment={"MKL_NUM_THREADS": "9"})
    plan = mpi.plan(spec, RunLayout(tmp_path / "run"), tmp_path, installation("Open MPI"), on_two_hosts(cores=8))
    environment = dict(plan.processes[0].environment)
    assert "OMP_NUM_THREADS" not in environment
    assert "DTRAIN_THREADS" in plan.processes[0].argv
    for rank, threads in enumerate(("2", "2", "8")):
        own = dict(environment)
        resources.own_threads(rank, own)
        assert (own["OMP_NUM_THREADS"], own["MKL_NUM_THREADS"]) == (threads, "9")


def test_mpich_on_two_hosts(script: str, tmp_path: Path) -> None:
    spec = JobSpec(target=script, workers=3, hosts=parse_hosts("a:2,b:1"), network="127.0.0.0/8")
    plan = mpi.plan(spec, RunLayout(tmp_path / "run"), tmp_path, installation("MPICH"), on_two_hosts(cores=2))
    (process,) = plan.processes
    assert process.argv[1:7] == ("-bind-to", "none", "-launcher", "ssh", "-hosts", "a:2,b:1")
    assert process.argv[process.argv.index("-iface") + 1] == "lo"
    assert "DTRAIN_RUN_DIR" in process.argv[process.argv.index("-genvlist") + 1].split(",")
    assert process.environment["HYDRA_LAUNCHER_EXTRA_ARGS"].startswith("-o BatchMode=yes")
    assert list(process.environment)[-1] == "DTRAIN_LAST"


def on_hosts_named_by_ipv6(**reached: tuple[str, ...]) -> list[Place]:
    here = Place(host="fd00::1", name="fd00::1", port=0, cores=4)
    others = [
        Place(host=name, name=name, port=0, cores=4, over_ssh=True, reached=reached.get(key, ()))
        for key, name in {"b": "fd00::2", "c": "node3"}.items()
    ]
    return [here, here, *others]


def test_mpirun_knows_hosts_that_are_named_by_ipv6_by_their_labels(script: str, tmp_path: Path) -> None:
    spec = JobSpec(target=script, workers=4, hosts=parse_hosts("[fd00::1]:2,[fd00::2],node3"), network="::1/128")
    plan = mpi.plan(spec, RunLayout(tmp_path / "run"), tmp_path, installation("Open MPI"), on_hosts_named_by_ipv6())
    argv = plan.processes[0].argv
    assert argv[argv.index("--host") + 1] == f"{socket.gethostname()}:2,fd00--2..ipv6:1,node3:1"
    assert argv[argv.index("plm_ssh_agent") + 1].startswith(f"{sys.executable} -m dtrain.launch.remote_shell -o BatchMode=yes")
    assert [argv[argv.index(f"{layer}_if_include") + 1] for layer in ("btl_tcp", "prte")] == ["lo", "lo"]
    assert [host.name for host in plan.other_hosts] == ["fd00::2", "node3"]


def test_a_host_has_one_name_for_mpirun(script: str) -> None:
    """It starts all ranks of a host before those of the next: by two names another one's would be given other numbers."""
    spec = JobSpec(target=script, workers=3, hosts=parse_hosts("localhost,127.0.0.1:2"), preflight=False)
    with pytest.raises(UsageError, match=r"^localhost and 127\.0\.0\.1 are the same host, this one; .* slots, as localhost:3$"):
        find_places(spec, None)
    over_gloo = replace(spec, launcher="horovod", horovod=HorovodOptions(controller="gloo"))  # whose slots are by name
    assert [place.host for place in find_places(over_gloo, None)] == ["localhost", "127.0.0.1", "127.0.0.1"]


@pytest.mark.parametrize(
    ("reached", "here"),
    [
        ({"b": ("10.0.0.1", "10.1.0.1"), "c": ("10.1.0.1",)}, "10.1.0.1"),
        ({"b": ("10.0.0.1",)}, "10.0.0.1"),
        ({"b": ("10.0.0.1",), "c": ("10.1.0.1",)}, socket.gethostname()),
        ({}, socket.gethostname()),
    ],
)
def test_mpichs_daemons_connect_to_an_address_that_all_reach(
    script: str, tmp_path: Path, reached: dict[str, tuple[str, ...]], here: str
) -> None:
    spec = JobSpec(target=script, workers=4, hosts=parse_hosts("[fd00::1]:2,[fd00::2],node3"))
    places = on_hosts_named_by_ipv6(**reached)
    (process,) = mpi.plan(spec, RunLayout(tmp_path / "run"), tmp_path, installation("MPICH"), places).processes
    argv = process.argv
    assert argv[argv.index("-hosts") + 1] == f"{socket.gethostname()}:2,fd00--2..ipv6:1,node3:1"
    assert [argv[argv.index(flag) + 1] for flag in ("-launcher-exec", "-localhost")] == [sys.executable, here]
    assert process.environment["HYDRA_LAUNCHER_EXTRA_ARGS"].startswith("-m dtrain.launch.remote_shell -o BatchMode=yes")


@pytest.mark.parametrize(
    ("words", "argv"),
    [
        (["-o", "A=b", "-x", "fd00--2..ipv6", "true"], ["ssh", "-o", "A=b", "-x", "fd00::2", "true"]),
        (["0--1..ipv6", "ls", "fd00--2..ipv6"], ["ssh", "::1", "ls", "fd00--2..ipv6"]),
        (["-o", "A=b", "node3", "-o", "x"], ["ssh", "-o", "A=b", "node3", "-o", "x"]),
    ],
)
def test_ssh_is_given_the_address_of_a_label(words: list[str], argv: list[str]) -> None:
    assert ssh_argv(words) == argv


def test_what_the_user_set_holds(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "7")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    spec = JobSpec(target=script, environment={"OMP_NUM_THREADS": "5"})
    (process,) = local.plan(spec, RunLayout(tmp_path / "run"), tmp_path).processes
    assert process.environment["OMP_NUM_THREADS"] == "5"
    assert "OPENBLAS_NUM_THREADS" not in process.environment


def test_module_and_source(tmp_path: Path, script: str) -> None:
    spec = JobSpec(target="package.train", is_module=True, source=tmp_path)
    (process,) = local.plan(spec, RunLayout(tmp_path / "run"), tmp_path).processes
    assert process.argv[-3:] == ("dtrain._rank_main", "-m", "package.train")
    assert spec.experiment_name == "train"
    assert JobSpec(target=script, source=tmp_path.parent).script_in_source == f"{tmp_path.name}/train.py"


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder of packages, with a Horovod that is whole as far as a look without importing goes."""
    folder = tmp_path / "site" / "horovod" / "tensorflow"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise AssertionError('imported')")
    (folder / "mpi_lib.cpython-311.so").write_bytes(b"\x7fELF...\0libmpi.so.40\0libtensorflow_cc.so.2\0")
    return tmp_path / "site"


def test_horovod_is_mpi_with_an_end_to_stalls(script: str, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(horovod, "find_mpi", lambda python: installation("Open MPI"))
    for name in ("OMP_NUM_THREADS", *horovod.THREAD_VARIABLES):
        monkeypatch.delenv(name, raising=False)
    spec = JobSpec(target=script, workers=2, launcher="horovod")
    run = RunLayout(tmp_path / "run")
    found = horovod.find_horovod(spec, [str(site)])
    planned = horovod.plan(spec, run, tmp_path, found)
    assert (planned.launcher, planned.size) == ("horovod", 2)
    (process,) = planned.processes
    (bare,) = mpi.plan(spec, run, tmp_path, found.mpi).processes
    assert process.argv == bare.argv
    added = {name: value for name, value in process.environment.items() if name not in bare.environment}
    stalls = {"HOROVOD_STALL_CHECK_TIME_SECONDS": "60", "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "600"}
    share = bare.environment["OMP_NUM_THREADS"]
    assert added == {**stalls, "TF_NUM_INTRAOP_THREADS": share, "TF_NUM_INTEROP_THREADS": share}

    monkeypatch.setenv("HOROVOD_STALL_CHECK_TIME_SECONDS", "5")
    (process,) = horovod.plan(spec, run, tmp_path, found).processes
    assert not [name for name in process.environment if name.startswith("HOROVOD_")]


def test_over_gloo_a_driver_starts_the_ranks(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, program = RunLayout(tmp_path / "run"), tmp_path / "hosts.sh"
    program.touch(0o755)
    site = gloo.Site(hosts=(Host("localhost", 2),), places=(), interface="lo")
    spec = JobSpec(target=script, workers=2, launcher="horovod", horovod=HorovodOptions(controller="gloo"))
    planned = gloo.plan(spec, run, tmp_path, site)
    (process,) = planned.processes
    assert (planned.launcher, planned.size, planned.elastic, planned.ordered) == ("horovod", 2, False, False)
    driver = [sys.executable, "-m", "dtrain.launch.gloo_driver", "--workers", "2", "--interface", "lo"]
    assert [*process.argv] == [*driver, "--hosts", "localhost:2", "--", *rank_argv(spec)]
    assert process.environment["DTRAIN_SIZE"] == "2"

    other = tmp_path / "python"  # in which Horovod is, and perhaps not here
    other.touch(0o755)
    (process,) = gloo.plan(replace(spec, python=other), run, tmp_path, site).processes
    assert [word for word in process.argv if word.endswith("python")] == [str(other)] * 2

    spec = replace(spec, horovod=HorovodOptions(min_workers=1, max_workers=4, discovery=program))
    planned = gloo.plan(spec, run, tmp_path, site)
    (process,) = planned.processes
    assert (planned.size, planned.elastic, planned.ordered) == (0, True, True)
    elastic = ["--discovery", str(program), "--elastic", "1", "4", "--timeout", "600"]
    assert [*process.argv] == [*driver, *elastic, "--", *rank_argv(spec)]
    assert "DTRAIN_SIZE" not in process.environment


def test_a_horovod_that_cannot_serve_is_told_before_anything_starts(script: str, site: Path, tmp_path: Path) -> None:
    spec = JobSpec(target=script, launcher="horovod")
    with pytest.raises(MissingDependency, match=r"has not; run: .*pip install --no-build-isolation horovod==0.28.1"):
        horovod.find_horovod(spec, [str(tmp_path / "empty")])
    library = next(site.glob("horovod/tensorflow/*.so"))
    library.write_bytes(b"\x7fELF...libtensorflow_cc.so.2")
    with pytest.raises(MissingDependency, match="built without MPI"):
        horovod.find_horovod(spec, [str(site)])
    with pytest.raises(
        MissingDependency, match=r"built without Gloo, .* elastic jobs need; build it anew.*HOROVOD_WITH_GLOO=1 pip"
    ):
        horovod.find_built(spec, "gloo", [str(site)])
    library.write_bytes(b"\x7fELF...14GlooController")
    assert horovod.find_built(spec, "gloo", [str(site)]) == site / "horovod"
    library.unlink()
    with pytest.raises(MissingDependency, match="built without TensorFlow"):
        horovod.find_horovod(spec, [str(site)])
    (tmp_path / "horovod.py").write_text("")
    with pytest.raises(UsageError, match=r"horovod\.py would be imported in place of the package"):
        horovod.find_horovod(spec, [str(site)])


def test_a_cluster_on_two_hosts(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("PYTHONPATH", "/a b")
    places = [
        Place(host="a", name="a", port=11, cores=8),
        Place(host="a", name="a", port=12, cores=8),
        Place(host="fd00::1", name="fd00::1", port=13, cores=4, over_ssh=True),
        Place(host="fd00::1", name="fd00::1", port=14, cores=4, over_ssh=True),
    ]
    cluster = ClusterOptions(chief=True, servers=1)
    spec = JobSpec(target=script, workers=2, launcher="parameter_server", cluster=cluster, args=("it's", "$HOME"))
    planned = parameter_server.plan(spec, RunLayout(tmp_path / "run"), tmp_path / "code folder", places)
    by_rank = {process.task.rank: process for process in planned.processes if process.task is not None}
    names = ("DTRAIN_RANK", "DTRAIN_LOCAL_RANK", "DTRAIN_LOCAL_SIZE", "OMP_NUM_THREADS")
    assert [[int(by_rank[rank].environment[name]) for name in names] for rank in range(4)] == [
        [0, 0, 2, 4],
        [1, 1, 2, 4],
        [2, 0, 2, 2],
        [3, 1, 2, 2],
    ]
    for process in planned.processes:
        config = json.loads(process.environment["TF_CONFIG"])["cluster"]
        assert config == {"chief": ["a:11"], "worker": ["a:12", "[fd00::1]:13"], "ps": ["[fd00::1]:14"]}
    assert by_rank[1].shell_line().startswith(f"cd '{tmp_path}/code folder' && env ")
    assert "PYTHONPATH" not in by_rank[1].environment
    # What a shell here reads is the ssh client's line; what a shell there reads, the same command as here.
    *client, there = shlex.split(by_rank[2].shell_line())
    assert (client[0], client[-2:]) == ("ssh", ["--", "fd00::1"])
    words = shlex.split(there)
    assert words[:5] == ["cd", f"{tmp_path}/code folder", "&&", "exec", "env"]
    assert "PYTHONPATH=/a b" in words
    assert words[-2:] == ["it's", "$HOME"]
    assert planned.other_hosts == ()


def test_an_evaluator_has_to_see_the_checkpoints(script: str, tmp_path: Path) -> None:
    places = [Place(host=host, name=host, port=1, cores=1, over_ssh=host != "a", copied=host != "a") for host in "aaab"]
    cluster = ClusterOptions(chief=True, servers=1, evaluator=True)
    spec = JobSpec(target=script, workers=1, launcher="parameter_server", cluster=cluster)
    with pytest.raises(UsageError, match="the evaluator on b would not see the checkpoints of the chief on a; use a workspace"):
        parameter_server.plan(spec, RunLayout(tmp_path / "run"), tmp_path, places)
    planned = parameter_server.plan(spec, RunLayout(tmp_path / "run"), tmp_path, [places[0], places[3], places[3], places[0]])
    assert [(host.name, host.ranks, host.copied) for host in planned.other_hosts] == [("b", (1, 2), True)]
