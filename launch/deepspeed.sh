#!/usr/bin/env bash
# Ranks by DeepSpeed's launcher: NPROC=4 launch/deepspeed.sh generate --sp 4 --checkpoint DIR --prompt-file FILE
# It only starts the ranks, quietly: it would log on stdout. DEEPSPEED_ARGS: more options, such as --hostfile F.
set -euo pipefail
: "${NPROC:=2}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# On CPU it must be told that there is no GPU to count. Its own port is always the same one: two runs would meet.
command -v nvidia-smi >/dev/null || export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"
: "${MASTER_PORT:=$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')}"
exec deepspeed --quiet --num_gpus "$NPROC" --master_port "$MASTER_PORT" ${DEEPSPEED_ARGS:-} \
  --no_local_rank --module megatron_sps2 "$@"
