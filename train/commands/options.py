"""Options of a `handloop` command, in addition to those of train/main.py."""

import argparse
from typing import TYPE_CHECKING, NoReturn

from train.run.exits import ExitCode, ExitWith

if TYPE_CHECKING:
    from train.config import Config


class Options(argparse.ArgumentParser):
    """An argument parser for a command's own options; its errors are ExitWith(BAD_INPUT).

    Use `parse_known_args`: the remaining words are the configuration, which `config` parses.
    """

    def __init__(self, command: str, description: str) -> None:
        super().__init__(
            prog=f"handloop {command}",
            usage=f"handloop {command} --profile NAME [--section.field VALUE ...] [options]",
            description=description,
            epilog="Profile, model and data are set with the options of train/main.py; "
            "python train/main.py --profile NAME --help lists them.",
            allow_abbrev=False,
        )

    def config(self, words: list[str]) -> "Config":
        """The configuration that the remaining words set; raises ExitWith(BAD_INPUT) with this command's usage."""
        from train.cli import parse

        return parse(words, self.format_usage().strip())

    def error(self, message: str) -> NoReturn:
        raise ExitWith(ExitCode.BAD_INPUT, f"{message}\n{self.format_usage().strip()}")


def positive_number(text: str) -> int:
    """An argparse type: an integer of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)
