#!/usr/bin/env bash
# Ranks by DeepSpeed's launcher: NPROC=4 launch/deepspeed.sh generate --sp 4 --checkpoint DIR --prompt-file FILE
# DeepSpeed only starts the ranks. On CPU it must be told that there is no GPU to count.
set -euo pipefail
: "${NPROC:=2}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
command -v nvidia-smi >/dev/null || export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"
exec deepspeed --num_gpus "$NPROC" --no_local_rank --module megatron_sps2 "$@"
