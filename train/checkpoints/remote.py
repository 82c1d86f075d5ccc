"""A folder at another place, in a bucket or on a file system: fsspec speaks to it.

Nothing here trusts what a write returns: whoever writes reads back (mirror.py).
"""

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import fsspec

from train.run.exits import ExitCode, ExitWith
from train.run.redact import first_line

T = TypeVar("T")
CHUNK_BYTES = 1 << 20
PART_BYTES = 8 << 20  # of a multipart upload
MAX_PARTS = 9_000  # S3 takes 10,000
PATIENCE_SECONDS = 60.0  # with a mirror that does not answer at the start
OPTION = "--checkpoint.mirror"


@dataclass(frozen=True)
class Scheme:
    """A kind of place."""

    package: str  # that fsspec needs for it
    extra: str  # of ours that brings the package
    options: dict[str, Any]  # of fsspec's file system


# s3fs tries five times itself, so botocore need not: a dead line is then known within the patience
_S3 = {"config_kwargs": {"connect_timeout": 8, "read_timeout": 60, "retries": {"total_max_attempts": 1}}}
SCHEMES = {"s3": Scheme("s3fs", "s3", _S3), "gs": Scheme("gcsfs", "gcs", {}), "file": Scheme("", "", {})}


class Remote:
    """The files below one URL, by their names relative to it; methods raise OSError and what libraries raise."""

    def __init__(self, url: str) -> None:
        """Raises ExitWith(BAD_INPUT) where the package for its scheme is missing."""
        self.url = url.rstrip("/")
        name = url.partition("://")[0]
        self.scheme = SCHEMES[name]
        try:
            kind = fsspec.get_filesystem_class(name)
        except ImportError as error:
            package, extra = self.scheme.package, self.scheme.extra
            raise ExitWith(
                ExitCode.BAD_INPUT,
                f"{OPTION} {url} needs {package} ({first_line(error)}): pip install -c constraints.txt {package} "
                f"(the extra `{extra}` names it)",
            ) from None
        self.fs = kind(skip_instance_cache=True, use_listings_cache=False, **self.scheme.options)
        self.moved = 0  # bytes read and written so far, for whoever asks whether anything goes on
        self.root = str(self.fs._strip_protocol(self.url))

    @property
    def is_local(self) -> bool:
        """Whether it is a folder of a file system that is mounted here."""
        return not self.scheme.package

    def sizes(self) -> dict[str, int]:
        """Bytes of every file below the URL, by name."""
        self.fs.invalidate_cache()
        found = self.fs.find(self.root, detail=True)
        start = len(self.root) + 1
        return {str(path)[start:]: int(info["size"]) for path, info in found.items()}

    def read(self, name: str, limit: int) -> bytes:
        """The content of a small file; raises ValueError where it is longer than `limit`."""
        content = b""
        for chunk in self.chunks(name):
            content += chunk
            if len(content) > limit:
                raise ValueError(f"{name} is longer than {limit:,} bytes")
        return content

    def chunks(self, name: str) -> Iterator[bytes]:
        """The content of a file, a part at a time."""
        with self.fs.open(self._path(name), "rb", block_size=PART_BYTES) as file:
            while chunk := file.read(CHUNK_BYTES):
                self.moved += len(chunk)
                yield chunk

    def write(self, name: str, chunks: Iterable[bytes], size: int) -> None:
        """Writes a file of `size` bytes; where that fails, part of it may stay."""
        path, part = self._path(name), max(PART_BYTES, -(-size // MAX_PARTS // CHUNK_BYTES) * CHUNK_BYTES)
        if self.is_local:
            os.makedirs(os.path.dirname(path), exist_ok=True)
        with self.fs.open(path, "wb", block_size=part) as file:
            for chunk in chunks:
                file.write(chunk)
                self.moved += len(chunk)

    def sha256(self, name: str) -> str:
        """Of what is there now, read from its beginning to its end."""
        digest = hashlib.sha256()
        for chunk in self.chunks(name):
            digest.update(chunk)
        return digest.hexdigest()

    def remove(self, names: Iterable[str]) -> None:
        """Removes files, in this order, and folders that this leaves empty."""
        for name in names:
            with suppress(FileNotFoundError):
                self.fs.rm_file(self._path(name))
            folder = os.path.dirname(name)
            while self.is_local and folder:
                with suppress(OSError):
                    os.rmdir(self._path(folder))
                folder = os.path.dirname(folder)

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}"


def in_time(action: Callable[[], T]) -> T:
    """What `action` returns or raises; raises TimeoutError after PATIENCE_SECONDS, and leaves it to itself."""
    results: list[T] = []
    errors: list[BaseException] = []

    def act() -> None:
        try:
            results.append(action())
        except BaseException as error:  # it is raised below, in the thread that waits
            errors.append(error)

    thread = threading.Thread(target=act, name="mirror", daemon=True)
    thread.start()
    thread.join(PATIENCE_SECONDS)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no answer within {PATIENCE_SECONDS:g} s")
    return results[0]


def reason_of(error: BaseException) -> str:
    """What an error of a store says, in one line without secrets."""
    return f"{type(error).__name__}: {first_line(error)}"
