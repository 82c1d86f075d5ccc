"""Which machine a process is on, as far as processes see one another there."""

import hashlib
import os
from pathlib import Path


def machine_number() -> int:
    """60 bits that processes have in common where /proc shows them one another: of one boot and one PID namespace.

    Raises OSError where /proc does not tell.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")  # another on each machine
    containers = os.stat("/proc/self/ns/pid").st_ino  # a machine may run several
    return int(hashlib.sha256(f"{boot} {containers}".encode()).hexdigest()[:15], 16)
