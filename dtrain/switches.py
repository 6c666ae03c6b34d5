"""Variables that turn something on in a job's ranks: Azure ML's names, and names that NumPy and TensorFlow have dropped."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Literal

_AZUREML = "DTRAIN_AZUREML"
_AZUREML_ANY_VERSION = "DTRAIN_AZUREML_ANY_VERSION"
_AZUREML_NO_INSTALL = "DTRAIN_AZUREML_NO_INSTALL"
_AZUREML_SECRETS = "DTRAIN_AZUREML_SECRETS"
_LEGACY = "DTRAIN_LEGACY"

OF_ONE_RUN = (_AZUREML, _LEGACY, "AZUREML_RUN_ID", "AZUREML_NODE_COUNT", "AZ_BATCH_MASTER_NODE", "AZ_BATCHAI_TASK_INDEX")
"""What of these belongs to one run, and would mislead a job that is started from within it."""


def legacy_switch(*, numpy: bool = False, tf1: bool = False) -> dict[str, str]:
    """Tells a rank which old names its script's modules may use; nothing where none are."""
    kinds = [name for name, wanted in (("numpy", numpy), ("tf1", tf1)) if wanted]
    return {_LEGACY: ",".join(kinds)} if kinds else {}


def legacy_kinds(environ: Mapping[str, str] | None = None) -> list[str]:
    """What :func:`legacy_switch` said."""
    return [kind for kind in (os.environ if environ is None else environ).get(_LEGACY, "").split(",") if kind]


def azureml_switch(*, force: bool = False) -> dict[str, str]:
    """Tells a rank that ``import azureml`` is dtrain's; with ``force`` also where the real one is installed."""
    return {_AZUREML: "force" if force else "1"}


def azureml_mode(environ: Mapping[str, str] | None = None) -> Literal["", "1", "force"]:
    """What :func:`azureml_switch` said: nothing, that ``azureml`` is dtrain's, or that it is so by force."""
    environ = os.environ if environ is None else environ
    mode = environ.get(_AZUREML, "")
    return "force" if mode == "force" else "1" if mode else ""


def azureml_any_version() -> dict[str, str]:
    """Tells a control script's process that a package of another version than asked for is enough."""
    return {_AZUREML_ANY_VERSION: "1"}


def takes_any_version(environ: Mapping[str, str] | None = None) -> bool:
    """What :func:`azureml_any_version` said."""
    return bool((os.environ if environ is None else environ).get(_AZUREML_ANY_VERSION))


def azureml_no_install() -> dict[str, str]:
    """Tells a control script's process that no environment is made for packages that are missing."""
    return {_AZUREML_NO_INSTALL: "1"}


def installs_packages(environ: Mapping[str, str] | None = None) -> bool:
    """What :func:`azureml_no_install` did not say."""
    return not (os.environ if environ is None else environ).get(_AZUREML_NO_INSTALL)


def azureml_secrets(names: Iterable[str]) -> dict[str, str]:
    """Tells a control script's process which variables of its jobs are secrets."""
    return {_AZUREML_SECRETS: ",".join(names)}


def secret_names(environ: Mapping[str, str] | None = None) -> list[str]:
    """What :func:`azureml_secrets` said."""
    names = (os.environ if environ is None else environ).get(_AZUREML_SECRETS, "").split(",")
    return list(dict.fromkeys(name.strip() for name in names if name.strip()))


def azureml_variables(run_id: str, *, nodes: int, master: str, index: int) -> dict[str, str]:
    """The variables by which Azure ML's documents let a training script know its place."""
    return {
        "AZUREML_RUN_ID": run_id,
        "AZUREML_NODE_COUNT": str(nodes),
        "AZ_BATCH_MASTER_NODE": master,
        "AZ_BATCHAI_TASK_INDEX": str(index),
    }
