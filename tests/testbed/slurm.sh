#!/bin/bash
# Slurm on the hosts that hosts.sh made, for tests. As root:
#   slurm.sh probe   whether this machine has what it takes: exit code 0
#   slurm.sh up N    munged and slurmd on node1 to nodeN, slurmctld on node1; returns when all nodes are idle
# It goes down with its hosts, whose first processes all these daemons hang on. TESTBED names the same scratch folder.
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin
hosts=$(dirname "$(readlink -f "$0")")/hosts.sh

case $1 in
probe)
    for tool in munged slurmctld slurmd srun sbatch scontrol; do command -v $tool >/dev/null; done
    "$hosts" probe ;;
up)
    count=$2
    state=${TESTBED:?names a scratch folder}/slurm
    mkdir -p "$state/ctld"
    dd if=/dev/urandom of="$state/munge.key" bs=128 count=8 status=none
    chmod 400 "$state/munge.key"
    echo CgroupPlugin=cgroup/v1 >"$state/cgroup.conf"
    sed "s|@STATE@|$state|; s|@COUNT@|$count|" "$(dirname "$hosts")/slurm.conf.in" >"$state/slurm.conf"
    # Debian's Slurm loads libpmix.so, a name that only a development package has.
    pmix=$(ls -d /usr/lib/*/pmix2/lib 2>/dev/null | head -1 || true)
    if [ -n "$pmix" ]; then
        cp -a "$pmix" "$state/pmix"
        ln -sf libpmix.so.2 "$state/pmix/libpmix.so"
    fi
    for k in $(seq "$count"); do
        "$hosts" exec "node$k" sh -ec "
            mount --bind '$state' /etc/slurm
            [ -z '$pmix' ] || mount --bind '$state/pmix' '$pmix'
            mkdir -p -m 755 /run/munge /run/slurmd
            munged --force --key-file='$state/munge.key' --log-file='$state/munged.node$k.log' --pid-file=/run/munge/munged.pid \
                --seed-file=/run/munge/seed --socket=/run/munge/munge.socket.2
            [ $k -ne 1 ] || slurmctld -c
            slurmd -N node$k -c" </dev/null >"$state/node$k.log" 2>&1
    done
    for _ in $(seq 200); do
        [ "$("$hosts" exec node1 sinfo -h -N -p debug -t idle -o %N 2>/dev/null | wc -l)" -eq "$count" ] && exit
        sleep 0.1
    done
    tail -n 20 "$state"/*.log >&2
    exit 1 ;;
*) sed -n '2,5s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
