"""`python -m train.launcher`: accelerate launch with exit codes and signals kept (train/run/launcher.py)."""

import sys

from train.run.launcher import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
