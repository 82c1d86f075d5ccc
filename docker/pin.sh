#!/usr/bin/env bash
# Writes docker/base.lock: the base image by the digest that its registry names today. Commit it; repeat this to update.
#   bash docker/pin.sh [IMAGE]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
image=${1:-docker.io/library/python:3.11-bookworm} # the Python of the tests; not slim, which has no C compiler
if command -v skopeo >/dev/null; then
    digest=$(skopeo inspect --format '{{.Digest}}' "docker://$image")
else
    digest=$(docker buildx imagetools inspect --format '{{.Manifest.Digest}}' "$image")
fi
[[ "$digest" =~ ^sha256:[0-9a-f]{64}$ ]] || { echo "the registry names no digest of $image: $digest" >&2; exit 78; }
name=$image
[[ "${image##*/}" != *:* ]] || name=${image%:*} # some engines take no tag beside a digest
printf '# Made by docker/pin.sh on %s from %s\n%s@%s\n' "$(date -u +%F)" "$image" "$name" "$digest" >docker/base.lock
echo "the base image is $image, $digest, kept in docker/base.lock"
