"""A chat template: turns -> text, within limits of time and size, and with the clock as an input."""

import json
import re
import signal
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, time
from functools import cache, cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jinja2 import Template, TemplateError
from transformers.utils import chat_template_utils

from data_tools.messages import REASONING_KEYS, Message
from data_tools.template_files import has_word

# A chat template may come from a stranger: it runs in transformers' sandbox, within these limits.
MAX_TEMPLATE_SECONDS = 30.0  # a row of 8 MiB takes less than one
MAX_RENDERED_CHARACTERS = 32 * 2**20  # four times the longest row

CLOCK = "strftime_now"  # the one function by which transformers lets a template ask for the time

# Arguments by which templates are told whether the model is to think first.
THINKING_SWITCHES = ("enable_thinking", "thinking", "enable_reasoning")

NO_TEMPLATE = (
    "the tokenizer has no chat template: '### User: / ### Assistant:' is trained, and saved with the result; "
    "--data.chat_template FILE names another, such as that of the model's Instruct repository"
)
# For a tokenizer without a chat template: role markers in plain text, and the tokenizer's end token.
PLAIN_TEMPLATE = (
    "{{ bos_token or '' }}{% for message in messages %}"
    "{{ '### ' + message['role'] | capitalize + ':\n' + message['content'] | trim }}"
    "{{ eos_token if message['role'] == 'assistant' else '' }}{{ '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Dialect:
    """How a template wants a turn's parts, where templates differ."""

    arguments_as_text: bool = False  # a call's arguments as JSON text, not as an object
    content_as_parts: bool = False  # [{"type": "text", "text": ...}], not a string
    reasoning_as_part: bool = False  # a part of type "thinking", not a field of the turn
    empty_content: str | None = ""  # the content of a turn that has none, such as a call

    def turn(self, message: Message) -> dict[str, Any]:
        """The turn as the template expects it."""
        turn: dict[str, Any] = {"role": message.role, "content": message.content or self.empty_content}
        parts: list[dict[str, str]] = []
        if message.reasoning and self.reasoning_as_part:
            parts.append({"type": "thinking", "thinking": message.reasoning})
        elif message.reasoning:
            turn |= dict.fromkeys(REASONING_KEYS, message.reasoning)
        if message.content and (self.content_as_parts or parts):
            parts.append({"type": "text", "text": message.content})
        if parts:
            turn["content"] = parts
        if message.tool_calls:
            turn["tool_calls"] = [self._call(call) for call in message.tool_calls]
        known = {"name": message.name, "tool_call_id": message.tool_call_id}
        return turn | {key: value for key, value in known.items() if value} | dict(message.extra)

    def _call(self, call: dict[str, Any]) -> dict[str, Any]:
        if not self.arguments_as_text:
            return call
        function = call["function"]
        text = json.dumps(function["arguments"], ensure_ascii=False)  # as the templates' own filter `tojson` spells it
        return {**call, "function": {**function, "arguments": text}}


# Tried in this order until one loses nothing of a conversation.
DIALECTS = (
    Dialect(),
    Dialect(arguments_as_text=True),
    Dialect(content_as_parts=True),
    Dialect(reasoning_as_part=True),
    Dialect(empty_content=None),
    Dialect(arguments_as_text=True, empty_content=None),
)


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template with the arguments and the date that it is given; renders, and counts nothing."""

    tokenizer: Any
    arguments: Mapping[str, Any] = field(default_factory=dict)
    today: date = date(2000, 1, 1)

    def source(self, with_tools: bool) -> str:
        """The Jinja text; some tokenizers have another one for conversations with tools."""
        return self._sources[with_tools]

    @cached_property
    def _sources(self) -> tuple[str, str]:
        """Without and with tools."""
        return self.tokenizer.get_chat_template(), self.tokenizer.get_chat_template(tools=[{}])

    @cached_property
    def _given(self) -> dict[str, Any]:
        return {**self.tokenizer.special_tokens_map, **self.arguments}

    @property
    def has_clock(self) -> bool:
        """Whether the template asks for the date."""
        return any(CLOCK in text for text in self._sources)

    def unread_arguments(self, arguments: Iterable[str]) -> list[str]:
        """Those of the names that the template does not have."""
        return [name for name in arguments if not self.names(name)]

    def names(self, name: str) -> bool:
        """Whether the template has this word; where it has not, it cannot read what is called so."""
        if name not in self._named:
            self._named[name] = any(has_word(text, name) for text in self._sources)
        return self._named[name]

    @cached_property
    def _named(self) -> dict[str, bool]:
        return {}

    @property
    def knows_reasoning(self) -> bool:
        """Whether the template may treat reasoning; False is certain."""
        return any("think" in text or "reasoning" in text for text in self._sources)

    def switches(self, with_tools: bool, given: Mapping[str, Any]) -> list[str]:
        """The switches for thinking that the template names, and that neither the row nor the user has set."""
        named = self._switches[with_tools]
        return [name for name in named if name not in self.arguments and name not in given] if named else []

    @cached_property
    def _switches(self) -> tuple[list[str], ...]:
        """Without and with tools; as a variable: message.thinking and 'thinking' in message are parts of a turn."""
        patterns = {name: rf"(?<![\w.'\"]){name}(?![\w'\"])" for name in THINKING_SWITCHES}
        return tuple(
            [name for name, pattern in patterns.items() if re.search(pattern, source)] for source in self._sources
        )

    @cached_property
    def repeats_prompt(self) -> bool:
        """Whether the template begins another answer behind the last one, though no generation prompt is asked for."""
        turns = [Dialect().turn(Message(role, f"zq{role}7qz")) for role in ("user", "assistant", "user")]
        try:
            plain, asked = (self.render(turns[:2], add_generation_prompt=flag) for flag in (False, True))
            longer = self.render(turns)
        except ValueError:
            return False
        tails = [text.partition("zqassistant7qz")[2] for text in (plain, longer)]
        return plain == asked and not tails[1].startswith(tails[0].rstrip())

    def render(
        self,
        turns: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        arguments: Mapping[str, Any] = MappingProxyType({}),
        add_generation_prompt: bool = False,
    ) -> str:
        """The conversation as text; raises ValueError if the template fails on it, TimeoutError if it does not end."""
        _limit_time(MAX_TEMPLATE_SECONDS)
        try:
            text = self._templates[bool(tools)].render(
                messages=turns,
                tools=tools or None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                strftime_now=self._now,
                **{**self._given, **arguments},
            )
        except TimeoutError:
            raise
        except Exception as error:  # a template can raise anything
            raise ValueError(f"the chat template refuses this conversation: {error}{_in_line(error)}") from None
        finally:
            _limit_time(0)
        if len(text) > MAX_RENDERED_CHARACTERS:
            limit = f"{MAX_RENDERED_CHARACTERS:,}"
            raise ValueError(f"the chat template renders {len(text):,} characters, more than {limit}")
        return text

    def check(self, path: Path) -> None:
        """Raises ValueError, with its place in the file, if it fails on a question and its answer; or TimeoutError."""
        turns = [Message("user", "What is AOG?"), Message("assistant", "Aircraft on ground.")]
        failures = []
        for dialect in DIALECTS:
            try:
                self.render([dialect.turn(turn) for turn in turns])
                return
            except ValueError as error:
                failures.append(error)
        raise ValueError(f"{path}: it fails on a question and its answer alone: {failures[0]}")

    @cached_property
    def _templates(self) -> tuple[Template, ...]:
        return tuple(map(chat_template_utils._compile_jinja_template, self._sources))

    def _now(self, spelling: str) -> str:
        return datetime.combine(self.today, time()).strftime(spelling)


def _in_line(error: BaseException) -> str:
    """The line of the template in which the error was raised, if it was in the template."""
    line, trace = getattr(error, "lineno", None), error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    return f" (line {line} of the template)" if line else ""


def read_template(path: Path) -> str:
    """The text of a template file; raises ValueError with its place and what is wrong with it."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 (byte {error.start}); convert the file") from None
    if not text.strip():
        raise ValueError(f"{path}: the file is empty; a chat template is Jinja text")
    if text.lstrip().startswith(("{", "[", '"')) and not text.lstrip().startswith(("{%", "{{", "{#")):
        try:
            holds = json.loads(text)
        except ValueError:
            holds = None
        if holds is not None:
            key = "; put the text of its 'chat_template' into a file" if "chat_template" in holds else ""
            raise ValueError(f"{path}:1: JSON, not a Jinja template{key}")
    if "{{" not in text and "{%" not in text:
        raise ValueError(f"{path}:1: it has no Jinja in it, so it shows nothing of a conversation")
    try:
        chat_template_utils._compile_jinja_template(text)
    except TemplateError as error:
        raise ValueError(f"{path}:{getattr(error, 'lineno', None) or 1}: not a Jinja template: {error}") from None
    return text


def _limit_time(seconds: float) -> None:
    """Lets TimeoutError be raised here after `seconds`; 0 takes it back. Without effect outside the main thread."""
    if threading.current_thread() is threading.main_thread():
        _listen()
        signal.setitimer(signal.ITIMER_REAL, seconds)


@cache
def _listen() -> None:
    """Once a process, because it takes as long as rendering a row; nothing else here uses this signal."""
    signal.signal(signal.SIGALRM, _stop)


def _stop(number: int, frame: object) -> None:
    seconds = f"{MAX_TEMPLATE_SECONDS:g} s"
    raise TimeoutError(f"the chat template did not end within {seconds}; choose another --data.chat_template")
