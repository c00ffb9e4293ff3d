#!/bin/bash
# Several nodes under Slurm, one launcher on each, which meet by torchrun's rendezvous on the first.
#   sbatch recipes/cluster/slurm.sh RECIPE [KEY=VALUE]...
#   sbatch --nodes 4 --export ALL,PROFILE=ddp_nodes recipes/cluster/slurm.sh recipes/lora/vl_28b.yaml
# The verb is the recipe's stage; run.dir lies on a disk that all nodes share. A job that is requeued, and a node that
# fails, go on from the last whole checkpoint: --resume begins at step 0 where there is none.
# Not run here: no cluster was at hand.
#SBATCH --job-name ernie-align
#SBATCH --nodes 2
#SBATCH --ntasks-per-node 1
#SBATCH --gpus-per-node 8
#SBATCH --requeue
#SBATCH --signal TERM@120
set -euo pipefail

recipe=${1:?usage: sbatch recipes/cluster/slurm.sh RECIPE [KEY=VALUE]...}
shift
export STAGE PER_NODE HEAD
STAGE=$(sed -n 's/^stage: *\([a-z]*\).*/\1/p' "$recipe")
PER_NODE=${SLURM_GPUS_ON_NODE:?}
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# exec: Slurm's TERM reaches the launcher itself, which hands it on
srun --kill-on-bad-exit=1 bash -c 'exec accelerate launch \
    --config_file "recipes/accelerate/${PROFILE:-fsdp2_nodes}.yaml" \
    --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * PER_NODE))" --machine_rank "$SLURM_NODEID" \
    --rdzv_backend c10d --max_restarts 3 --main_process_ip "$HEAD" --main_process_port "$((20000 + SLURM_JOB_ID % 20000))" \
    -m ernie_align "$STAGE" "$@" --resume' launcher "$recipe" "$@"
