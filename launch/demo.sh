#!/usr/bin/env bash
# The whole job in about three minutes, on a CPU, without a network or an account: tunes the bundled tiny base on the
# bundled glossary and prints answers before and after. Interrupted, it resumes; finished, it starts a new run.
. "$(dirname "$0")/_common.sh"
if [ $# -eq 0 ] && grep -qs '"name": "finished"' runs/demo/exit.json; then
    set -- --run.resume never
fi
case " $* " in
    *" --data."*) ;; # data of your own
    *) set -- --data.validation_path demo/held_out.jsonl "$@" ;; # the bundled terms, asked in other words
esac
launch cpu.yaml demo "$@"
