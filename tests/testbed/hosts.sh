#!/bin/bash
# Hosts on one machine, for tests. As root:
#   hosts.sh probe              whether this machine can have such hosts: exit code 0
#   hosts.sh up N [FOLDER...]   node1 to nodeN at 10.77.0.1 and fd77::1 to N; of /tmp they see these folders; down when its caller is gone
#   hosts.sh exec NODE COMMAND  as if typed there
#   hosts.sh cut|heal NODE      take its network away, and give it back
#   hosts.sh down               take everything down, in whatever state it is
# A host is a set of namespaces (network, name, processes, mounts, ipc) with its own sshd, /tmp, /run and /dev/shm. All else is shared
# with this machine, whose own network is left alone: the hosts' switch has a namespace too. TESTBED names a scratch folder.
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin
[ "${1-}" = probe ] || : "${TESTBED:?names a scratch folder}"
state=${TESTBED-}
self=$(readlink -f "$0")
tag=dtrain-$(printf %s "$state" | cksum | cut -d" " -f1)  # of this testbed: there may be another
switch=$tag-switch
net=10.77.0

first_process() { local outer; outer=$(cat "$state/$1.outer"); tr -d ' ' <"/proc/$outer/task/$outer/children"; }

case $1 in
probe)
    for tool in sshd ssh ip unshare nsenter; do command -v $tool >/dev/null; done
    unshare --net --mount --uts --ipc --pid --fork sh -ec 'hostname probe; mount --make-rprivate /; mount -t tmpfs tmpfs /mnt
        mount -t proc proc /proc; ip link add br0 type bridge; ip link add eth0 type veth peer name eth1; ip netns list' >/dev/null ;;
up)
    count=$2; shift 2
    mkdir -p "$state/ssh"
    setsid sh -c "tail --pid=$PPID -f /dev/null; '$self' down" </dev/null >/dev/null 2>&1 &  # a killed caller takes nothing down
    ssh-keygen -q -t ed25519 -N '' -f "$state/ssh/id_ed25519"
    ssh-keygen -q -t ed25519 -N '' -f "$state/hostkey"
    cp "$state/ssh/id_ed25519.pub" "$state/ssh/authorized_keys"
    printf '%s\n' 'Host *' 'StrictHostKeyChecking no' 'UserKnownHostsFile /dev/null' 'LogLevel ERROR' >"$state/ssh/config"
    chmod 700 "$state/ssh"; chmod 600 "$state"/ssh/*
    printf '%s\n' "HostKey $state/hostkey" "AuthorizedKeysFile $state/ssh/authorized_keys" 'PermitRootLogin prohibit-password' \
        'PasswordAuthentication no' 'UsePAM no' 'StrictModes no' 'UseDNS no' 'PidFile none' >"$state/sshd_config"
    echo 127.0.0.1 localhost >"$state/hosts"
    for k in $(seq "$count"); do echo "$net.$k node$k" >>"$state/hosts"; done
    ip netns add "$switch"
    ip -n "$switch" link add br0 type bridge
    ip -n "$switch" link set br0 up
    for k in $(seq "$count"); do
        node=node$k
        ip netns add "$tag-$node"
        ip link add "e-$node" netns "$switch" type veth peer name eth0 netns "$tag-$node"
        ip -n "$switch" link set "e-$node" master br0 up
        ip -n "$tag-$node" addr add "$net.$k/24" dev eth0
        # Its IPv6 addresses are there at once: nobody else has them, and nobody is asked.
        if ip netns exec "$tag-$node" sysctl -qw net.ipv6.conf.eth0.accept_dad=0 2>/dev/null; then
            ip -n "$tag-$node" addr add "fd77::$k/64" dev eth0
        fi
        ip -n "$tag-$node" link set eth0 up
        ip -n "$tag-$node" link set lo up
        setsid ip netns exec "$tag-$node" unshare --uts --ipc --mount --pid --fork --kill-child \
            "$self" first-process "$node" "$@" </dev/null >"$state/$node.log" 2>&1 &
        echo $! >"$state/$node.outer"
    done
    for k in $(seq "$count"); do
        for _ in $(seq 200); do [ -e "$state/node$k.ready" ] && break; sleep 0.05; done
        [ -e "$state/node$k.ready" ] || { cat "$state/node$k.log" >&2; exit 1; }
    done ;;
first-process)
    node=$2; shift 2
    hostname "$node"
    mount --make-rprivate /
    mount -t proc proc /proc
    mount -t tmpfs tmpfs /dev/shm
    mount -t tmpfs tmpfs /run
    mkdir -p /run/sshd /root/.ssh
    mount -t tmpfs -o mode=1777 tmpfs /mnt
    for folder in "$@"; do
        case $folder in /tmp/*) mkdir -p "/mnt${folder#/tmp}"; mount --bind "$folder" "/mnt${folder#/tmp}" ;; esac
    done
    mount --bind "$state/ssh" /root/.ssh
    mount --bind "$state/hosts" /etc/hosts
    # What root's shell does at its start is not the tests' affair: pyenv's waits up to a minute for a lock of all shells.
    if [ -e /root/.bashrc ]; then mount --bind /dev/null /root/.bashrc; fi
    sshd=$(command -v sshd)
    "$sshd" -f "$state/sshd_config" -E "$state/$node.sshd.log"
    sleep infinity &  # the last of its own processes: what comes later is of those who use it
    touch "$state/$node.ready"
    mount --move /mnt /tmp
    trap 'exit 0' TERM
    wait $! ;;
exec)
    node=$2; shift 2
    exec nsenter -t "$(first_process "$node")" -m -u -i -n -p -- "$@" ;;
cut) ip -n "$switch" link set "e-$2" down ;;
heal) ip -n "$switch" link set "e-$2" up ;;
down)
    for file in "$state"/*.outer; do
        [ -e "$file" ] || continue
        node=$(basename "$file" .outer)
        first=$(first_process "$node" 2>/dev/null || true)
        [ -z "$first" ] || kill -9 "$first" || true
        rm -f "$file" "$state/$node.ready"
    done
    for name in $(ip netns list | awk -v tag="^$tag-" '$1 ~ tag {print $1}'); do ip netns del "$name" || true; done ;;
*) sed -n '2,11s/^# \{0,1\}//p' "$self" >&2; exit 2 ;;
esac
