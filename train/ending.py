"""How a run ends: whatever happened becomes an exit code, exit.json and one message."""

import errno
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch

from data_tools.report import DataError
from train.config import Config
from train.engine.copies import HostMemoryError
from train.run.attempts import AttemptLog
from train.run.defects import Doing, print_defect, report_defect
from train.run.devices import out_of_memory_line
from train.run.environment import is_first_process
from train.run.exits import ExitCode, ExitWith, OutOfMemory, OwnEnd
from train.run.folder import RunFolder, read_object
from train.run.last_words import is_recorder
from train.run.processes import BY_THE_FIRST, STARTED, advice_to_repeat, peer_failure
from train.run.redact import redact

SECONDS_TO_SAY = 3.0  # for which a process waits for the first one to end as it does itself
EARLY = "finished early: "  # begins the reason of a run that ended well before its last step
# what a machine refuses, whoever asks
REFUSED_BY_THE_MACHINE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE),
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM),
)


def end_of(run: Callable[[], str], config: Config, doing: Doing, argv: Sequence[str]) -> ExitWith:
    """Runs the job and returns how it ended; what nobody foresaw is a defect, with a report in the run folder.

    `run` returns why the run ended before its last step, or nothing.
    """
    try:
        early = run()
    except ExitWith as end:
        return _own(end, config)
    except (Exception, SystemExit) as error:  # a library's exit would be one without a reason
        end = _foreseen(error, config, doing)
        return _own(end, config) if end else _defect(error, config, doing, argv)
    return ExitWith(ExitCode.FINISHED, f"{EARLY}{early}" if early else "finished")


def _own(end: ExitWith, config: Config) -> ExitWith:
    """The end of this process; an OwnEnd where it is not the first, which does not end so as well.

    Data or files that only this process cannot read would else be told by nobody. The first one says what all find.
    """
    may_be_own = end.code == ExitCode.BAD_INPUT and end.reason != BY_THE_FIRST  # to others all come together
    if is_first_process() or isinstance(end, OwnEnd) or not may_be_own or _is_said_by_first(config):
        return end
    return OwnEnd(end.code, f"process {os.environ['RANK']}: {end.reason}", **end.facts)


def _is_said_by_first(config: Config) -> bool:
    """Whether the first process has ended for a reason of its own as well, or does so now."""
    record, until = RunFolder.of(config).exit, time.monotonic() + SECONDS_TO_SAY
    while time.monotonic() < until:
        with suppress(OSError):
            is_of_this_start = record.stat().st_mtime > STARTED
            if is_of_this_start and read_object(record).get("code") not in (None, ExitCode.PEER_FAILURE):
                return True
        time.sleep(0.05)
    return False


def record_end(end: ExitWith, doing: Doing, folder: RunFolder, log: AttemptLog) -> None:
    """Writes exit.json and the line of the end in attempts.jsonl, if that is for this process to do."""
    # without a group this is another job's folder, for all that a process knows that is not the first
    is_known = is_first_process() or end.code == ExitCode.DEFECT or torch.distributed.is_initialized()
    if is_known and is_recorder(end, folder.exit):
        facts = {} if end.code == ExitCode.FINISHED else {"doing": doing.now}
        with suppress(OSError):  # a disk so full that not even this fits
            folder.write_exit(end.code, redact(end.reason), **facts, **end.facts)
        log.end(end.code, end.reason, **facts, **end.facts)


def unrecorded_defect(error: Exception, doing: Doing, argv: Sequence[str]) -> ExitWith:
    """The end by a defect where no run folder is at hand: the report goes to stderr."""
    return ExitWith(ExitCode.DEFECT, print_defect(error, doing.now, argv))


def _foreseen(error: BaseException, config: Config, doing: Doing) -> ExitWith | None:
    """The end that an exception of the data, the machine or the other processes means; None for any other."""
    if isinstance(error, DataError):
        return ExitWith(ExitCode.BAD_INPUT, str(error))
    if isinstance(error, torch.OutOfMemoryError):
        advice = "lower --batch.per_device (and raise --batch.accumulation), or --data.max_length"
        return _out_of_memory(f"out of memory: {str(error).splitlines()[0]}\n{advice}")
    if isinstance(error, HostMemoryError | MemoryError):  # whose text may repeat CUDA's own
        advice = "free host memory, raise what the container or WSL may take, or give --engine.kind reference"
        return _out_of_memory(f"{str(error) or 'out of host memory'}\n{advice}")
    if isinstance(error, RuntimeError) and (line := out_of_memory_line(error)):
        less = "--memory.budget, which leaves more to what allocates beside torch, as NCCL and cuBLAS do"
        return _out_of_memory(
            f"out of memory: {line}\nlower --batch.per_device (and raise --batch.accumulation), or {less}"
        )
    if isinstance(error, RuntimeError) and (silent := peer_failure(config, error)):
        reason = f"{silent}\n{RunFolder.of(config).standing}: {advice_to_repeat(config)}"
        return ExitWith(ExitCode.PEER_FAILURE, reason)
    if isinstance(error, OSError) and error.errno in REFUSED_BY_THE_MACHINE:
        reason = f"while {doing.now}: {error}\nmake room or give the rights, then {advice_to_repeat(config)}"
        return ExitWith(ExitCode.BAD_INPUT, reason)
    return None


def _defect(error: BaseException, config: Config, doing: Doing, argv: Sequence[str]) -> ExitWith:
    known = report_defect(RunFolder.of(config).defect, error, doing.now, argv)
    return ExitWith(ExitCode.DEFECT, f"{known}\nwhat is saved stands: {advice_to_repeat(config)}")


def _out_of_memory(reason: str) -> OutOfMemory:
    return OutOfMemory(reason if is_first_process() else f"process {os.environ['RANK']}: {reason}")
