"""What is copied to a mirror: the files of one checkpoint, and of the run up to that step, held open.

Open files keep their content while the run goes on: a checkpoint that is removed here meanwhile can still be read.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from train.checkpoints.contents import CONTENTS, MANIFEST, STATE
from train.checkpoints.remote import CHUNK_BYTES
from train.run.folder import RunFolder

CHECKPOINT, RUN = "checkpoint", "run"
RECORDS = tuple(path.name for path in RunFolder(Path()).carried)


class ChangedFileError(OSError):
    """A file here is not what the checkpoint's manifest says."""


@dataclass
class Part:
    """The first `size` bytes of an open file."""

    name: str
    descriptor: int
    size: int
    wanted: str = ""  # its sha256, where that is known
    sent: int = 0  # bytes, for whoever asks how far it is
    hashed: "hashlib._Hash" = field(default_factory=hashlib.sha256)

    def chunks(self) -> Iterator[bytes]:
        """The content, from its beginning."""
        self.sent, self.hashed = 0, hashlib.sha256()
        while self.sent < self.size:
            chunk = os.pread(self.descriptor, min(CHUNK_BYTES, self.size - self.sent), self.sent)
            if not chunk:
                raise ChangedFileError(f"{self.name} is shorter than it was")
            self.hashed.update(chunk)
            self.sent += len(chunk)
            yield chunk

    def digest(self) -> str:
        """The sha256 of what was read; raises ChangedFileError where it is not what it should be."""
        found = self.hashed.hexdigest()
        if self.wanted and found != self.wanted:
            raise ChangedFileError(f"{self.name} here is not what the checkpoint's manifest says")
        return found


@dataclass
class Source:
    """A checkpoint of this machine, and the records of its run."""

    step: int
    run_uid: str
    mark: str  # the first eight digits of its manifest's sha256
    parts: dict[str, Part]

    @classmethod
    def of(cls, checkpoint: Path, folder: RunFolder) -> "Source":
        """Opens all of it; raises OSError or one of UNREADABLE."""
        content = (checkpoint / MANIFEST).read_bytes()
        manifest, state = json.loads(content), json.loads((checkpoint / STATE).read_bytes())
        source = cls(manifest["step"], manifest["run_uid"], mark_of(checkpoint), {})
        limits = {folder.metrics: state["metrics_bytes"], folder.validation_answers: state.get("answers_bytes", 0)}
        try:
            for name in (*CONTENTS, MANIFEST):
                wanted = manifest["files"][name]["sha256"] if name in CONTENTS else hashlib.sha256(content).hexdigest()
                source._open(f"{CHECKPOINT}/{name}", checkpoint / name, wanted)
            for name in RECORDS:
                path = folder.path / name
                if path.exists():
                    source._open(f"{RUN}/{name}", path, limit=limits.get(path))
        except BaseException:
            source.close()
            raise
        return source

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(part.size for part in self.parts.values())

    @property
    def sent(self) -> int:
        """Bytes that were read so far."""
        return sum(part.sent for part in self.parts.values())

    def close(self) -> None:
        """Closes the files."""
        for part in self.parts.values():
            os.close(part.descriptor)
        self.parts = {}

    def _open(self, name: str, path: Path, wanted: str = "", limit: int | None = None) -> None:
        descriptor = os.open(path, os.O_RDONLY)
        size = os.fstat(descriptor).st_size
        self.parts[name] = Part(name, descriptor, size if limit is None else min(size, limit), wanted)


def mark_of(checkpoint: Path) -> str:
    """The first eight digits of the sha256 of a checkpoint's manifest; raises OSError."""
    return hashlib.sha256((checkpoint / MANIFEST).read_bytes()).hexdigest()[:8]
