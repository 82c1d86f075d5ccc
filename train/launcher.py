"""`python -m train.launcher`: accelerate launch with exit codes and signals kept (train/run/launcher.py)."""

import sys

from train.run.packages import check_packages

if __name__ == "__main__":
    check_packages()
    from train.run.launcher import main
    from train.run.streams import guard_streams

    guard_streams()
    sys.exit(main(sys.argv[1:]))
