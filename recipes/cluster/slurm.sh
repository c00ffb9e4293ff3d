#!/bin/bash
# Several nodes under Slurm, one launcher on each, which meet by torchrun's rendezvous on the first.
#   sbatch recipes/cluster/slurm.sh RECIPE [KEY=VALUE]...
#   sbatch --nodes 4 --export ALL,PROFILE=ddp_nodes recipes/cluster/slurm.sh recipes/lora/vl_28b.yaml
# The verb is the recipe's stage; run.dir lies on a disk that all nodes share. A job that is requeued, and a node that
# fails, go on from the last whole checkpoint: --resume begins at step 0 where there is none.
# No cluster was at hand: run here with stand-ins for srun and scontrol, two network namespaces of one machine as nodes,
# two CPU processes in each, profile ddp_nodes.
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
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
HEAD=${HEAD%%$'\n'*}  # not by head, which would end scontrol by a signal, and the job with it

# Processes that are started anew would read in the launchers' own store where those before them could be reached.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export WORDS="--num_machines $SLURM_NNODES --main_process_ip $HEAD --main_process_port $((20000 + SLURM_JOB_ID % 20000)) \
    --rdzv_backend c10d --max_restarts 3 \
    --parallelism_config_dp_replicate_size $SLURM_NNODES --parallelism_config_dp_shard_size $PER_NODE"

# exec: Slurm's TERM reaches --launch itself, which hands it on. --wait: the nodes of a stopped run end one after another,
# and the rest of a failed one is ended.
code=0
srun --wait 60 bash -c 'exec ernie-align "$STAGE" "$@" --resume --launch "${PROFILE:-fsdp2_nodes}" \
    --processes "$((SLURM_NNODES * PER_NODE))" --launcher "$WORDS --machine_rank $SLURM_NODEID"' \
    launcher "$recipe" "$@" || code=$?
if [ "$code" = 75 ]; then  # stopped by a signal and saved: at the time limit, Slurm itself would let it end here
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
