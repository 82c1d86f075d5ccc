"""Which process is named first where one is lost."""

import os
import subprocess
import sys
import time
from pathlib import Path

from train.run.heartbeats import heard_of, read_beats, write_beat

WRITE = "import sys; from pathlib import Path; from train.run.heartbeats import write_beat; "
WRITE += "write_beat(Path(sys.argv[1]), int(sys.argv[2]), 7, 1, gave_up=sys.argv[3] == 'gave up')"


def test_one_that_has_ended_is_named_before_those_that_gave_up(tmp_path: Path) -> None:
    """Though it was as far as they, and further than one that is alive."""
    write_beat(tmp_path, 0, 6, 0)
    for rank, how in ((1, "gave up"), (2, "was killed"), (3, "gave up")):
        subprocess.run([sys.executable, "-c", WRITE, str(tmp_path), str(rank), how], check=True)
    now = time.time() - 0.2
    for rank in range(4):  # the processes above took their time
        os.utime(tmp_path / f"{rank}", (now, now + rank / 1000))
    beats = read_beats(tmp_path)
    assert [beat.rank for beat in beats] == ["2", "0", "1", "3"]
    assert heard_of(beats).startswith(
        "last heard of: process 2: step 7, 0 s ago (has ended); process 0: step 6, 0 s ago;"
    )
