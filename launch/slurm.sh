#!/usr/bin/env bash
# SLURM: one process a GPU. From the repository's root, on a file system that all nodes see, after `make install EXTRAS=cuda`:
#   sbatch --nodes=2 launch/slurm.sh --config=configs/lavin7b_eim_scienceqa.py --workdir=/shared/runs/lavin
# The batch must be a multiple of the number of GPUs (LaVIN's 32 on 16; ClipCap's 40 on 8).
#SBATCH --job-name=eim
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# Two minutes before the end: SIGTERM to the processes, which save after their step and stop.
#SBATCH --signal=TERM@120
set -euo pipefail

# SLURM's variables tell JAX the processes and give each one GPU. The first process that ends badly ends the step.
if srun --kill-on-bad-exit=1 .venv/bin/python -m eim_jax.main "$@"; then
  exit 0
fi
# Stopped, preempted, or a node was lost: the same command continues from the last checkpoint. Five times at most, so
# that a mistake in the command does not come back for ever.
if [ "${SLURM_RESTART_COUNT:-0}" -lt 5 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit 1
