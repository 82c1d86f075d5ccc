"""Which machine a process is on, as far as processes see one another there."""

import hashlib
import os
from pathlib import Path


def machine_number(is_whole: bool = False) -> int:
    """60 bits that processes have in common where /proc shows them one another: of one boot and one PID namespace.

    Of all containers of a machine, if `is_whole`. Raises OSError where /proc does not tell.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")  # another on each machine
    container = 0 if is_whole else os.stat("/proc/self/ns/pid").st_ino  # a machine may run several
    return int(hashlib.sha256(f"{boot} {container}".encode()).hexdigest()[:15], 16)
