"""Exit codes, and the exception that ends a run with one."""

from enum import IntEnum


class ExitCode(IntEnum):
    """Process exit codes; 70, 75 and 78 are those of sysexits.h (software, temporary, configuration), others ours."""

    FINISHED = 0
    DEFECT = 70  # of Handloop: something that nobody foresaw; checkpoints stand
    INTERRUPTED = 75  # a checkpoint is durable: run the same command again
    SAVE_FAILED = 76  # the last save failed; older checkpoints, if any, are intact
    FINGERPRINT_MISMATCH = 77  # the checkpoint belongs to another model, recipe or data set
    BAD_INPUT = 78  # configuration, data or the machine
    NON_FINITE = 79  # loss or gradient is not a finite number
    NO_VALID_CHECKPOINT = 80  # there are checkpoints, or were, and none passes verification
    PEER_FAILURE = 81  # another process died or hangs
    DELIVERY_FAILED = 82  # training is finished and final/ complete; what comes after it is not
    KILLED = 83  # from outside, as the kernel does when memory is short; the launcher says it
    UNLIKE = 84  # a merged or exported model differs too much from what was trained; it was not kept


class ExitWith(Exception):
    """Ends the run with `code`; `reason` is printed for the user, `facts` are further fields of the records."""

    def __init__(self, code: ExitCode, reason: str, **facts: float | str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason
        self.facts = facts


class OwnEnd(ExitWith):
    """Ends this process, which alone knows why: the others only find it gone."""


class OutOfMemory(OwnEnd):
    """The same where memory was not enough."""

    def __init__(self, reason: str) -> None:
        super().__init__(ExitCode.BAD_INPUT, reason)
