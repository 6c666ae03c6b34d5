#!/usr/bin/env bash
# Copy and edit: a training job on nodes that Slurm gives, submitted from here and followed.
#   NODES=2 TASKS_PER_NODE=4 ./slurm.sh train.py --epochs 3
# What sbatch is to know besides goes in front of the script: ./slurm.sh --sbatch-arg=--time=8:00:00 train.py
set -euo pipefail

# The environment that dtrain is installed in, unless it is active already.
if [ -n "${VENV:-}" ]; then
    # shellcheck disable=SC1091
    source "$VENV/bin/activate"
fi

exec dtrain run --launcher slurm --nodes "${NODES:-2}" --tasks-per-node "${TASKS_PER_NODE:-1}" "$@"
