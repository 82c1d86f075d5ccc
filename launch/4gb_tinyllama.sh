#!/usr/bin/env bash
# TinyLlama-1.1B in NF4 on one 4 GB GPU: bash launch/4gb_tinyllama.sh --data.path pairs.jsonl
. "$(dirname "$0")/_common.sh"
launch single_4gb_cpu_offload.yaml 4gb_tinyllama "$@"
