"""The adapter to obstore, which speaks S3 and Azure Blob Storage: files of a datastore that are objects in a bucket."""

from __future__ import annotations

import concurrent.futures
import contextlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from dtrain import install
from dtrain.azureml.errors import UserErrorException
from dtrain.errors import MissingDependency
from dtrain.files import atomic_file

# An endpoint that does not answer is known after seconds, not after the minutes that obstore would take by itself.
_RETRY: Any = {"max_retries": 3, "retry_timeout": timedelta(seconds=30)}
_CONNECT = "10 seconds"
_AT_ONCE = 8

# What a URL begins with → the variable that names a server of one's own, and what messages say of it and the others.
_S3 = (
    "AWS_ENDPOINT_URL",
    "server, region and credentials are those of {}, AWS_REGION, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
)
_AZURE = (
    "AZURE_STORAGE_ENDPOINT",
    "server, account and credentials are those of {}, AZURE_STORAGE_ACCOUNT_NAME, and AZURE_STORAGE_ACCOUNT_KEY or "
    "AZURE_STORAGE_SAS_TOKEN",
)
_VARIABLES = {"s3": _S3, "az": _AZURE, "abfss": _AZURE}

T = TypeVar("T")


class ObjectStore:
    """Objects below a prefix of a bucket (Azure: container). Credentials and server are those of the environment, by AWS's names
    or Azure's.

    Raises MissingDependency without obstore, UserErrorException for a URL that is none.
    """

    folder = None

    def __init__(self, url: str) -> None:
        if importlib.util.find_spec("obstore") is None:
            raise MissingDependency(f"datastore {url} needs obstore, which {sys.executable} has not; run: {install.OBJECT_STORE}")
        import obstore.store

        self.url = url
        server, sentence = _VARIABLES[url.partition(":")[0]]
        self._sources = sentence.format(server)
        plain = os.environ.get(server, "").startswith("http://")  # a server of one's own, say: named so, it is meant so
        options: Any = {"allow_http": plain, "connect_timeout": _CONNECT}
        with self._explained("be reached"):
            self._store = obstore.store.from_url(url, client_options=options, retry_config=_RETRY)

    def names(self, below: str = "") -> list[str]:
        with self._explained("be listed"):
            found = {str(each["path"]) for batch in self._store.list(below or None) for each in batch}
            if below:
                with contextlib.suppress(FileNotFoundError):
                    self._store.head(below)
                    found.add(below)
        # Some tools make an empty object for a folder, which no file could stand beside.
        folders = {str(parent) for name in found for parent in PurePosixPath(name).parents}
        return sorted(found - folders)

    def put_all(self, pairs: Iterable[tuple[Path, str]]) -> None:
        def put(pair: tuple[Path, str]) -> None:
            source, name = pair
            with self._explained(f"take {source}"):
                self._store.put(name, source)

        _do_all(put, pairs)

    def get_all(self, pairs: Iterable[tuple[str, Path]]) -> None:
        def get(pair: tuple[str, Path]) -> None:
            name, target = pair
            target.parent.mkdir(parents=True, exist_ok=True)
            with self._explained(f"give {name}"), atomic_file(target, durable=False) as file:
                for piece in self._store.get(name).stream():
                    file.write(piece)

        _do_all(get, pairs)

    @contextlib.contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        from obstore.exceptions import BaseError

        try:
            yield
        except (BaseError, OSError, ValueError) as error:
            raise UserErrorException(f"{self.url} cannot {what}: {_words(error)}; {self._sources}") from error


def _do_all(work: Callable[[T], None], items: Iterable[T]) -> None:
    """Do the same to all of them, some at once; the first that fails is raised when those that were begun are done."""
    with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
        for _ in pool.map(work, items):
            pass


def _words(error: Exception) -> str:
    """What an error says, in a line."""
    text = str(error)
    answer = re.search(r"<Code>(.*?)</Code>\s*<Message>(.*?)[\n<]", text)
    return f"{answer[1]}: {answer[2]}" if answer is not None else text.partition("\n")[0]
