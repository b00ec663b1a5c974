#!/usr/bin/env bash
# A run over several nodes that reach one another by ssh without a password, with pdsh, started on one of them:
#
#     bash launch_scripts/hosts.sh HOSTFILE tools/fit.py --config run.toml --output /shared/fit
#
# HOSTFILE has a line `name slots=PROCESSES` for each node; the first one is the master, PORT (29500) a free port there.
# The environment and this folder must be at the same place on every node, --output and data.cache on a file system
# that all nodes share. What other nodes must see of this shell's environment goes into .deepspeed_env (NAME=VALUE
# lines, in this folder or in the home folder): OMP_NUM_THREADS=1, and DS_ACCELERATOR=cpu on nodes without a GPU.
set -euo pipefail
if [ $# -lt 2 ]; then
    sed -n '2,10s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
hosts=$1
shift
if ! command -v pdsh > /dev/null; then
    echo "hosts.sh: expected pdsh on this node, found none. Install it, or use node.sh on each node." >&2
    exit 2
fi
exec deepspeed --hostfile "$hosts" --master_port "${PORT:-29500}" "$@"
