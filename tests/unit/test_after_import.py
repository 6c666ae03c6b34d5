"""What is done after an import neither changes the module nor gets in the way of others who do the same."""

from __future__ import annotations

import importlib.machinery
import importlib.resources
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from dtrain._after_import import AfterImport


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package's name; its import, and finders that the test installs, are undone."""
    (tmp_path / "listened_to").mkdir()
    (tmp_path / "listened_to" / "__init__.py").write_text("seen_loader = __spec__.loader\ndef value():\n    return 3\n")
    (tmp_path / "listened_to" / "data.txt").write_text("data")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    yield "listened_to"
    sys.modules.pop("listened_to", None)


def test_all_who_listen_are_called_once_with_the_executed_module(package: str) -> None:
    heard: list[tuple[str, int]] = []

    def listener(name: str) -> AfterImport:
        return AfterImport({package: lambda module: heard.append((name, module.value()))})

    for name in ("first", "second", "third"):
        listener(name).install()
    importlib.import_module(package)
    assert sorted(heard) == [("first", 3), ("second", 3), ("third", 3)]
    listener("late").install()
    assert heard[3:] == [("late", 3)]
    importlib.import_module(package)
    assert len(heard) == 4


def test_the_module_has_its_own_loader(package: str) -> None:
    AfterImport({package: lambda module: None}).install()
    found = importlib.util.find_spec(package)
    assert found is not None
    assert "return 3" in found.loader.get_source(package)  # type: ignore[union-attr]
    assert found.loader.is_package(package)  # type: ignore[union-attr]
    module = importlib.import_module(package)
    loaders = (module.__loader__, module.__spec__.loader, module.seen_loader)  # type: ignore[union-attr]
    assert all(type(loader) is importlib.machinery.SourceFileLoader for loader in loaders)
    assert inspect.getsource(module.value) == "def value():\n    return 3\n"
    assert (importlib.resources.files(package) / "data.txt").read_text() == "data"


def test_a_finder_of_the_old_kind_is_passed_over(package: str) -> None:
    heard: list[ModuleType] = []
    sys.meta_path.insert(0, object())  # type: ignore[arg-type]
    AfterImport({package: heard.append, "not_there_at_all": heard.append}).install()
    finder = sys.meta_path[0]
    assert finder.find_spec("not_there_at_all", None) is None
    spec = finder.find_spec(package, None)
    assert spec is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))  # type: ignore[union-attr]
    assert len(heard) == 1
