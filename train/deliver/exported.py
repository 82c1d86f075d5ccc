"""receipts.json: of which adapter an exported folder is, and how its files differ from what was trained."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.deliver.finished import FinishedRun
from train.run.exits import ExitCode, ExitWith
from train.run.folder import read_object

RECEIPTS = "receipts.json"
TRAINED, FILES = "adapter_sha256", "files"


def write_receipts(folder: Path, run: FinishedRun, receipts: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes the receipts of files by their names, and the adapter that all of the folder is made of."""
    record = {TRAINED: run.adapter_sha256, FILES: receipts}
    (folder / RECEIPTS).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def check_is_of(folder: Path, run: FinishedRun) -> None:
    """Raises ExitWith(BAD_INPUT) unless the export in `folder` is of the adapter that is in the run's final/."""
    if read_object(folder / RECEIPTS).get(TRAINED) != run.adapter_sha256:
        reason = "it was not exported from the adapter that is in final/ now"
        raise ExitWith(ExitCode.BAD_INPUT, f"{folder}: {reason}; export again: --format and --overwrite")


def receipts_of(folder: Path) -> dict[str, dict[str, Any]]:
    """The receipts of an export's files, by their names."""
    return dict(read_object(folder / RECEIPTS)[FILES])
