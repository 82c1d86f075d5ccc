#!/usr/bin/env bash
# Serves a run's adapter on its base, or a merged model, with SGLang: bash launch/serve_sglang.sh runs/a100
exec "${PYTHON:-python3}" "$(dirname "$0")/serving.py" sglang "$@"
