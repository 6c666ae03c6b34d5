#!/usr/bin/env bash
# Copy and edit: TensorFlow with parameter servers, all tasks on this host.
#   WORKERS=3 SERVERS=2 ./parameter_server.sh train.py --epochs 3
# A TF1 script, whose worker 0 leads, wants no chief:
#   LEADER= ./parameter_server.sh tf1_script.py
set -euo pipefail

# The environment that dtrain is installed in, unless it is active already.
if [ -n "${VENV:-}" ]; then
    # shellcheck disable=SC1091
    source "$VENV/bin/activate"
fi

# shellcheck disable=SC2086 # nothing, or an option
exec dtrain run --launcher parameter_server --workers "${WORKERS:-2}" --servers "${SERVERS:-1}" ${LEADER---chief} "$@"
