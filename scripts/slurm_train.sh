#!/bin/bash
# Trains the folds of a run on a SLURM cluster: each job of the array takes a fold that is free, until none is left.
#   sbatch --array=0-7 scripts/slurm_train.sh --config_name her2st/dml --k 18 --use_kmeans --run_name cluster
# A job that is preempted, or whose time is up, is queued again and goes on from its last checkpoint.
#SBATCH --job-name=gene_dml_train
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@180
set -u

processes="${SLURM_GPUS_ON_NODE:-1}"
if [ "$processes" -gt 1 ]; then
    program=(torchrun --standalone --nproc_per_node "$processes" --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1)
else
    export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"
    program=(python)
fi

time_is_up=no
srun "${program[@]}" main.py --mode train --parallel folds --checkpoint_seconds 30 "$@" &
step=$!
trap 'time_is_up=yes; kill -USR1 "$step"' USR1  # srun hands it to every process of the step
trap 'kill -TERM "$step"' TERM
while true; do
    wait "$step"
    status=$?
    kill -0 "$step" 2>/dev/null || break  # a signal ends `wait` before the step has ended
done
if [ "$time_is_up" = yes ] && [ "$status" -ne 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
