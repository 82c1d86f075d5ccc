#!/usr/bin/env bash
# Serves a run's adapter on its base, or a merged model, with vLLM: bash launch/serve_vllm.sh runs/a100 [--port 9000]
exec "${PYTHON:-python3}" "$(dirname "$0")/serving.py" vllm "$@"
