#!/usr/bin/env bash
# Ranks by Open MPI: NPROC=4 launch/mpirun.sh generate --sp 4 --checkpoint DIR --prompt-file FILE
# Rank 0's address comes by mpi4py, or from MASTER_ADDR and MASTER_PORT. MPIRUN_ARGS: more options, such as --hostfile F.
set -euo pipefail
: "${NPROC:=2}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Unbound: mpirun would bind a rank to one core, whatever its number of threads.
exec mpirun -n "$NPROC" --bind-to none -x OMP_NUM_THREADS ${MPIRUN_ARGS:-} python -m megatron_sps2 "$@"
