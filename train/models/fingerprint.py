"""A fingerprint of the base: its configuration and every byte of its weights."""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from data_tools.cache import cache_root
from train.config import Config
from train.models.hub import BasePlace, fetch_weights, locate
from train.models.shape import model_shape
from train.run.durable import write_atomically
from train.run.exits import ExitCode, ExitWith

READ_BYTES = 2**22
MAX_THREADS = 8  # files that are read at the same time


def base_fingerprint(config: Config) -> str:
    """sha256 that tells one base from another, whatever model.max_positions makes of it.

    Over config.json and, for each weight file that is loaded, its content; for random weights the seed; for a hub model
    the commit.
    """
    place = locate(config.model)
    return _fingerprint(config, place.commit)


def content_fingerprint(config: Config) -> str:
    """Likewise, but for a hub model by the content of its files too: it tells whether a folder is a copy of it."""
    return _fingerprint(config, "")


def _fingerprint(config: Config, commit: str) -> str:
    shape, place = model_shape(replace(config.model, max_positions=0)), locate(config.model)
    settings = {key: value for key, value in shape.to_diff_dict().items() if key != "transformers_version"}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    if config.model.random_init:
        digest.update(f"random {config.train.seed}".encode())
    elif commit:  # its files are looked at where they are loaded
        digest.update(commit.encode())
    else:
        paths = fetch_weights(place)
        for path, content in zip(paths, content_hashes(paths), strict=True):
            digest.update(f"{path.name} {content}".encode())
    return digest.hexdigest()


def verified_weights(place: BasePlace) -> list[Path]:
    """The files of `fetch_weights`; raises ExitWith(BAD_INPUT) where the hub's cache has others under their names."""
    paths = fetch_weights(place)
    if place.commit:
        content_hashes(paths)
    return paths


def content_hashes(paths: Sequence[Path]) -> list[str]:
    """sha256 of each file, read once for each of its states: 1 GB a second and thread, then nothing.

    What is known of a file is kept in the cache by its path, size, inode and times of change. Raises
    ExitWith(BAD_INPUT) where a file of the hub's cache is not what its name says.
    """
    with ThreadPoolExecutor(min(MAX_THREADS, max(1, len(paths)))) as threads:
        return list(threads.map(_content_hash, paths))


def _content_hash(path: Path) -> str:
    status, blob = path.stat(), path.resolve()
    state = [str(blob), status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]
    key = hashlib.sha256(json.dumps(state).encode()).hexdigest()
    known = cache_root().parent / "hashes" / key
    with suppress(OSError):
        found = known.read_text(encoding="ascii")
        if len(found) == 64:
            return found
    said = blob.name if blob.parent.name == "blobs" else ""  # the hub's cache names a file by its content
    digests = [hashlib.sha256()]
    if re.fullmatch(r"[0-9a-f]{40}", said):  # as git names it, where it is small; some mirrors leave git's head out
        for head in (b"blob %d\0" % status.st_size, b""):
            digests.append(hashlib.sha1(head, usedforsecurity=False))
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            for digest in digests:
                digest.update(block)
    is_named = re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", said)
    if is_named and said not in [digest.hexdigest() for digest in digests]:
        reason = f"{path}: its content is not what the hub's cache calls it; delete {blob}, it is then fetched again"
        raise ExitWith(ExitCode.BAD_INPUT, reason)
    with suppress(OSError):  # without a cache it is read each time
        os.makedirs(known.parent, exist_ok=True)
        write_atomically(known, digests[0].hexdigest())
    return digests[0].hexdigest()
