#!/usr/bin/env bash
# Serves a .gguf file with llama.cpp: bash launch/serve_llama_cpp.sh MODEL.gguf [--lora ADAPTER.gguf]
exec "${PYTHON:-python3}" "$(dirname "$0")/serving.py" llama_cpp "$@"
