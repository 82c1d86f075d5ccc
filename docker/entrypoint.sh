#!/usr/bin/env bash
# What a container runs: a profile's script in launch/, by its name, or else a command as it stands. Each is an exec, so
# that signals reach the trainer's launcher, and its exit code comes back.
set -euo pipefail
[ $# -gt 0 ] || set -- demo --tiny
case $1 in
    demo | smollm2 | a100 | 4gb | qwen3_4b_4gb | 4gb_tinyllama | multi_gpu)
        exec bash "$(dirname "${BASH_SOURCE[0]}")/../launch/$1.sh" "${@:2}"
        ;;
esac
exec "$@"
