#!/usr/bin/env bash
# Everything that is checked: style, types, and the whole test suite (about 16 minutes on two cores). Arguments behind the
# mode go to pytest. Modes, as the first argument:
#   --quick        style, types, and the unit and parity tests (2.5 minutes)
#   --thorough     the whole, with further variants of tests that run anyway (about 20 minutes)
#   --faults full  the faults alone, as often as docs/RELIABILITY.md says, and then its table (half an hour)
. "$(dirname "$0")/_common.sh"
quick=(tests/project tests/unit tests/parity)
tests=()
case "${1:-}" in
    --quick)
        shift
        tests=(-m "not slow" "${quick[@]}")
        ;;
    --thorough)
        shift
        export HANDLOOP_TESTS=thorough
        ;;
    --faults)
        [ "${2:-}" = full ] || {
            echo "usage: bash launch/test.sh [--quick | --thorough | --faults full] [PYTEST_ARGUMENT ...]" >&2
            exit 78
        }
        export HANDLOOP_FAULTS=full HANDLOOP_TALLY="$PWD/runs/tally.jsonl"
        mkdir -p runs && rm -f "$HANDLOOP_TALLY"
        code=0
        .venv/bin/pytest -q -n 2 --dist worksteal tests/faults "${@:3}" || code=$?
        .venv/bin/python -m benchmarks.faults "$HANDLOOP_TALLY"
        exit "$code"
        ;;
esac
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/pyrefly check
.venv/bin/pytest -q -n 2 --dist worksteal ${tests[@]+"${tests[@]}"} "$@"
