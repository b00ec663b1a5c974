#!/usr/bin/env bash
# Starts a run over several nodes from one of them, through pdsh and passwordless ssh:
#
#     bash launch_scripts/hosts.sh HOSTFILE tools/fit.py --config run.toml --output /shared/fit
#
# HOSTFILE has a line `name slots=PROCESSES` per node. The first node is the master; PORT (29500) is a free port there.
# The environment and this folder must have the same path on every node; --output and data.cache must lie on a shared
# file system. Environment variables for the other nodes go into .deepspeed_env (NAME=VALUE lines, in this folder or
# the home folder): OMP_NUM_THREADS=1, and DS_ACCELERATOR=cpu on nodes without a GPU.
set -euo pipefail
if [ $# -lt 2 ]; then
    sed -n '2,10s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
hosts=$1
shift
if [ "${1:0:1}" != - ] && [ ! -f "$1" ]; then
    echo "hosts.sh: expected a script after the hostfile, such as tools/fit.py, found no file $1." >&2
    exit 2
fi
world=$(python -m megatron_ligo hosts "$hosts")
if ! command -v pdsh > /dev/null; then
    echo "hosts.sh: expected pdsh on this node, found none. Install it, or run node.sh on each node." >&2
    exit 2
fi
# DeepSpeed passes no variable on to the other nodes: `env` sets it there.
exec deepspeed --hostfile "$hosts" --master_port "${PORT:-29500}" --no_python --no_local_rank \
    env LIGO_WORLD_SIZE="$world" "$(command -v python)" -u "$@"
