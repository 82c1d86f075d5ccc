#!/usr/bin/env bash
# SmolLM2-135M-Instruct on a CPU, for data of your own: bash launch/smollm2.sh --data.path pairs.jsonl
. "$(dirname "$0")/_common.sh"
case " $* " in
    *" --model.name_or_path"*) ;; # another base
    *) bring_smollm2 || exit 78 ;;
esac
launch cpu.yaml smollm2 "$@"
