"""Files that may be compressed, by their names; one that is damaged or cut raises, and never ends in silence."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow

CHUNK_BYTES = 2**16

# What the decompressors raise for a damaged or cut file.
DAMAGE = (gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError, pyarrow.ArrowException)
COMPRESSIONS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": lambda path: io.BufferedReader(_Streams(path, bz2.BZ2Decompressor)),
    ".xz": lambda path: io.BufferedReader(_Streams(path, lzma.LZMADecompressor)),
    ".zst": lambda path: io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd")),
    ".lz4": lambda path: io.BufferedReader(pyarrow.input_stream(str(path), compression="lz4")),
}


class _Streams(io.RawIOBase):
    """One or more compressed streams behind one another; Python's own files end in silence at one that is damaged."""

    def __init__(self, path: Path, make: Callable[[], Any]) -> None:
        self.file, self.make, self.decompressor = path.open("rb"), make, make()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Up to len(buffer) bytes; raises OSError or LZMAError for what is no stream, EOFError for one that is cut."""
        while True:
            packed = b""
            if self.decompressor.eof:
                packed = self.decompressor.unused_data.lstrip(b"\0") or self.file.read(CHUNK_BYTES).lstrip(b"\0")
                if not packed:
                    return 0
                self.decompressor = self.make()
            elif self.decompressor.needs_input and not (packed := self.file.read(CHUNK_BYTES)):
                raise EOFError("the compressed stream is cut")
            if found := self.decompressor.decompress(packed, len(buffer)):
                buffer[: len(found)] = found
                return len(found)

    def close(self) -> None:
        self.file.close()
        super().close()


def kind_of(path: Path) -> str:
    """The extension that says how a file is read, in lower case: `.jsonl` also of rows.jsonl.gz."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    is_compressed = len(suffixes) == 2 and suffixes[1] in COMPRESSIONS and suffixes[0] != ".parquet"
    return suffixes[0] if is_compressed else path.suffix.lower()


def open_bytes(path: Path) -> io.BufferedReader | gzip.GzipFile:
    """The file's content, decompressed as its name says."""
    opener = COMPRESSIONS.get(path.suffix.lower())
    return opener(path) if opener else path.open("rb")
