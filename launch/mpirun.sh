#!/usr/bin/env bash
# Ranks by Open MPI: NPROC=4 launch/mpirun.sh generate --sp 4 --checkpoint DIR --prompt-file FILE
# On several hosts: HOSTFILE, lines of `host slots=N`; NPROC ranks in all, or one for each slot. MPIRUN_ARGS: more
# options, quoted as in a shell. Rank 0's address comes by mpi4py, or from MASTER_ADDR and MASTER_PORT.
set -euo pipefail
where=(-n "${NPROC:-2}")
if [ -n "${HOSTFILE:-}" ]; then where=(--hostfile "$HOSTFILE" ${NPROC:+-n "$NPROC"}); fi
# ssh takes no environment along: the variables that ranks on other hosts need.
mapfile -t needed < <(compgen -e | sed -nE 's/^(OMP_NUM_THREADS|PYTHONPATH|(GLOO|MASTER|NCCL)_.*)$/-x\n\1/p')
mapfile -t more < <(xargs -r printf '%s\n' <<<"${MPIRUN_ARGS:-}")
# Unbound: mpirun would bind a rank to one core, whatever its number of threads.
exec mpirun "${where[@]}" --bind-to none "${needed[@]}" "${more[@]}" "$(command -v python)" -m megatron_sps2 "$@"
