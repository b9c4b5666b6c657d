#!/usr/bin/env bash
#SBATCH --job-name=attnx
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
# One task for each GPU: under Slurm, JAX gives each task the one device of its local number. On
# machines without GPUs: --ntasks-per-node=1 --gpus-per-node=0.
set -euo pipefail

usage() {
  cat <<'TEXT'
A Slurm job of attnx, all of whose tasks are one run.

  sbatch [OPTIONS OF SBATCH] slurm.sh train  --config FILE --workdir DIR [--config.key=value ...]
  sbatch [OPTIONS OF SBATCH] slurm.sh decode --checkpoint DIR --prompt-file F --max-new-tokens N ...

What is given to sbatch comes before what this file says: --nodes, --ntasks-per-node,
--gpus-per-node, --time. DIR is on a file system that all nodes see. No coordinator is named: JAX
takes it from Slurm's variables. Three minutes before the end of its time the job gets a SIGTERM,
saves and stops; the same command goes on.

Environment:
  PYTHON  of the environment that attnx is installed in (python)
TEXT
}

case "${1-}" in
  train | decode) program=$1 ;;
  -h | --help | "")
    usage
    exit 0 ;;
  *)
    echo "slurm.sh: $1 is neither train nor decode; see --help" >&2
    exit 2 ;;
esac
shift
[[ -n "${SLURM_JOB_ID-}" ]] || { echo "slurm.sh: start it with sbatch; see --help" >&2; exit 2; }

# When a task is gone, attnx ends the others itself and each says why, which takes --patience; only
# then may srun kill.
exec srun --label --kill-on-bad-exit=0 --wait=90 "${PYTHON:-python}" -m "attnx.$program" "$@"
