"""train/main.py with a fault in one of its processes: `faulty_trainer.py CASE WORD ...`, started by train.launcher."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

STOP = None
if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
    from train.begin import begin

    STOP = begin(sys.argv[2:])

from tests.injections import AtForward, Fault
from tests.interruptions import Defect, SignalAt
from train.main import main

REDUCTION = ("train.step", "all_reduce_gradients", 5)
NOTHING = "nothing"
FAULTS: dict[str, tuple[int, Callable[[], None]]] = {  # in which process; only the first one saves
    "killed in forward": (1, AtForward(5)),
    "killed in reduction": (0, SignalAt(*REDUCTION)),
    "killed in a save": (0, Fault("save", 2, "before")),
    "killed while it loads": (1, SignalAt("train.main", "assemble")),
    "stopped in reduction": (1, SignalAt(*REDUCTION, signal.SIGSTOP)),
    "stopped in a save": (0, SignalAt("train.checkpoints.store", "publish", 2, signal.SIGSTOP)),
    "an exception": (0, Defect("train.loop", "optimizer_step", ZeroDivisionError("a bug"), call=5)),
    NOTHING: (0, lambda: None),
}


if __name__ == "__main__":
    rank, fault = FAULTS[sys.argv[1]]
    if os.environ["RANK"] == str(rank):
        fault()
    sys.exit(main(sys.argv[2:], STOP))
