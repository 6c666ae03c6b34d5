#!/usr/bin/env bash
# Copy and edit: TensorFlow with Horovod on several ranks of this host.
#   RANKS=4 ./horovod.sh train.py --epochs 3
set -euo pipefail

# The environment that dtrain is installed in, unless it is active already.
if [ -n "${VENV:-}" ]; then
    # shellcheck disable=SC1091
    source "$VENV/bin/activate"
fi

exec dtrain run -n "${RANKS:-2}" --launcher horovod "$@"
