#!/usr/bin/env bash
# Everything that is checked: style, types, and the whole test suite. Arguments go to pytest.
. "$(dirname "$0")/_common.sh"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/pyrefly check
.venv/bin/pytest -q -n 2 --dist worksteal "$@"
