#!/usr/bin/env bash
# Prints the path of a Horovod wheel for the environment of PYTHON (which holds TensorFlow, an MPI and constraints/build.txt),
# building it when no earlier one fits: .ci/horovod_wheel.sh PYTHON VERSION
#
# pip would keep such a wheel under Horovod's name and version alone and hand it to another TensorFlow or MPI, which it
# was not built for. Here it lies in $DTRAIN_CACHE, else $XDG_CACHE_HOME/dtrain, else ~/.cache/dtrain, under wheels/, in a folder named by
# everything that went into it; where that cannot be written, in the virtual environment.
set -euo pipefail

python=$1
version=$2
bin=$(cd "$(dirname "$python")" && pwd)
export PATH="$bin:$PATH" # for mpicxx and cmake
# mpicxx writes the place of the MPI it belongs to, in this environment, into what it links. The wheel serves others as well: there
# the MPI of their own is found from where Horovod lies, lib/python3.x/site-packages/horovod/tensorflow.
# shellcheck disable=SC2016 # the dynamic linker's variable, not the shell's
export LDFLAGS='-Wl,-rpath,$ORIGIN/../../../..'"${LDFLAGS:+ $LDFLAGS}"
export HOROVOD_WITH_MPI=1 HOROVOD_WITH_TENSORFLOW=1 HOROVOD_WITH_GLOO=1 HOROVOD_WITHOUT_PYTORCH=1 HOROVOD_WITHOUT_MXNET=1

compiler=${CXX:-g++}
if ! command -v "$compiler" >/dev/null; then
    echo "building Horovod $version needs a C++ compiler and $compiler is not there; on Debian: apt-get install g++" >&2
    exit 1
fi

# One line an input; also written beside the wheel, to be read by whoever wonders why it was built again.
inputs=$(
    echo "horovod $version"
    "$python" - <<'EOF'
import importlib.metadata
import platform
import sys

installed = {d.metadata["Name"].lower().replace("_", "-"): d.version for d in importlib.metadata.distributions()}
print("tensorflow", [(name, installed[name]) for name in ("tensorflow", "tensorflow-cpu") if name in installed])
print("numpy", installed["numpy"])
print("python", sys.implementation.cache_tag, platform.machine(), "-".join(platform.libc_ver()))
EOF
    echo "mpi $(mpirun --version | head -n 1)"
    echo "compiler $($compiler --version | head -n 1)"
    echo "build $(grep -o '^[a-z]*==[0-9.]*' "$(dirname "$0")/../constraints/build.txt" | tr '\n' ' ')"
    env | grep -E '^(HOROVOD_|CXX=|CXXFLAGS=|CPPFLAGS=|LDFLAGS=|CMAKE_)' | sort
)
key=horovod-$version-$(sha256sum <<<"$inputs" | cut -c 1-16)

shelf=${DTRAIN_CACHE:-${XDG_CACHE_HOME:-${HOME:-/nonexistent}/.cache}/dtrain}/wheels
find_wheel() { find "$1/$key" -maxdepth 1 -name 'horovod-*.whl' -print -quit 2>/dev/null || true; }
for folder in "$shelf" "$bin/../cache/wheels"; do
    wheel=$(find_wheel "$folder")
    if [ -n "$wheel" ]; then
        echo "Horovod: using $wheel" >&2
        echo "$wheel"
        exit 0
    fi
done

if ! { mkdir -p "$shelf" && probe=$(mktemp -d "$shelf/.building-XXXXXX"); } 2>/dev/null; then
    echo "Horovod: $shelf cannot be written; the wheel stays in the virtual environment" >&2
    shelf=$bin/../cache/wheels
    mkdir -p "$shelf"
    probe=$(mktemp -d "$shelf/.building-XXXXXX")
fi
trap 'rm -rf "$probe"' EXIT

echo "Horovod: no wheel $key yet; building it (about two minutes on two cores)" >&2
mkdir "$probe/$key"
if ! "$python" -m pip wheel --quiet --no-build-isolation --no-deps --no-cache-dir --no-binary horovod \
    --wheel-dir "$probe/$key" "horovod==$version" >"$probe/log" 2>&1; then
    tail -n 100 "$probe/log" >&2
    echo "Horovod: the build failed; above is the end of what it printed" >&2
    exit 1
fi
echo "$inputs" >"$probe/$key/inputs.txt"
# Two builds at once may both come here: the first to arrive wins, and both wheels are as good.
mv -T "$probe/$key" "$shelf/$key" 2>/dev/null || true
find_wheel "$shelf"
