"""A trainer process without training: registers, says how far it is, and ends as its rank's behaviour says.

Started as `fake_trainer.py RUN_DIR TIMEOUT_SECONDS BEHAVIOUR ...`, it starts one process for each behaviour, as
accelerate would, and waits for all of them.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from train.run.attempts import AttemptLog
from train.run.exits import ExitCode, OwnEnd
from train.run.folder import RunFolder
from train.run.heartbeats import write_beat
from train.run.last_words import say_end
from train.run.signals import follow_launcher, leave_note, tell_doing, tell_launcher

NOTES = {
    "memory": (ExitCode.BAD_INPUT, "no memory left"),
    "lost one": (ExitCode.PEER_FAILURE, "another process died"),
}


def main() -> None:
    run_dir, timeout, *behaviours = sys.argv[1:]
    if "RANK" not in os.environ:
        started = [
            subprocess.Popen([sys.executable, *sys.argv], env={**os.environ, "RANK": str(rank)})
            for rank in range(len(behaviours))
        ]
        sys.exit(max(process.wait() != 0 for process in started))
    rank, folder = int(os.environ["RANK"]), RunFolder(Path(run_dir))
    follow_launcher()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    folder.heartbeats.mkdir(parents=True, exist_ok=True)
    if rank == 0 and behaviours[0] == "refused":  # another job has the folder
        leave_note(ExitCode.BAD_INPUT)
        (Path(os.environ["HANDLOOP_LAUNCHER"]) / "exit").write_text(str(int(ExitCode.BAD_INPUT)))
        sys.exit(ExitCode.BAD_INPUT)
    if rank == 0:
        AttemptLog(folder).begin({"profile": "demo", "run": {}}, {"engine": "", "summary": ""}, {"from_step": 0})
        tell_launcher(run_dir, float(timeout) / 60)
    tell_doing("loading")
    is_waiting = behaviours[rank] in ("wait", "watchdog", "stopped there")
    if behaviours[rank] != "unheard":
        write_beat(folder.heartbeats, rank, 3, int(is_waiting))
    if behaviours[rank] == "clock":  # the disk's machine has another time
        beat = folder.heartbeats / str(rank)
        write_beat(folder.heartbeats, rank, 3, 1)
        os.utime(beat, (beat.stat().st_mtime - 3600,) * 2)
    time.sleep(1)  # until all have registered
    behave(behaviours[rank], float(timeout))


def behave(behaviour: str, timeout: float) -> None:
    """Ends, or not."""
    if behaviour == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if behaviour.startswith("stopped"):
        os.kill(os.getpid(), signal.SIGSTOP)
    if behaviour == "crash":
        os.abort()
    if behaviour == "watchdog":  # as NCCL's
        time.sleep(timeout)
        os.abort()
    if behaviour == "alone":  # it cannot read its data, before there is a group
        say_end(OwnEnd(ExitCode.BAD_INPUT, "process 1: no such file"))
        sys.exit(ExitCode.BAD_INPUT)
    if behaviour in NOTES:
        leave_note(*NOTES[behaviour])
        sys.exit(NOTES[behaviour][0])
    if behaviour == "ctrl_c":  # the second one
        leave_note(128 + signal.SIGINT)
        os._exit(128 + signal.SIGINT)
    if behaviour == "exception":
        raise ImportError("no such module")
    if behaviour in ("fine", "clock"):
        leave_note(0)
        sys.exit(0)
    time.sleep(60)


if __name__ == "__main__":
    main()
