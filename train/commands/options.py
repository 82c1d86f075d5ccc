"""A command's own options, beside those of train/main.py."""

import argparse
from typing import TYPE_CHECKING, NoReturn

from train.run.exits import ExitCode, ExitWith

if TYPE_CHECKING:
    from train.config import Config


class Options(argparse.ArgumentParser):
    """A command's own options; what it does not know is left for train.cli, and errors end like everywhere else."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(
            prog=f"handloop {command}",
            usage=f"handloop {command} --profile NAME [--section.field VALUE ...] [options]",
            description=description,
            epilog="Profile, model and data are chosen with the options of train/main.py: "
            "python train/main.py --profile NAME --help tells all of them.",
            allow_abbrev=False,
        )

    def config(self, words: list[str]) -> "Config":
        """What train.cli makes of the others; raises ExitWith(BAD_INPUT) with this command's usage."""
        from train.cli import parse

        return parse(words, self.format_usage().strip())

    def error(self, message: str) -> NoReturn:
        raise ExitWith(ExitCode.BAD_INPUT, f"{message}\n{self.format_usage().strip()}")


def positive_number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)
