#!/usr/bin/env bash
# The whole job in about three minutes, on a CPU, without a network or an account: fine-tunes the bundled tiny base on
# the bundled glossary and prints answers before and after. An interrupted run resumes; after a finished one, a new
# run starts.
. "$(dirname "$0")/_common.sh"
if [ $# -eq 0 ] && grep -qs '"name": "finished"' runs/demo/exit.json; then
    set -- --run.resume never
fi
case " $* " in
    *" --data."*) ;; # the user's data
    *) set -- --data.validation_path demo/held_out.jsonl "$@" ;; # the bundled terms in other wordings
esac
launch cpu.yaml demo "$@"
