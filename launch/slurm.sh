#!/usr/bin/env bash
# Trains on the nodes of a SLURM job: one process a node, which uses all the GPUs that it was given there.
#
#   sbatch --nodes=4 --gpus-per-node=8 --time=24:00:00 launch/slurm.sh [--training.max_steps 1000 ...]
#
# Submit it from the root of the checkout, with the virtual environment active or named in JAXLM_VENV. Partition,
# account and whatever else the cluster asks for go on the command line; they win over the #SBATCH lines below.
# What follows the script's name goes to scripts/train.py. All nodes must see the checkout, the text and
# JAXLM_CHECKPOINT_DIR under the same paths.
#
# Before the time limit SLURM warns the processes; they save and end with 75, and the job goes back into the queue, from
# where the same command goes on. Any other exit code ends the job.
#
#SBATCH --job-name=jaxlm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=jaxlm-%j.log
#
# The warning: this many seconds before the time limit (up to a minute more), so longer than a save takes. Without "B:",
# as here, it goes straight to the processes. With "B:" it would go to this script, which could only hand it to srun,
# and srun turns some signals, SIGTERM among them, into SIGKILL. USR1 rather than TERM, because SLURM leaves a process
# that it sent TERM to out of the exit code that it records.
#SBATCH --signal=USR1@300
set -euo pipefail

config=${JAXLM_CONFIG:-configs/medium.py}
checkpoint_dir=${JAXLM_CHECKPOINT_DIR:-checkpoints}
python=${JAXLM_VENV:+$JAXLM_VENV/bin/}python
max_requeues=${JAXLM_MAX_REQUEUES:-100} # ends a job that is too short to ever get anywhere

cd "${JAXLM_REPO:-$SLURM_SUBMIT_DIR}" # the script itself runs from a copy in SLURM's spool folder

# srun returns the highest code of its processes. A process that ends must not take the others with it, as some may
# still be writing the checkpoint (kill-on-bad-exit); but one that hangs must not hold the nodes for ever (wait). No
# binding: the one process of a node has all its cores.
code=0
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
  --kill-on-bad-exit=0 --wait=360 --cpu-bind=none --label \
  "$python" scripts/train.py --config "$config" --training.checkpoint_dir "$checkpoint_dir" "$@" || code=$?

if ((code == 75)); then
  if ((${SLURM_RESTART_COUNT:-0} >= max_requeues)); then
    echo "slurm.sh: requeued $SLURM_RESTART_COUNT times already (JAXLM_MAX_REQUEUES); sbatch goes on" >&2
  else
    scontrol requeue "$SLURM_JOB_ID" || echo "slurm.sh: could not requeue; the same sbatch command goes on" >&2
  fi
fi
exit "$code"
