#!/usr/bin/env bash
# The a100 recipe on every GPU of this machine: bash launch/multi_gpu.sh --data.path reports/
. "$(dirname "$0")/_common.sh"
gpus=$(.venv/bin/python -c "import torch; print(torch.cuda.device_count())")
if [ "$gpus" -lt 2 ]; then
    echo "multi_gpu needs two or more GPUs, and torch finds $gpus; for one GPU use launch/a100.sh" >&2
    exit 78
fi
topology=(--num_processes "$gpus")
launch multi_gpu_ddp.yaml multi_gpu "$@"
