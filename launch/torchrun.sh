#!/usr/bin/env bash
# Run one node's part of a run. On a single node, with all its GPUs:
#   launch/torchrun.sh configs/imagenet_r34_r18.yaml [key.sub=value ...]
# On several nodes, run it on each, with torchrun's options in the environment:
#   PET_NNODES=2 PET_NODE_RANK=0 PET_MASTER_ADDR=first-node launch/torchrun.sh CONFIG ...
# On a number of nodes that may change while it runs (docs/cluster.md, "Nodes that come and go"), likewise with:
#   PET_NNODES=1:4 PET_MASTER_ADDR=node-with-the-store launch/torchrun.sh CONFIG ...
# Afterwards the exit code (see torchrun.py) and run_dir/status tell whether to start it again.
set -euo pipefail

# --- edit, or set in the environment ------------------------------------------------------------------------
export PET_NPROC_PER_NODE=${PET_NPROC_PER_NODE:-gpu} # gpu: one process per GPU; on CPUs a number
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}         # per process; loader workers are additional
export PET_MASTER_PORT=${PET_MASTER_PORT:-29500}     # a free port of the first node
INDISTILL_COMMAND=${INDISTILL_COMMAND:-train}        # doctor: check whether the run would work here
# ------------------------------------------------------------------------------------------------------------

export PET_NNODES=${PET_NNODES:-1}
if [[ $PET_NNODES == *:* ]]; then # as many nodes as there are; all ranks start anew with each change
    export PET_RDZV_BACKEND=${PET_RDZV_BACKEND:-c10d} PET_RDZV_ID=${PET_RDZV_ID:-indistill}
    export PET_RDZV_ENDPOINT=${PET_RDZV_ENDPOINT:-${PET_MASTER_ADDR:?name the node with the store}:$PET_MASTER_PORT}
    export PET_MAX_RESTARTS=${PET_MAX_RESTARTS:-100} # nodes that may be lost; those that come back are not counted
    # Else torch would have the ranks meet at the first node of the first start, which may be lost.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    unset PET_MASTER_ADDR PET_MASTER_PORT PET_NODE_RANK
else
    export PET_NODE_RANK=${PET_NODE_RANK:-${SLURM_NODEID:-0}}
    export PET_MASTER_ADDR=${PET_MASTER_ADDR:-127.0.0.1}
fi
trap '' USR1 USR2 # they would end torchrun; the ranks handle them
if [ -n "${SLURM_JOB_ID:-}" ]; then
    # SLURM signals every process of a step. torchrun would pass SIGTERM on and kill the ranks 30 s later.
    trap '' TERM
    export PET_SIGNALS_TO_HANDLE=SIGINT
fi
exec "${PYTHON:-python}" "$(dirname "${BASH_SOURCE[0]}")/torchrun.py" -m indistill "$INDISTILL_COMMAND" "$@"
