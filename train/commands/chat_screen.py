"""What a chat reads from and writes to: a terminal, or a pipe."""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from prompt_toolkit import PromptSession
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings
from prompt_toolkit.key_binding.key_processor import KeyPressEvent
from rich.console import Console
from rich.text import Text

from data_tools.cache import cache_root
from data_tools.report import DataError
from data_tools.terminal import printable_lines
from train.commands.options import say
from train.run.exits import ExitCode


class Screen(Protocol):
    """Where a chat takes place."""

    def read(self, prompt: str) -> str | None:
        """The next message, of one or several lines; None at the end."""

    def write(self, text: str) -> None:
        """A piece of an answer."""

    def end_answer(self, about: str, **facts: Any) -> None:
        """The end of an answer, with a line on it for a user, and the facts for a script."""

    def say(self, line: str) -> None:
        """A line that is no answer."""

    def warn(self, line: str) -> None:
        """A line that is to be seen."""

    def refuse(self, reason: str) -> None:
        """Says that what was read cannot be done; the chat goes on."""

    def exit_code(self) -> ExitCode:
        """That of the chat, at its end."""

    @contextmanager
    def answering(self) -> Iterator[Callable[[], bool]]:
        """While entered an answer is written; what it yields says whether it is to end."""
        yield lambda: False


class Pipe:
    """Lines of stdin are messages, answers go to stdout, and nothing else does."""

    def __init__(self) -> None:
        self.num_lines = self.num_refused = 0
        self.written = ""  # of the answer that is not at its end

    def read(self, prompt: str) -> str | None:
        """As Screen; a line that ends with a backslash goes on in the next one."""
        lines: list[str] = []
        while line := sys.stdin.readline():
            self.num_lines += 1
            lines.append(line.rstrip("\n"))
            if not lines[-1].endswith("\\"):
                break
            lines[-1] = lines[-1][:-1]
        return "\n".join(lines) if lines else None

    def write(self, text: str) -> None:
        """As Screen; escaped where stdout is a terminal."""
        print(printable_lines(text) if sys.stdout.isatty() else text, end="", flush=True)
        self.written = text or self.written

    def end_answer(self, about: str, **facts: Any) -> None:
        """As Screen; a line break alone, unless the answer ends with its own."""
        if not self.written.endswith("\n"):
            print(flush=True)
        self.written = ""

    def say(self, line: str) -> None:
        """As Screen; to stderr."""
        say(line)

    def warn(self, line: str) -> None:
        """As Screen; to stderr, with the number of the line that was read last."""
        if self.written:  # half an answer
            self.end_answer("")
        self.say(f"line {self.num_lines}: {line}")

    def refuse(self, reason: str) -> None:
        """As Screen; in the end the exit code tells of it."""
        self.num_refused += 1
        self.warn(reason)

    def exit_code(self) -> ExitCode:
        """As Screen; BAD_INPUT if something was refused, which stderr has named."""
        return ExitCode.BAD_INPUT if self.num_refused else ExitCode.FINISHED

    @contextmanager
    def answering(self) -> Iterator[Callable[[], bool]]:
        """As Screen; Ctrl-C ends the chat."""
        yield lambda: False


class JsonLines(Pipe):
    """A pipe whose answers are lines of JSON; one that cannot be given has none, and stderr names its line."""

    def write(self, text: str) -> None:
        """As Screen; nothing, because an answer is written whole."""

    def end_answer(self, about: str, **facts: Any) -> None:
        """As Screen; the line of JSON, with the number of the line that was answered."""
        print(json.dumps({"line": self.num_lines, **facts}, ensure_ascii=False), flush=True)


class Terminal:
    """A prompt with history and several lines; answers as they are generated, control characters made visible."""

    def __init__(self, **given: Any) -> None:
        """`given` is for PromptSession, for example another input."""
        self.console = Console()
        self.is_open = False  # an answer that is not at its end
        history, note = _history()
        self.session: PromptSession[str] = PromptSession(
            history=history, key_bindings=_keys(), multiline=True, prompt_continuation="  ", **given
        )
        if note:
            self.say(note)

    def read(self, prompt: str) -> str | None:
        """As Screen; Ctrl-C empties the line, Ctrl-D ends the chat."""
        while True:
            try:
                return self.session.prompt(prompt)
            except EOFError:
                return None
            except KeyboardInterrupt:
                self.say("Ctrl-D or /exit leaves")

    def write(self, text: str) -> None:
        """As Screen."""
        print(printable_lines(text), end="", flush=True)
        self.is_open = True

    def end_answer(self, about: str, **facts: Any) -> None:
        """As Screen; the line is dim."""
        print(flush=True)
        self.is_open = False
        self.say(about)

    def say(self, line: str) -> None:
        """As Screen; dim."""
        self.console.print(Text(printable_lines(line), style="dim"))

    def warn(self, line: str) -> None:
        """As Screen; in colour."""
        if self.is_open:  # half an answer
            print(flush=True)
        self.is_open = False
        self.console.print(Text(printable_lines(line), style="yellow"))

    def refuse(self, reason: str) -> None:
        """As Screen."""
        self.warn(reason)

    def exit_code(self) -> ExitCode:
        """As Screen; whoever sat before it has seen everything."""
        return ExitCode.FINISHED

    @contextmanager
    def answering(self) -> Iterator[Callable[[], bool]]:
        """As Screen; the first Ctrl-C ends the answer behind the next token, the second one at once."""
        asked = False

        def ask(number: int, frame: object) -> None:
            nonlocal asked
            if asked:
                raise KeyboardInterrupt
            asked = True

        before = signal.signal(signal.SIGINT, ask)
        try:
            yield lambda: asked
        finally:
            signal.signal(signal.SIGINT, before)


def _keys() -> KeyBindings:
    """Enter sends, unless a backslash stands before it; Alt+Enter is a line break."""
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def history_file() -> Path:
    """Where messages are kept for the prompt's history; raises DataError where there is no home."""
    return cache_root().parent / "chat_history"


def _history() -> tuple[History, str]:
    """The messages of earlier chats, in a file that others cannot read; in memory and a note where it cannot be had."""
    try:
        path = history_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
        path.chmod(0o600)
    except (OSError, DataError) as error:
        return InMemoryHistory(), f"the history is not kept: {error}"
    return FileHistory(str(path)), ""
