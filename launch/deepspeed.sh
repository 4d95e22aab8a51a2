#!/usr/bin/env bash
# Ranks by DeepSpeed's launcher: NPROC=4 launch/deepspeed.sh generate --sp 4 --checkpoint DIR --prompt-file FILE
# On several hosts: HOSTFILE (see hostfile.example), whose slots say the ranks of each, and MASTER_ADDR, the first one's
# address (asked for by ssh if unset). DEEPSPEED_ARGS: more options, quoted as in a shell.
# The launcher only starts the ranks, quietly: it would log on stdout.
set -euo pipefail
# On CPU it must be told that there is no GPU to count.
command -v nvidia-smi >/dev/null || export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"
# Open MPI, where it starts the ranks, would bind each to one core: the names of versions 4 and 5.
export OMPI_MCA_hwloc_base_binding_policy=none PRTE_MCA_hwloc_default_binding_policy=none
# Its own port is always the same one: two runs would meet.
: "${MASTER_PORT:=$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')}"
# The launcher hands both on. Open MPI would to this host's ranks alone, and they would wait for the others elsewhere.
export -n MASTER_ADDR MASTER_PORT
where=(--num_gpus "${NPROC:-2}")
if [ -n "${HOSTFILE:-}" ]; then where=(--hostfile "$HOSTFILE" ${MASTER_ADDR:+--master_addr "$MASTER_ADDR"}); fi
mapfile -t more < <(xargs -r printf '%s\n' <<<"${DEEPSPEED_ARGS:-}")
exec deepspeed --quiet "${where[@]}" --master_port "$MASTER_PORT" "${more[@]}" \
  --no_local_rank --module megatron_sps2 "$@"
