#!/usr/bin/env bash
# Builds the image `handloop`, or `handloop:cu126` for GPUs below compute capability 7.5:
#   bash docker/build.sh [cu126] [ARGUMENT OF docker build ...]
# ENGINE=podman or ENGINE=buildah builds with these. The base image is pinned by digest in docker/base.lock.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
engine=${ENGINE:-docker} tag=handloop locks="requirements.lock requirements-cuda.lock"
if [ "${1:-}" = cu126 ]; then
    shift
    tag=handloop:cu126 locks=requirements-cu126.lock
    if [ ! -f "$locks" ]; then
        echo "there is no $locks: pip install uv && python launch/lock.py cu126 makes it from torch's own index" >&2
        exit 78
    fi
fi
[ -f docker/base.lock ] || bash docker/pin.sh
options=()
[ "$engine" = docker ] || options=(--format docker) # the OCI format has no health checks
exec "$engine" build ${options[@]+"${options[@]}"} --build-arg BASE="$(tail -n 1 docker/base.lock)" --build-arg LOCKS="$locks" \
    --tag "$tag" --file docker/Dockerfile "$@" .
