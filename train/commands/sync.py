"""`handloop sync`: uploads to Weights & Biases what runs have recorded offline."""

import os
import subprocess
import sys
from pathlib import Path

from data_tools.terminal import typed_path
from train.commands.options import Options, print_document, say
from train.run.exits import ExitCode, ExitWith
from train.run.folder import RunFolder
from train.run.redact import redact
from train.track import wandb_settings
from train.track.offline_records import Record, last_step_in, record_of


def main(words: list[str]) -> int:
    """Uploads each run's record that is not uploaded yet; raises ExitWith(BAD_INPUT) before the first if one cannot."""
    own = Options("sync", "Uploads what runs have recorded offline to Weights & Biases.")
    own.usage = "handloop sync RUN [RUN ...] [--dry-run] [--json]"
    own.epilog = "RUN is a run folder, such as runs/demo. The key is that of `wandb login`, or WANDB_API_KEY."
    own.add_argument("runs", nargs="+", type=typed_path, metavar="RUN", help="a run folder, such as runs/demo")
    own.add_argument("--dry-run", action="store_true", help="say what would be uploaded, and upload nothing")
    own.add_argument("--json", action="store_true", help="print what was done with each run as JSON")
    options = own.parse_args(words)
    records = {path: record_of(RunFolder(path)) for path in map(Path, options.runs)}
    if not options.dry_run and not wandb_settings.has_key():
        reason = "there is no key for Weights & Biases: run `wandb login`, or set WANDB_API_KEY"
        raise ExitWith(ExitCode.BAD_INPUT, reason)
    done = []
    for run, record in records.items():
        last_step = last_step_in(record.file)
        state = "uploaded already" if record.is_uploaded else "would upload" if options.dry_run else "uploaded"
        if state == "uploaded":
            upload(record)
        done.append({"run": str(run), "state": state, "record": record.folder.name, "last_step": last_step})
        if not options.json:
            print(f"{run}: {state} {record.folder.name}, steps up to {last_step}", flush=True)
    if options.json:
        print_document(done)
    return 0


def upload(record: Record) -> None:
    """Runs `wandb sync`; raises ExitWith(BAD_INPUT) with what it says where the record is not marked as uploaded."""
    variables = {name: value for name, value in os.environ.items() if name not in wandb_settings.OF_A_RUN}
    command = [sys.executable, *wandb_settings.SYNC, str(record.folder)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, errors="replace")
    if done.returncode or not record.is_uploaded:
        said = redact(f"{done.stdout}\n{done.stderr}".strip())[-2000:]
        reason = f"{record.folder} could not be uploaded; it stays, so try again:\n{said or 'wandb sync said nothing'}"
        raise ExitWith(ExitCode.BAD_INPUT, reason)
    say(redact(done.stdout.strip()))
