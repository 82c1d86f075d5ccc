#!/usr/bin/env bash
# A language model is taught a glossary, on a CPU, without an account: bash launch/demo.sh [--tiny] [--section.field VALUE]
# Answers to held-out wordings and to general questions are shown before and after, within five minutes of two cores.
# --tiny takes the bundled tiny base, which learns by heart and knows no language. An interrupted run resumes.
. "$(dirname "$0")/_common.sh"
profile=smollm2 words=()
for word in "$@"; do
    if [ "$word" = --tiny ]; then profile=demo; else words+=("$word"); fi
done
if [ "$profile" = smollm2 ] && ! bring_smollm2; then
    echo "the demo goes on with the tiny bundled base, which learns by heart and knows no language" >&2
    profile=demo
fi
given=" ${words[*]-} "
if [ "$profile" = smollm2 ]; then
    [[ $given == *" --data."* ]] || words=(--data.validation_path demo/certification_held_out.jsonl "${words[@]}")
    [[ $given == *" --run.dir"* ]] || words=(--run.dir runs/demo-smollm2 "${words[@]}")
    launch cpu.yaml smollm2 "${words[@]}"
fi
[[ $given == *" --data."* ]] || words=(--data.validation_path demo/held_out.jsonl "${words[@]}")
launch cpu.yaml demo "${words[@]}"
