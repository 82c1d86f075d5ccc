"""Where prepared data is kept: HANDLOOP_CACHE, or ~/.cache/handloop; everything in it can be made again."""

import errno
import os
from pathlib import Path
from typing import IO

from data_tools.report import DataError


def cache_root() -> Path:
    """The folder of prepared data in HANDLOOP_CACHE or ~/.cache/handloop; everything in it can be made again.

    Raises DataError where there is no home.
    """
    try:
        return Path(os.environ.get("HANDLOOP_CACHE") or "~/.cache/handloop").expanduser() / "prepared"
    except RuntimeError as error:  # HOME is not set, and the user is not among the system's, as in many containers
        raise unusable_cache(str(error)) from None


def lock_of(fingerprint: str) -> IO[str]:
    """The file that whoever prepares these samples locks; raises DataError where the cache cannot be written."""
    locks = cache_root().parent / "locks"
    try:
        for folder in (cache_root(), locks):
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        return (locks / fingerprint[:2]).open("w")
    except OSError as error:
        raise unusable_cache(str(error)) from None


def unusable_cache(reason: str) -> DataError:
    """The error where prepared data cannot be kept."""
    return DataError(
        f"the cache of prepared data cannot be used: {reason}\n"
        "set HANDLOOP_CACHE to a folder where you may write, on a disk with room"
    )
