#!/usr/bin/env bash
# Train on N devices of this machine; options after N are those of vmamba train.
# For several machines set NNODES, NODE_RANK, MASTER_ADDR and PORT, and run it on each.
set -euo pipefail

if [ $# -lt 2 ]; then
    echo "usage: $0 CONFIG N [options of vmamba train]" >&2
    exit 2
fi
config=$1 processes=$2
shift 2
exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes "${NNODES:-1}" --node-rank "${NODE_RANK:-0}" \
    --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${PORT:-29500}" \
    --nproc-per-node "$processes" -m vmamba.tools.train "$config" --launcher pytorch "$@"
