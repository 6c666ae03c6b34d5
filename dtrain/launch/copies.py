"""The run folder's copies on hosts that do not see it: made before an attempt, and brought back after it, however that ended.

``python -m dtrain.launch.copies VERB RUN ATTEMPT ...`` is what each host is asked, by ssh: to ``take`` a copy from its standard
input, to ``give`` what has changed in it on its standard output, to ``drop`` it. :class:`Copies` is this host's side. What is
watched while the ranks run comes another way (launch/mirror.py).
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import io
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import psutil

from dtrain.errors import NotRunnable
from dtrain.files import read_json, write_json
from dtrain.launch import archive, ssh
from dtrain.launch.archive import Stat
from dtrain.launch.console import Console
from dtrain.launch.merging import merge
from dtrain.launch.mirror import rank_files
from dtrain.launch.plan import LaunchPlan, PlannedHost
from dtrain.launch.run_processes import processes_of
from dtrain.launch.supervise import Signals
from dtrain.layout import RunLayout, StepFolder

_LOOK_S = 0.1
# How long to insist on SIGKILL: a process in uninterruptible sleep does not die of it.
_KILL_S = 10.0
_MOST_NAMED = 10


class Copies:
    """The copies of a run folder for one attempt. Used by the submit side's one process; its methods block.

    A signal that asks for the end ends what is on its way.
    """

    def __init__(self, attempt: RunLayout, plan: LaunchPlan, console: Console, signals: Signals) -> None:
        self._run, self._size, self._console, self._signals = attempt, plan.size, console, signals
        self._hosts = sorted((host for host in plan.other_hosts if host.copied), key=lambda host: host.ranks)
        """Those that have a copy, or are to have one; that of rank 0 first."""
        self._sent: dict[str, Stat] = {}
        self._clients: set[subprocess.Popen[bytes]] = set()

    def send(self) -> None:
        """Give each host that does not see the run folder a copy.

        Returns early when a signal asks for the end. Raises NotRunnable when a host cannot have one: then none has.
        """
        members = list(archive.names(self._run))
        stats = {name: archive.stat(self._run.root / name) for name in members}
        self._sent = {name: stat for name, stat in stats.items() if stat is not None}
        files = [str((self._run.root / name).relative_to("/")) for name in members] + _to_resume(self._run)
        trouble = self._on_each(self._hosts, lambda host: self._ask(host, "take", [str(self._size)], members=files))
        if not trouble:
            return
        self._drop([host for host in self._hosts if host.name not in trouble])
        self._hosts = []
        if not self._signals.to_end:
            said = [f"host {name}: the run folder cannot be copied there: {why}" for name, why in trouble.items()]
            raise NotRunnable("\ndtrain: ".join([*said, "make it possible, or choose another folder with --workspace"]))

    def bring_back(self) -> list[str]:
        """Move what each host wrote into the run folder, and remove its copy; the names of hosts where that cannot be, said."""
        run = self._run
        trouble = self._on_each(self._hosts, lambda host: self._ask(host, "give", list(map(str, host.ranks)), back=True))
        for host in self._hosts:
            try:
                if host.name not in trouble:
                    self._say_beside(host, merge(run, host, self._sent))
            except OSError as error:
                trouble[host.name] = str(error)
        self._drop([host for host in self._hosts if host.name not in trouble])
        for name, why in trouble.items():
            shutil.rmtree(run.arriving(name), ignore_errors=True)
            self._console.say(f"dtrain: what host {name} wrote is not brought back: {why}", bad=True)
            self._console.say(f"dtrain: it is kept there, in {run.root}", bad=True)
        return list(trouble)

    def _drop(self, hosts: Sequence[PlannedHost]) -> None:
        """Remove copies that are no longer needed; one that stays is only said."""
        for name, why in self._on_each(hosts, lambda host: self._ask(host, "drop", [])).items():
            self._console.say(f"dtrain: the copy on host {name} stays there, in {self._run.root}: {why}", bad=True)

    def _on_each(self, hosts: Sequence[PlannedHost], act: Callable[[PlannedHost], str]) -> dict[str, str]:
        """Do something on all hosts at once: why it failed, by host, where it did. A signal ends it."""
        if not hosts:
            return {}
        heard = len(self._signals.to_end)
        with concurrent.futures.ThreadPoolExecutor(max_workers=min(64, len(hosts))) as pool:
            doing = {host.name: pool.submit(act, host) for host in hosts}
            while concurrent.futures.wait(doing.values(), timeout=_LOOK_S).not_done:
                if len(self._signals.to_end) > heard:
                    for client in list(self._clients):
                        client.kill()
        return {name: why for name, done in doing.items() if (why := done.result())}

    def _ask(self, host: PlannedHost, verb: str, words: Sequence[str], *, members: Iterable[str] = (), back: bool = False) -> str:
        """Ask a host, give it ``members`` of this one, take what comes ``back``; why that failed, or nothing."""
        argv = [sys.executable, "-m", "dtrain.launch.copies", verb, str(self._run.root), str(self._run.attempt or 0), *words]
        pipe, null = subprocess.PIPE, subprocess.DEVNULL
        try:
            client = subprocess.Popen(
                ssh.command(host.name, Path("/"), ssh.starting_variables(), argv),
                stdin=pipe if members else null,
                stdout=pipe if back else null,
                stderr=pipe,
                bufsize=0,
                start_new_session=True,  # a Ctrl-C is for dtrain, which may want to go on
            )
        except OSError as error:
            return f"the ssh client cannot be started: {error}"
        self._clients.add(client)
        trouble = ""
        try:
            if client.stdin is not None:
                with io.BufferedWriter(client.stdin, 1 << 20) as stream:
                    archive.pack(stream, Path("/"), members)
            if client.stdout is not None:
                self._run.arriving(host.name).mkdir()
                archive.unpack(client.stdout, self._run.arriving(host.name), [])
        except OSError as error:
            trouble = str(error)
            if not isinstance(error, BrokenPipeError):  # else the host has ended, and says why
                client.kill()
        assert client.stderr is not None
        said = ssh.last_words(client.stderr.read().decode(errors="replace"))
        code = client.wait()
        self._clients.discard(client)
        if code == 0:
            return trouble
        return said or trouble or f"interrupted (code {code})"

    def _say_beside(self, host: PlannedHost, beside: dict[str, str]) -> None:
        for name, other in list(beside.items())[:_MOST_NAMED]:
            self._console.say(
                f"dtrain: host {host.name} and another wrote {name}, not the same: the other one is beside it, as {other}"
            )
        if len(beside) > _MOST_NAMED:
            self._console.say(f"dtrain: and {len(beside) - _MOST_NAMED} more, with `.from-` in their names")


def _to_resume(run: RunLayout) -> list[str]:
    """The files, relative to /, of the checkpoints that the run may start from, where another run has them."""
    resumed = read_json(run.spec)["resume_from"]
    if resumed is None:
        return []
    earlier = RunLayout(Path(resumed))
    steps = [step.root.relative_to(earlier.root) for step in StepFolder.committed(earlier.checkpoints).values()]
    found = ["spec.json", *(name for step in steps for name in archive.names(earlier, str(step)))]
    return [str((earlier.root / name).relative_to("/")) for name in found]


def _take(run: RunLayout, size: int) -> None:
    """Make the copy, from standard input; of one that cannot be made nothing is left."""
    try:
        run.root.parent.mkdir(parents=True, exist_ok=True)
        run.root.mkdir()
    except FileExistsError:
        sys.exit(
            f"there is a {run.root} already: this host shares it with another one (use a workspace that all share), or that of "
            "an earlier attempt could not be brought back"
        )
    made: list[Path] = []
    try:
        archive.unpack(sys.stdin.buffer, Path("/"), made)
        run.begin_attempt(run.attempt or 0, size)
        files = {name: archive.stat(run.root / name) for name in archive.names(run)}
        besides = [path for path in made if not path.is_relative_to(run.root)]
        write_json(run.copy_record, {"files": files, "besides": besides}, durable=False)
    except OSError as error:
        _remove(run, made)
        sys.exit(str(error))


def _give(run: RunLayout, ranks: Sequence[int]) -> None:
    """Write what has changed to standard output, once nothing of the run changes any more."""
    deadline = time.monotonic() + _KILL_S
    while (left := processes_of(run.root)) and time.monotonic() < deadline:  # of a host that was cut off, say
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=1)
    sent = {name: tuple(stat) for name, stat in read_json(run.copy_record)["files"].items()}
    changed = [name for name in archive.names(run) if archive.stat(run.root / name) != sent.get(name)]
    records = [str(path.relative_to(run.root)) for rank in ranks for path in rank_files(run.rank(rank))]
    archive.pack(sys.stdout.buffer, run.root, [*records, *changed])


def _remove(run: RunLayout, besides: Sequence[Path]) -> None:
    """Remove the copy, and what came with it, or was made for it; folders that hold something else stay."""
    shutil.rmtree(run.root, ignore_errors=True)
    for path in reversed(besides):
        with contextlib.suppress(OSError):
            path.unlink() if path.is_symlink() or not path.is_dir() else path.rmdir()
    for folder in (run.workspace.runs, run.workspace.root):
        with contextlib.suppress(OSError):
            folder.rmdir()


def main() -> None:
    verb, root, attempt, *words = sys.argv[1:]
    run, numbers = RunLayout(Path(root), int(attempt)), [int(word) for word in words]
    if verb == "take":
        _take(run, numbers[0])
    elif verb == "give":
        _give(run, numbers)
    else:
        _remove(run, [Path(path) for path in read_json(run.copy_record)["besides"]])


if __name__ == "__main__":
    main()
