"""Records of Weights & Biases in a run folder: what they hold, and which of them is to be uploaded."""

import json
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.run.exits import ExitCode, ExitWith
from train.run.folder import RunFolder

OFFLINE_RECORDS = "offline-run-*"  # folders in RunFolder.wandb
ONLINE_RECORDS = "run-*"  # the same of attempts that were online
SUPERSEDED = "superseded"  # where `wandb sync` does not look
START = b":W&B"  # of a .wandb file
BLOCK, HEADER, FIRST_BLOCK_STARTS = 32768, 7, 7  # of LevelDB's log format, in which it is written


@dataclass(frozen=True)
class Record:
    """The record of a run that is to be uploaded."""

    folder: Path
    file: Path

    @property
    def is_uploaded(self) -> bool:
        """Whether `wandb sync` has left its mark beside it."""
        return is_uploaded(self.file)


def record_of(run: RunFolder) -> Record:
    """The record that has the most of a run; raises ExitWith(BAD_INPUT) where there is none, or the run goes on.

    Each attempt's record has all steps that were not uploaded when it began, and sets earlier ones aside, unless the
    attempt was killed too soon.
    """
    if not run.path.is_dir():
        raise ExitWith(ExitCode.BAD_INPUT, f"{run.path}: there is no such folder; name a run folder, such as runs/demo")
    found = sorted(run.wandb.glob(f"{OFFLINE_RECORDS}/run-*.wandb"))
    if not found:
        reason = "it has no offline record of Weights & Biases: it was recorded online, or with --track.wandb off"
        raise ExitWith(ExitCode.BAD_INPUT, f"{run.path}: {reason}, or it is no run folder")
    if run.is_in_use():
        raise ExitWith(ExitCode.BAD_INPUT, f"{run.path}: the run goes on; upload its record when it has ended")
    try:
        file = max(found, key=last_step_in)
        with file.open("rb") as opened:
            is_record = opened.read(len(START)) == START
    except OSError as error:
        raise ExitWith(ExitCode.BAD_INPUT, f"{run.path}: {error}") from None
    if not is_record:
        raise ExitWith(ExitCode.BAD_INPUT, f"{file}: it is no record of Weights & Biases; {run.metrics} has all steps")
    if not is_uploaded(file) and max(last_step_in(file), last_uploaded_step(run)) < 0:
        reason = f"{file}: it has no step, because the run ended before it had begun; {run.metrics} has all steps"
        raise ExitWith(ExitCode.BAD_INPUT, reason)
    return Record(file.parent, file)


def is_uploaded(file: Path) -> bool:
    """Whether `wandb sync` has left its mark beside a .wandb file."""
    return file.with_name(f"{file.name}.synced").exists()


def last_uploaded_step(run: RunFolder) -> int:
    """The last step in the offline records that are uploaded; -1 where there is none. Raises OSError."""
    places = (OFFLINE_RECORDS, f"{SUPERSEDED}/{OFFLINE_RECORDS}")
    files = [file for place in places for file in run.wandb.glob(f"{place}/run-*.wandb") if is_uploaded(file)]
    return max(map(last_step_in, files), default=-1)


def last_online_step(run: RunFolder) -> int:
    """The last step that an attempt gave to a server, whether it arrived or not; -1 where there is none."""
    return max(map(last_step_in, run.wandb.glob(f"{ONLINE_RECORDS}/run-*.wandb")), default=-1)


def last_step_in(file: Path) -> int:
    """The last step in a .wandb file; -1 where it has none. Raises OSError."""
    last = -1
    for record in records(file):
        if record.WhichOneof("record_type") == "history":
            steps = [
                item.value_json for item in record.history.item if (item.key or "/".join(item.nested_key)) == "step"
            ]
            with suppress(ValueError, TypeError):
                last = max([last, *(int(json.loads(step)) for step in steps)])
    return last


def records(file: Path) -> Iterator[Any]:
    """The records of a .wandb file, up to where a killed process stopped, as wandb's messages. Raises OSError."""
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2

    messages: Any = wandb_internal_pb2  # its classes are made at import
    data = file.read_bytes()
    position, whole = FIRST_BLOCK_STARTS, b""
    while position + HEADER <= len(data):
        left = BLOCK - position % BLOCK
        if left < HEADER:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)  # checksum, bytes, full/first/middle/last
        part = data[position + HEADER : position + HEADER + length]
        if kind == 0 or len(part) < length:
            return
        position += HEADER + length
        whole = part if kind in (1, 2) else whole + part
        if kind in (1, 4):
            try:
                yield messages.Record.FromString(whole)
            except DecodeError:  # no record, or a damaged one
                return
