#!/bin/bash
#SBATCH --job-name=torchlinearmoe
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log

# Train a recipe on several nodes, one torchrun a node:
#
#     sbatch recipes/slurm.sh RECIPE [--section.key=value ...]
#
# Every node must see the environment, the recipe and training.output_dir under the same paths. When a rank dies, all are
# started again, at most MAX_RESTARTS times, and go on from the newest checkpoint. 600 seconds before the time limit the
# run saves and ends, and the job is queued again. RANKS_PER_NODE: one a GPU of the node unless it is set.

set -uo pipefail

if [ $# -eq 0 ]; then
    echo "usage: sbatch recipes/slurm.sh RECIPE [--section.key=value ...]" >&2
    exit 2
fi

nodes=${SLURM_JOB_NUM_NODES:?start this with sbatch}
ranks=${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:?set RANKS_PER_NODE or --gpus-per-node}}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # a fresh store for every restart, whichever node it begins on
# How long torchrun waits for its ranks to save when it is asked to end (torch 2.13; 2.11 waits 30 seconds).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-540}

srun --kill-on-bad-exit=1 torchrun \
    --nnodes="$nodes" \
    --nproc_per_node="$ranks" \
    --rdzv_backend=c10d \
    --rdzv_endpoint="$first:$((20000 + SLURM_JOB_ID % 20000))" \
    --rdzv_id="$SLURM_JOB_ID" \
    --max-restarts="${MAX_RESTARTS:-3}" \
    -m torchlinearmoe.train "$@" &
training=$!

# srun hands SIGTERM on to every torchrun, and torchrun to its ranks, which save after the step they are in.
stopping=no
trap 'stopping=yes; kill -TERM "$training" 2>/dev/null' USR1

wait "$training"
status=$?
while kill -0 "$training" 2>/dev/null; do # the signal ended the wait, not the training
    wait "$training"
    status=$?
done
if [ "$stopping" = yes ] && [ "$status" -ne 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
    exit
fi
exit "$status"
