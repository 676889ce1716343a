# shellcheck shell=bash disable=SC2034
# All that the job scripts must know of this cluster and account. Edit this file; the others need no editing.

# --- account and partition
# #SBATCH lines cannot hold variables. sbatch takes these from the environment in their place, so source this file before
# calling sbatch by hand (submit.sh does it). An option on sbatch's command line beats a variable, a variable beats #SBATCH.
# export SBATCH_ACCOUNT=my_account
# export SBATCH_PARTITION=gpu
# export SBATCH_QOS=normal

# --- Python, on every node under the same path
# module load cuda/12.8
PYTHON=$HOME/megamtp/.venv/bin/python

# --- container, if the cluster wants one: options of srun (pyxis), or a command before python (apptainer)
SRUN_OPTIONS=()  # (--container-image=/images/megamtp.sqsh --container-mounts=/scratch:/scratch)
IN_CONTAINER=()  # (apptainer exec --nv --bind /scratch /images/megamtp.sif)

# --- health check, run once on each node before the ranks start and after a failure; it fails on a node to be avoided
HEALTH_CHECK=()  # empty: health_check.sh beside this file

# --- network
# The interface by which ranks meet. Where a node has several, NCCL and gloo may pick one that does not reach the others.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# The InfiniBand adapters, where some are for storage: `=` takes the names as they are.
# export NCCL_IB_HCA==mlx5_0,mlx5_1,mlx5_2,mlx5_3
# Ranks meet at the first host of the step, at a port derived from the job's number: every rank knows both without asking.
# Where nodes cannot look up each other's names:
# export MASTER_ADDR=...
# WARN says what failed and where, and nothing otherwise; INFO, once, shows which network NCCL has found.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# --- the ranks' processes
# Threads of a rank for work on the CPU. Without it each rank starts one per core of the node.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
# Compiled kernels on the node's own disk: a home folder on NFS suffers when hundreds of ranks lock files in it.
export TRITON_CACHE_DIR=/tmp/$UID-triton TORCHINDUCTOR_CACHE_DIR=/tmp/$UID-inductor
