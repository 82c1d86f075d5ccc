#!/usr/bin/env bash
# Qwen3-4B in NF4 on one 4 GB GPU, streamed: bash launch/qwen3_4b_4gb.sh --data.path pairs.jsonl
. "$(dirname "$0")/_common.sh"
launch single_4gb_cpu_offload.yaml qwen3_4b_4gb "$@"
