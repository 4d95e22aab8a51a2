#!/usr/bin/env bash
# Ranks by torchrun on this host: NPROC=4 launch/torchrun.sh generate --sp 4 --checkpoint DIR --prompt-file FILE
set -euo pipefail
: "${NPROC:=2}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec torchrun --standalone --nproc-per-node "$NPROC" -m megatron_sps2 "$@"
