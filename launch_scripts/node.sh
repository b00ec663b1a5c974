#!/usr/bin/env bash
# Starts one node's part of a run over several nodes without ssh. Run it on every node within --timeout:
#
#     bash launch_scripts/node.sh HOSTFILE NODE_RANK MASTER tools/fit.py --config run.toml --output /shared/fit
#
# HOSTFILE has a line `name slots=PROCESSES` per node, in the order of NODE_RANK (0, 1, ...); the names are arbitrary.
# MASTER is the address of node 0; PORT (29500) is a free port there. INTERFACE names the network interface that reaches
# the other nodes, if it is not the first one. The environment must be installed on every node and be on PATH;
# --output and data.cache must lie on a shared file system.
set -euo pipefail
if [ $# -lt 4 ]; then
    sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
hosts=$1 rank=$2 master=$3
shift 3
if [ "${1:0:1}" != - ] && [ ! -f "$1" ]; then
    echo "node.sh: expected a script after the master, such as tools/fit.py, found no file $1." >&2
    exit 2
fi
if [ -n "${INTERFACE:-}" ]; then
    export GLOO_SOCKET_IFNAME=$INTERFACE NCCL_SOCKET_IFNAME=$INTERFACE
fi
LIGO_WORLD_SIZE=$(python -m megatron_ligo hosts "$hosts" --node-rank "$rank")
export LIGO_WORLD_SIZE
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec deepspeed --hostfile "$hosts" --no_ssh --node_rank "$rank" \
    --master_addr "$master" --master_port "${PORT:-29500}" "$@"
