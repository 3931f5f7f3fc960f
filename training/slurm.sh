#!/bin/bash
# Prepare a set in shards, one job each; submit it from the checkout, with any of prepare.py's options:
#     sbatch --array=1-8 training/slurm.sh /data/FaceForensics++ out=/data/pairs
# The same line again continues: always all of the array, from 1, as its length is the number of shards. When it is
# through, `python training/prepare.py --status out=/data/pairs` shows which shards are whole.
#SBATCH --job-name=prepare
#SBATCH --cpus-per-task=8
exec python training/prepare.py "$@" jobs="${SLURM_CPUS_PER_TASK:-1}" \
    --shard "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT"
