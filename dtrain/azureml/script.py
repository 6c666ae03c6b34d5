"""Runs a control script, or a training script that no job runs, unchanged, in a process where ``azureml`` is dtrain's."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from dtrain import legacy, switches
from dtrain.azureml.finder import install
from dtrain.azureml.old_code import find_old_names, mend_chainer
from dtrain.errors import NotRunnable, did_you_mean


def run_script(
    command: Sequence[str],
    *,
    is_module: bool = False,
    force: bool = False,
    any_version: bool = False,
    no_install: bool = False,
    secrets: Sequence[str] = (),
) -> NoReturn:
    """Run ``command`` (a script or module's name, and its arguments) as ``__main__``, and leave with its exit code.

    Names that NumPy and TensorFlow have dropped work in it as in a job, and so does Chainer. Blocks until the script has ended;
    jobs that it did not wait for go on. Raises NotRunnable when there is no such script.
    """
    install(force=force)
    if any_version:
        os.environ.update(switches.azureml_any_version())
    if no_install:
        os.environ.update(switches.azureml_no_install())
    if secrets:
        os.environ.update(switches.azureml_secrets([*switches.secret_names(), *secrets]))
    target, *arguments = command
    if not is_module and not Path(target).is_file():
        beside = Path(target).parent
        siblings = [path.name for path in beside.glob("*.py")] if beside.is_dir() else []
        raise NotRunnable(f"no such script: {target} (from {Path.cwd()}){did_you_mean(Path(target).name, siblings)}")
    sys.argv = [target, *arguments]
    folder = Path.cwd() if is_module else Path(target).absolute().parent
    sys.path.insert(0, str(folder))
    mend_chainer()
    try:
        if is_module:
            runpy.run_module(target, run_name="__main__", alter_sys=True)
        else:
            old, _ = find_old_names(folder, Path(target).name)
            legacy.runner(switches.legacy_kinds(old), folder, rank=0)(target)
    except Exception as error:
        error = error.with_traceback(_own_frames(error.__traceback__))
        sys.excepthook(type(error), error, error.__traceback__)
        sys.exit(1)
    sys.exit(0)


def _own_frames(trace: TracebackType | None) -> TracebackType | None:
    """The traceback without the frames of what runs the script, which are not the user's."""
    runs = (__file__, legacy.__file__, runpy.__file__, "<frozen runpy>")
    while trace is not None and trace.tb_frame.f_code.co_filename in runs:
        trace = trace.tb_next
    return trace
