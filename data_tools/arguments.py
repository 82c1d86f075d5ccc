"""A command line of its own: an argument parser whose errors are DataError and name the option that may be meant."""

import argparse
from typing import Any, NoReturn

from data_tools.report import DataError
from data_tools.spelling import nearest


class Parser(argparse.ArgumentParser):
    """Knows all its options, and takes none of them abbreviated."""

    def __init__(self, prog: str, description: str | None, usage: str | None = None, epilog: str | None = None) -> None:
        super().__init__(prog=prog, description=description, usage=usage, epilog=epilog, allow_abbrev=False)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse; raises DataError with every option that there is not."""
        options, others = self.parse_known_args(args, namespace)
        unknown = [word.partition("=")[0] for word in others if word.startswith("-")]
        if unknown:
            self.error("\n".join(map(self._about, unknown)))
        if others:
            self.error(f"{' '.join(others)}: belongs to no option")
        return options

    def _about(self, word: str) -> str:
        names = [name.removeprefix("--") for action in self._actions for name in action.option_strings]
        near = nearest(word.lstrip("-"), names)
        return f"{word}: no such option" + (f"; did you mean --{near}?" if near else "")

    def error(self, message: str) -> NoReturn:
        """Raises DataError with the usage."""
        raise DataError(f"{message}\n{self.format_usage().strip()}")
