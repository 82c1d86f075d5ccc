"""Options of a `handloop` command, in addition to those of the recipe."""

import argparse
import json
import re
import sys
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from data_tools.arguments import Parser
from data_tools.terminal import fitted
from train.cli import ITS_OWN, MAY_CHANGE, check_words, parse
from train.commands.folders import check_is_run
from train.run.exits import ExitCode, ExitWith

if TYPE_CHECKING:
    from rich.console import Console

    from train.config import Config
    from train.deliver.finished import FinishedRun

WIDTH = 80  # columns of tables where there is no terminal


class Options(Parser):
    """An argument parser for a command's own options; its errors are ExitWith(BAD_INPUT).

    With `parse_known_args` the remaining words are the configuration, which `config` parses; a command that has none
    uses `parse_args`.
    """

    def __init__(self, command: str, description: str, takes_files: bool = False) -> None:
        self.takes_files = takes_files
        files = "[FILE ...] [--profile NAME]" if takes_files else "--profile NAME"
        super().__init__(
            prog=f"handloop {command}",
            usage=f"handloop {command} {files} [--section.field VALUE ...] [options]",
            description=description,
            epilog="Profile, model and data are set with the options of `handloop train`; "
            "`handloop train --help all` lists them.",
        )

    def config(self, words: list[str]) -> "Config":
        """The configuration that the remaining words set; raises ExitWith(BAD_INPUT) with this command's usage.

        A command that takes files needs no profile for them; it says which tokenizer it takes then.
        """
        files = list(takewhile(lambda word: not word.startswith("-"), words)) if self.takes_files else []
        options = words[len(files) :]
        names_data = bool(files) or any(re.match(r"--data[.]path\b", word) for word in options)
        given = [*options, *(("--data.path", *files) if files else ())]
        needs_profile = not (self.takes_files and names_data)
        config = parse(given, self.format_usage().strip(), needs_profile, [*ITS_OWN, *self.names])
        if config.profile == "none":
            told = any(re.match(r"--model[.]name[_-]or[_-]path\b", word) for word in options)
            name = config.model.name_or_path if told else "the bundled demo base (--model.name_or_path names another)"
            print(f"no --profile: tokenizer and chat template are those of {name}", file=sys.stderr)
        return config

    @property
    def names(self) -> list[str]:
        """The command's own options, without dashes."""
        return [name.removeprefix("--") for action in self._actions for name in action.option_strings if name != "-h"]

    def error(self, message: str) -> NoReturn:
        raise ExitWith(ExitCode.BAD_INPUT, f"{message}\n{self.format_usage().strip()}")


class RunOptions(Options):
    """An argument parser for a command on a finished run, which is its first word."""

    wanted = "name a run folder, such as runs/demo"

    def __init__(self, command: str, description: str) -> None:
        super().__init__(command, description)
        self.usage = f"handloop {command} RUN [--section.field VALUE ...] [options]"
        self.epilog = "RUN is a run folder, such as runs/demo; options of `handloop train` replace those of the run."

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Its own options and the remaining words, a run and options of the recipe; raises ExitWith(BAD_INPUT).

        What is wrong with the words themselves is said here, before anything is imported that takes seconds.
        """
        options, rest = super().parse_known_args(args, namespace)
        has_run = bool(rest) and not rest[0].startswith("-")
        others = self.replaceable(Path(rest[0])) if has_run else MAY_CHANGE
        check_words(rest[has_run:], self.names, others, self.format_usage().strip())
        if not has_run:
            self.error(self.wanted)
        self.check_run(Path(rest[0]))
        return options, rest

    def check_run(self, run: Path) -> None:
        """Raises ExitWith(BAD_INPUT) unless this is a run folder or its final/."""
        check_is_run(run)

    def replaceable(self, run: Path) -> tuple[str, ...]:
        """With what the options of the recipe begin that replace those of the run."""
        return MAY_CHANGE

    def run(self, words: list[str], needs_base: bool = True) -> "FinishedRun":
        """The finished run that the remaining words name; raises ExitWith(BAD_INPUT) with this command's usage."""
        from train.deliver.finished import check_base_is_there, finished_run

        run = finished_run(Path(words[0]), words[1:], self.format_usage().strip())
        if needs_base:
            check_base_is_there(run)
        return run


def check_output_folder(target: Path, overwrite: bool, kind: str, is_one: bool) -> None:
    """Refuses a folder that is there, unless it is one of its kind that is to be replaced: it would be gone as a whole.

    `is_one` says whether it is what an earlier command of this kind wrote. Raises ExitWith(BAD_INPUT).
    """
    if not target.exists():
        return
    if not overwrite:
        raise ExitWith(
            ExitCode.BAD_INPUT, f"--output {target}: it exists; write --overwrite to replace all of it, or name another"
        )
    if not is_one:
        raise ExitWith(ExitCode.BAD_INPUT, f"--output {target}: it is no {kind}, and is not replaced; name another")


def say(line: str) -> None:
    """Tells the user what is being done, on stderr, so that stdout has results alone."""
    print(fitted(line, sys.stderr), file=sys.stderr, flush=True)


def print_document(content: Any) -> None:
    """Prints the one JSON document of --json on stdout; inf and nan, which JSON lacks, as their names."""
    content = json.loads(json.dumps(content), parse_constant=str)
    print(json.dumps(content, indent=1, ensure_ascii=False), flush=True)


def table_console(is_error: bool = False) -> "Console":
    """Where tables are printed, stdout or stderr: as wide as the terminal, in a pipe of WIDTH columns."""
    from rich.console import Console

    console = Console(stderr=is_error)
    return console if console.is_terminal else Console(stderr=is_error, width=WIDTH)


def positive_number(text: str) -> int:
    """An argparse type: an integer of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)
