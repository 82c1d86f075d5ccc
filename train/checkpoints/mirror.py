"""Checkpoints at another place, for machines that vanish: whole there, or not counted.

A copy is a folder RUN_UID/step-NNNNNNNNNN-XXXXXXXX below the mirror's URL: the checkpoint as it is here in checkpoint/,
the run's records up to that step in run/, and complete.json, which is written last, after all else was read back, with
the size and sha256 of each file. XXXXXXXX begins the sha256 of the checkpoint's manifest, so that another content has
another folder, and nothing that is whole is ever written over. A folder without its complete.json, or that does not
agree with it, is passed over.
"""

import hashlib
import json
import re
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from train.checkpoints.contents import CONTENTS, MANIFEST, MAX_JSON_BYTES, UNREADABLE, step_folder
from train.checkpoints.remote import OPTION, Remote, in_time, reason_of
from train.checkpoints.source import CHECKPOINT, RECORDS, RUN, Source
from train.config import Config
from train.run.durable import sync
from train.run.exits import ExitCode, ExitWith
from train.run.folder import RUN_UID, START_DATE, RunFolder, read_object

COMPLETE = "complete.json"
FORMAT_VERSION = 1
FOLDER = re.compile(r"([\w-]+)/step-(\d{10})-([0-9a-f]{8})/(.+)")
# what may be in a copy: no other name of a record is ever looked at
EXPECTED = {f"{CHECKPOINT}/{name}" for name in (*CONTENTS, MANIFEST)} | {f"{RUN}/{name}" for name in RECORDS}


class DamagedCopyError(ValueError):
    """A file at the mirror is not what its record says."""


@dataclass(frozen=True)
class Copy:
    """A whole copy at the mirror, by its record and the sizes that are listed."""

    folder: str  # below the URL
    run_uid: str
    step: int
    time: str  # UTC
    files: Mapping[str, Mapping[str, Any]]  # bytes and sha256 of each

    @property
    def num_bytes(self) -> int:
        """Of all its files."""
        return sum(file["bytes"] for file in self.files.values())


class Mirror:
    """What is at one URL; methods raise what the library for it raises."""

    def __init__(self, remote: Remote) -> None:
        self.remote = remote
        self.damaged: set[str] = set()  # folders that were fetched and were not what they should be

    @property
    def url(self) -> str:
        """Where it is."""
        return self.remote.url

    def copies(self) -> list[Copy]:
        """The whole ones, of all runs, the highest step first."""
        found = []
        for folder, sizes in self._listed().items():
            with suppress(FileNotFoundError, *UNREADABLE):
                if COMPLETE in sizes and folder not in self.damaged:
                    copy = _understood(folder, self.remote.read(f"{folder}/{COMPLETE}", MAX_JSON_BYTES))
                    if all(sizes.get(name) == file["bytes"] for name, file in copy.files.items()):
                        found.append(copy)
        return sorted(found, key=lambda copy: (copy.step, copy.time), reverse=True)

    def check(self) -> None:
        """Writes a file, reads it and removes it; raises ExitWith(BAD_INPUT) where that is not possible."""
        content = datetime.now(UTC).isoformat().encode()

        probe = f"probe-{uuid.uuid4().hex[:8]}"  # of its own, because two runs may start at a time

        def try_out() -> None:
            self.remote.write(probe, [content], len(content))
            if self.remote.read(probe, len(content)) != content:
                raise OSError("what was written does not read back")
            self.remote.remove([probe])

        try:
            in_time(try_out)
        except Exception as error:
            raise unusable(self.url, error) from None

    def put(self, source: Source) -> bool:
        """Copies a checkpoint: data, read back and compared, then the record, which is read back likewise.

        One that is whole there already is left as it is; returns whether it was not. What has failed is taken away, as
        far as that is possible: a bucket that is full would fill with halves.
        """
        folder = f"{source.run_uid}/{step_folder(source.step)}-{source.mark}"
        if any(copy.folder == folder for copy in self.copies()):
            return False
        try:
            self.remote.remove([f"{folder}/{COMPLETE}"] if folder in self.damaged else [])
            self._send(source, folder)
        except Exception:
            with suppress(Exception):
                self.remote.remove(f"{folder}/{name}" for name in (COMPLETE, *source.parts))
            raise
        self.damaged.discard(folder)
        return True

    def _send(self, source: Source, folder: str) -> None:
        files = {}
        for name, part in source.parts.items():
            self.remote.write(f"{folder}/{name}", part.chunks(), part.size)
            files[name] = {"bytes": part.size, "sha256": part.digest()}
        for name, file in files.items():
            if self.remote.sha256(f"{folder}/{name}") != file["sha256"]:
                raise DamagedCopyError(f"{name} does not read back as it was sent")
        record = _record(source, files)
        self.remote.write(f"{folder}/{COMPLETE}", [record], len(record))
        if self.remote.read(f"{folder}/{COMPLETE}", MAX_JSON_BYTES) != record:
            raise DamagedCopyError(f"{COMPLETE} does not read back as it was sent")

    def prune(self, run_uid: str, keep: int, best: int) -> None:
        """Removes all of a run but the newest `keep` whole copies and that of step `best`; each record goes first.

        Of each step the later copy stays. What was never finished goes as well, up to the newest whole step.
        """
        own = [copy for copy in self.copies() if copy.run_uid == run_uid]
        by_step = {copy.step: copy for copy in reversed(own)}
        steps = sorted(by_step, reverse=True)
        stay = {by_step[step].folder for step in [*steps[:keep], best] if step in by_step}
        for folder, sizes in self._listed().items():
            uid, step = _place(folder)
            if uid == run_uid and steps and step <= steps[0] and folder not in stay:
                names = sorted(sizes, key=lambda name: name != COMPLETE)
                self.remote.remove(f"{folder}/{name}" for name in names)

    def withdraw(self, run_uid: str, after: int) -> None:
        """Takes the records of a run's later copies away: it goes on from an earlier step that the user has chosen."""
        for copy in self.copies():
            if copy.run_uid == run_uid and copy.step > after:
                self.remote.remove([f"{copy.folder}/{COMPLETE}"])

    def fetch(self, copy: Copy, name: str, target: Path) -> None:
        """Writes a file of a copy here, durably; raises DamagedCopyError where it is not what the record says."""
        wanted, digest, size = copy.files[name], hashlib.sha256(), 0
        with target.open("wb") as file:
            for chunk in self.remote.chunks(f"{copy.folder}/{name}"):
                digest.update(chunk)
                size += len(chunk)
                if size > wanted["bytes"]:
                    break
                file.write(chunk)
        if (size, digest.hexdigest()) != (wanted["bytes"], wanted["sha256"]):
            self.damaged.add(copy.folder)
            raise DamagedCopyError(f"{name} is damaged")
        sync(target)

    def _listed(self) -> dict[str, dict[str, int]]:
        """Folder -> the sizes of its files by name, whole or not."""
        folders: dict[str, dict[str, int]] = {}
        for name, size in self.remote.sizes().items():
            if found := FOLDER.fullmatch(name):
                folder = name.removesuffix(f"/{found[4]}")
                folders.setdefault(folder, {})[found[4]] = size
        return folders


def mirror_of(config: Config) -> Mirror | None:
    """The mirror that the configuration names, asked whether it answers; None where it names none.

    Raises ExitWith(BAD_INPUT) where it cannot be used: a missing package, wrong credentials, no such bucket, silence.
    """
    url = config.checkpoint.mirror
    if not url:
        return None
    try:
        mirror = Mirror(Remote(url))
        in_time(lambda: _look(mirror))
    except ExitWith:
        raise
    except Exception as error:
        raise unusable(url, error) from None
    return mirror


def unusable(url: str, error: Exception) -> ExitWith:
    """The refusal of a mirror at the start."""
    return ExitWith(
        ExitCode.BAD_INPUT,
        f"{OPTION} {url} cannot be used: {reason_of(error)}\n"
        "look at the name, the credentials (the environment, or the cloud's own files) and the line, or leave it out",
    )


def copies_to_resume(mirror: Mirror, run_uid: str) -> list[Copy]:
    """The copies of a run, the highest step first; where it is not known yet, of the run that was copied last."""
    copies = mirror.copies()
    if not run_uid and copies:
        run_uid = max(copies, key=lambda copy: copy.time).run_uid
    return [copy for copy in copies if copy.run_uid == run_uid]


def start_date(mirror: Mirror | None, folder: RunFolder, resume: str) -> date:
    """The day on which the run was started: as the run folder has it, else as the mirror has it."""
    known = read_object(folder.identity)
    if mirror is None or START_DATE in known or resume not in ("auto", "must"):
        return folder.start_date(resume)

    def look() -> date:
        for copy in copies_to_resume(mirror, str(known.get(RUN_UID, "")))[:1]:
            content = mirror.remote.read(f"{copy.folder}/{RUN}/{folder.identity.name}", MAX_JSON_BYTES)
            with suppress(*UNREADABLE):
                return date.fromisoformat(json.loads(content)[START_DATE])
        return date.today()

    try:
        return in_time(look)
    except Exception as error:
        raise unusable(mirror.url, error) from None


def _look(mirror: Mirror) -> None:
    """Raises what the place raises when it is listed, and FileNotFoundError where nobody can have meant it."""
    remote = mirror.remote
    if remote.is_local and not Path(remote.root).parent.is_dir():
        reason = (
            f"there is no folder {Path(remote.root).parent}; is the disk mounted? Make the folder where it should be"
        )
        raise FileNotFoundError(reason)
    remote.sizes()


def _place(folder: str) -> tuple[str, int]:
    """Run and step of a folder."""
    found = FOLDER.fullmatch(f"{folder}/x")
    assert found is not None
    return found[1], int(found[2])


def _record(source: Source, files: Mapping[str, Mapping[str, Any]]) -> bytes:
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    about = {"format_version": FORMAT_VERSION, "run_uid": source.run_uid, "step": source.step, "time": now}
    return _sealed({**about, "files": files})


def _sealed(record: Mapping[str, Any]) -> bytes:
    """A record with a hash of its own."""
    content = json.dumps(record, sort_keys=True, indent=1).encode()
    return json.dumps(
        {**record, "record_sha256": hashlib.sha256(content).hexdigest()}, sort_keys=True, indent=1
    ).encode()


def _understood(folder: str, content: bytes) -> Copy:
    """The copy that a record describes; raises one of UNREADABLE for any other content."""
    record = json.loads(content)
    record.pop("record_sha256")
    uid, step = _place(folder)
    files = record["files"]
    checkpoint = {name for name in EXPECTED if name.startswith(CHECKPOINT)}
    is_ours = record["format_version"] == FORMAT_VERSION and (record["run_uid"], record["step"]) == (uid, step)
    if content != _sealed(record) or not is_ours or not checkpoint <= set(files) <= EXPECTED:
        raise ValueError(f"{folder}/{COMPLETE} is damaged")
    return Copy(folder, uid, step, str(record["time"]), files)
