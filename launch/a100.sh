#!/usr/bin/env bash
# Llama-3.1-8B in NF4 on one A100 or larger: bash launch/a100.sh --data.path reports/
. "$(dirname "$0")/_common.sh"
launch single_a100.yaml a100 "$@"
