#!/usr/bin/env bash
# Gives an exported model, a .gguf file with its Modelfile, to Ollama: bash launch/serve_ollama.sh FOLDER
exec "${PYTHON:-python3}" "$(dirname "$0")/serving.py" ollama "$@"
