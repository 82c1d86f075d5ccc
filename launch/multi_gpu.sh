#!/usr/bin/env bash
# The a100 recipe on every GPU of this machine: bash launch/multi_gpu.sh --data.path reports/
. "$(dirname "$0")/_common.sh"
gpus=$(nvidia-smi -L 2>/dev/null | wc -l)
if [ "$gpus" -lt 2 ]; then
    echo "multi_gpu wants two or more GPUs and nvidia-smi shows $gpus; with one, use launch/a100.sh" >&2
    exit 78
fi
topology=(--num_processes "$gpus")
launch multi_gpu_ddp.yaml multi_gpu "$@"
