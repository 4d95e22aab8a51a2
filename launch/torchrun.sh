#!/usr/bin/env bash
# Ranks by torchrun: NPROC=4 launch/torchrun.sh generate --sp 4 --checkpoint DIR --prompt-file FILE
# On several hosts, once on each: NNODES, RDZV_ENDPOINT=HOST:PORT of one of them, NPROC ranks a host. NODE_RANK=0, 1, ...
# fixes which host has rank 0, the endpoint's; without it torchrun chooses, and MAX_RESTARTS starts all hosts again.
set -euo pipefail
# torchrun would give each rank one thread.
share=$(($(nproc) / ${NPROC:-2}))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((share > 0 ? share : 1))}"
where=(--standalone)
if [ "${NNODES:-1}" != 1 ]; then
  where=(--nnodes "$NNODES" --rdzv-endpoint "${RDZV_ENDPOINT:?give HOST:PORT of one host}" --rdzv-id "${RDZV_ID:-sps2}")
  if [ -n "${NODE_RANK:-}" ]; then where+=(--rdzv-backend static --node-rank "$NODE_RANK")
  else
    where+=(--rdzv-backend c10d)
    # A new store for each life: hosts do not count restarts alike, and would look for each other in two places.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
  fi
  # For a host that never comes: torchrun would wait for ten minutes. timeout is static's, join_timeout c10d's.
  where+=(--rdzv-conf "timeout=${RDZV_TIMEOUT_S:-120},join_timeout=${RDZV_TIMEOUT_S:-120}")
fi
exec torchrun "${where[@]}" --nproc-per-node "${NPROC:-2}" --max-restarts "${MAX_RESTARTS:-0}" -m megatron_sps2 "$@"
