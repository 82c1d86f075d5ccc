"""Streams of a process whose reader, disk or terminal is gone."""

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT

GUARD = "import os, sys\nfrom train.run.streams import guard_streams\nguard_streams()\n"


def started(code: str, **options: object) -> subprocess.Popen:
    """A process that guards its streams and runs `code`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii:strict"}
    return subprocess.Popen([sys.executable, "-c", GUARD + code], env=environment, **options)  # type: ignore


def test_a_reader_that_is_gone() -> None:
    """Printing to a closed pipe goes on, also by rich and at the end; afterwards the descriptor itself is quiet."""
    code = (
        "sys.stdin.read(1)\n"
        "from rich.console import Console\n"
        "for stream in (sys.stdout, sys.stderr):\n"
        "    print('a' * 100_000, file=stream, flush=True)\n"
        "    Console(file=stream).print('b')\n"
        "    os.write(stream.fileno(), b'from C code')\n"  # would raise BrokenPipeError
        "print('left in the buffer')\n"
        "sys.exit(7)\n"
    )
    process = started(code, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin
    assert process.stdout
    assert process.stderr
    process.stdout.close()
    process.stderr.close()
    process.stdin.write(b"x")
    process.stdin.close()
    assert process.wait(60) == 7


def test_a_full_disk_and_one_that_has_room_again(tmp_path: Path) -> None:
    """What /dev/full refuses is lost; the descriptor still leads there."""
    code = "print('lost', flush=True)\nprint(os.readlink('/proc/self/fd/1'), file=sys.stderr)\n"
    with open("/dev/full", "w") as full:
        process = started(code, stdout=full, stderr=subprocess.PIPE)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, b"/dev/full\n")


def test_characters_that_the_terminal_does_not_have() -> None:
    """An encoding without them gets escapes instead of an exception."""
    process = started("print('5 µm', '→', '\\udc80', flush=True)", stdout=subprocess.PIPE)
    assert process.communicate(timeout=60)[0] == b"5 \\xb5m \\u2192 \\udc80\n"


def test_closed_descriptors_are_given_to_no_file(tmp_path: Path) -> None:
    """Started with stdout and stderr closed: the next file to be opened does not receive what is printed."""
    path = tmp_path / "file"
    code = f"file = open({str(path)!r}, 'w')\nprint('x', flush=True)\nos.write(2, b'y')\nfile.close()\n"
    command = 'exec "$0" -c "$1" >&- 2>&-'
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", command, sys.executable, GUARD + code], env=environment, timeout=60)
    assert done.returncode == 0
    assert path.read_bytes() == b""


def test_a_pipe_that_nobody_empties(tmp_path: Path) -> None:
    """A pipe that does not block and is full costs text, and no exception."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    code = "import train.run.streams as s\ns.SECONDS_FOR_A_READER = 0.1\nprint('a' * 1_000_000, flush=True)\n"
    process = started(code, stdout=writing, stderr=subprocess.PIPE)
    _, errors = process.communicate(timeout=60)
    os.close(reading)
    os.close(writing)
    assert (process.returncode, errors) == (0, b"")
