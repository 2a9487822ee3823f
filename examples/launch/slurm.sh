#!/usr/bin/env bash
# Several machines under SLURM, one task on each, which starts one process per GPU. From the repository's root:
#
#   sbatch --nodes 2 --gpus-per-node 8 examples/launch/slurm.sh -m examples.bert_glue \
#       --task_name mnli --data_dir glue/MNLI --model_name_or_path bert-base-uncased --bf16
#
# CONFIG=examples/launch/fsdp2.yaml sbatch ... takes another engine; what is about machines comes from SLURM either way.
#SBATCH --job-name=bayeformers
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00
#SBATCH --output=%x-%j.out
set -euo pipefail

if [ $# -eq 0 ]; then
    echo "usage: sbatch $0 -m examples.NAME [flags of the example]" >&2
    exit 2
fi

export CONFIG="${CONFIG:-examples/launch/several_machines.yaml}"
export GPUS="${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-8}}"
# the first machine of the job is the one that the others find, at a port that two jobs are unlikely to share
read -r MAIN_ADDRESS < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MAIN_ADDRESS MAIN_PORT=$((20000 + SLURM_JOB_ID % 20000))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(((${SLURM_CPUS_PER_TASK:-GPUS} + GPUS - 1) / GPUS))}"

# single quotes: every task has a SLURM_NODEID of its own
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 bash -c 'exec accelerate launch --config_file "$CONFIG" \
    --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * GPUS))" --machine_rank "$SLURM_NODEID" \
    --main_process_ip "$MAIN_ADDRESS" --main_process_port "$MAIN_PORT" "$@"' launch "$@"
