"""`python -m train.launcher`: accelerate launch with exit codes and signals kept (train/run/launcher.py)."""

import sys

from train.run.launcher import main
from train.run.streams import guard_streams

if __name__ == "__main__":
    guard_streams()
    sys.exit(main(sys.argv[1:]))
