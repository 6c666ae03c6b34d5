"""The commands that install what dtrain can use but does not bring; every message and ``dtrain env`` take them from here."""

from __future__ import annotations

from pathlib import Path

CHAINER_VERSION = "7.8.1"

MPI = "pip install 'dtrain[mpi]'"
# Built with today's setuptools, Chainer's source stops at its import of pkg_resources, which setuptools 81 dropped. A constraint
# on the build would depend on pip's version (25.3 changed how one is given); this does not.
CHAINER = f"pip install 'setuptools<81' wheel numpy && pip install --no-build-isolation chainer=={CHAINER_VERSION}"
CUPY = "pip install 'dtrain[cuda12]' (or cuda13, as `nvidia-smi` says)"
OBJECT_STORE = "pip install 'dtrain[s3]'"
TENSORFLOW = "pip install 'dtrain[tensorflow]'"
TENSORBOARD = "pip install tensorboard"
# Horovod is built against the TensorFlow and the MPI that are there.
_HOROVOD = "HOROVOD_WITH_MPI=1 HOROVOD_WITH_TENSORFLOW=1 {gloo}pip install {again}--no-build-isolation horovod==0.28.1"
HOROVOD = f"{TENSORFLOW} && {_HOROVOD.format(gloo='', again='')}"
# pip keeps the wheel that it built without Gloo, and would install that one again.
HOROVOD_GLOO = _HOROVOD.format(gloo="HOROVOD_WITH_GLOO=1 ", again="--no-cache-dir --force-reinstall --no-deps ")


def this_package() -> str:
    """What pip installs this dtrain from, for another Python: the folder or wheel that it came from here, else name and version.

    https://packaging.python.org/en/latest/specifications/direct-url/
    """
    import json
    from importlib import metadata

    source = Path(__file__).parents[1]
    if (source / "setup.py").is_file():  # a checkout that is imported in place
        return str(source)
    found = metadata.distribution("dtrain")
    return str(json.loads(found.read_text("direct_url.json") or "{}").get("url") or f"dtrain=={found.version}")
