#!/bin/bash
# Several nodes under Slurm: one launcher per node; they connect through torchrun's rendezvous on the first node.
#   sbatch recipes/cluster/slurm.sh RECIPE [KEY=VALUE]...
#   sbatch --nodes 4 --export ALL,PROFILE=ddp_nodes recipes/cluster/slurm.sh recipes/lora/vl_28b.yaml
# The command is the recipe's stage; run.dir must be on a disk that all nodes share. After a requeue or a failed node the
# run continues from the newest complete checkpoint, or from step 0 if there is none.
# Not run on a cluster. Tested with stand-ins for srun and scontrol: two network namespaces of one machine as nodes, two
# CPU processes in each, profile ddp_nodes.
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
HEAD=${HEAD%%$'\n'*}  # not with head: scontrol would get SIGPIPE and end the job

# Without this, restarted processes read the addresses of the previous ones from the launchers' store.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export WORDS="--num_machines $SLURM_NNODES --main_process_ip $HEAD --main_process_port $((20000 + SLURM_JOB_ID % 20000)) \
    --rdzv_backend c10d --max_restarts 3 \
    --parallelism_config_dp_replicate_size $SLURM_NNODES --parallelism_config_dp_shard_size $PER_NODE"

# exec: Slurm's TERM reaches ernie-align, which passes it to the processes. --wait: lets the nodes of a stopped run end one
# after another, and ends the remaining nodes of a failed run.
code=0
srun --wait 60 bash -c 'exec ernie-align "$STAGE" "$@" --resume --launch "${PROFILE:-fsdp2_nodes}" \
    --processes "$((SLURM_NNODES * PER_NODE))" --launcher "$WORDS --machine_rank $SLURM_NODEID"' \
    launcher "$recipe" "$@" || code=$?
if [ "$code" = 75 ]; then  # stopped by a signal after saving, as at the time limit, where Slurm does not requeue by itself
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
