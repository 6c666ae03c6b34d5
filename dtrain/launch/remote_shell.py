"""The ssh client for mpirun where hosts are named by IPv6 addresses: it knows them by their labels (hosts.py:Host.label).

``python -m dtrain.launch.remote_shell OPTION... LABEL COMMAND`` becomes ``ssh OPTION... ADDRESS COMMAND``. So ssh is given an
address as dtrain itself gives it one, and finds what the user's configuration says of it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from dtrain.hosts import Host


def ssh_argv(words: Sequence[str]) -> list[str]:
    """The ssh client's arguments for a remote shell's: ``-o NAME=VALUE``, options without a value, a host's label, a command."""
    host = next(n for n, word in enumerate(words) if not word.startswith("-") and words[n - 1 : n] != ["-o"])
    return ["ssh", *words[:host], Host.labelled(words[host]).name, *words[host + 1 :]]


def main() -> None:
    argv = ssh_argv(sys.argv[1:])
    os.execvp(argv[0], argv)


if __name__ == "__main__":
    main()
