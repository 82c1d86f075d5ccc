"""`handloop chat`."""

import re
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_tools.spelling import nearest
from data_tools.terminal import typed_path
from train.commands.options import RunOptions
from train.profiles import data_alone
from train.run.folder import RunFolder

if TYPE_CHECKING:
    from train.commands.chat_screen import Screen
    from train.deliver.sampling import Sampling
    from train.deliver.speaker import Spoken
    from train.deliver.talk import Talk

SETTINGS = {
    "temperature": "0 (default): the likeliest token",
    "top-p": "sample from the likeliest tokens that have this share",
    "top-k": "sample from this many of the likeliest tokens",
    "repetition-penalty": "greater than 1 makes repetitions less likely",
    "max-new-tokens": "an answer's limit (default 512)",
    "seed": "the same answer to the same conversation each time",
}
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class ChatOptions(RunOptions):
    """An argument parser for a chat, whose first word may be a model without a run, which takes any option."""

    wanted = "name a run folder or a model"

    def replaceable(self, run: Path) -> tuple[str, ...]:
        """As RunOptions."""
        return ("",) if is_model(run) else super().replaceable(run)

    def check_run(self, run: Path) -> None:
        """As RunOptions; a model is as good."""
        if not is_model(run):
            super().check_run(run)


def main(words: list[str]) -> int:
    """Talks to the model of a run, with its adapters or without, or to a model that has no run."""
    own = ChatOptions("chat", "Talks to a finished run's model, or to any model.")
    own.usage = f"{own.usage}".replace("RUN", "RUN|MODEL")
    for name, what in SETTINGS.items():
        own.add_argument(f"--{name}", metavar="X", help=what)
    own.add_argument("--system", default="", metavar="TEXT", help="a system prompt")
    own.add_argument(
        "--thinking",
        choices=("auto", "on", "off"),
        default="auto",
        help="prompts of answers with a thought or without; auto: as the run was trained",
    )
    own.add_argument("--json", action="store_true", help="read lines, and print one line of JSON for each answer")
    options, rest = own.parse_known_args(words)
    path, settings = Path(rest[0]), rest[1:]
    # imported here because they take seconds, for which --help should not wait
    from train.cli import parse_over
    from train.commands.chat_screen import JsonLines, Pipe, Terminal
    from train.deliver.partner import partner_of_model, partner_of_run, with_stored_quantization
    from train.deliver.sampling import Sampling
    from train.deliver.speaker import Speaker
    from train.deliver.talk import Talk, thinks_by

    sampling, usage = Sampling(), own.format_usage().strip()
    try:
        for name in SETTINGS:
            given = getattr(options, name.replace("-", "_"))
            sampling = sampling if given is None else sampling.with_value(name, given)
    except ValueError as error:
        own.error(f"--{str(error).replace('_', '-')}")
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    screen: Screen = JsonLines() if options.json else Terminal() if is_terminal else Pipe()
    if is_model(path):
        named = parse_over(data_alone(), ["--model.name_or_path", str(path)], usage)
        partner = partner_of_model(parse_over(with_stored_quantization(named), settings, usage))
    else:
        partner = partner_of_run(own.run(rest))
    speaker = Speaker(partner.model, partner.tokenizer, partner.end_token_ids)
    talk = Talk(speaker, partner.prompts, partner.context, sampling, partner.has_adapters)
    talk.thinks = options.thinking == "on"
    if options.thinking == "auto":
        talk.thinks = thinks_by(partner.prompts, partner.num_empty_reasonings)
    chat = Chat(talk, screen, partner.has_adapters)
    try:
        talk.set_system(options.system)
    except ValueError as error:
        own.error(f"--system: {error}")
    screen.say(f"{path} on {partner.model.head.weight.device.type}; /help lists the commands")
    with partner.model.generating():
        chat.run()
    return screen.exit_code()


def is_model(path: Path) -> bool:
    """Whether this is a model without a run: a folder with a model's config.json, or the id of one on the hub."""
    folder = RunFolder(path)
    if folder.config.exists():
        return folder.is_foreign(folder.config)
    return not path.exists() and HUB_ID.fullmatch(str(path)) is not None and not path.parent.is_dir()


class Chat:
    """Reads messages and commands, and answers."""

    def __init__(self, talk: "Talk", screen: "Screen", has_adapters: bool) -> None:
        self.talk, self.screen, self.has_adapters = talk, screen, has_adapters
        self.commands: dict[str, tuple[str, str, Callable[[str], Any]]] = {
            "/base": ("", "the base alone answers; again: with the adapters", self.base),
            "/reset": ("", "forget what was said; the system prompt stays", self.reset),
            "/system": ("TEXT", "set the system prompt; without TEXT there is none", self.system),
            "/save": ("FILE", "add the conversation to a .jsonl that --data.path takes", self.save),
            "/set": ("NAME VALUE", "change a setting of sampling; alone: list them", self.set),
            "/help": ("", "this", self.help),
            "/exit": ("", "leave; so does Ctrl-D", self.exit),
        }
        self.is_over = False

    def run(self) -> None:
        """Until the end of the input, or /exit."""
        while not self.is_over:
            is_base = self.has_adapters and not self.talk.with_adapters
            line = self.screen.read("base> " if is_base else "> ")
            if line is None:
                return
            text = line.strip()
            name, *rest = text.split(maxsplit=1) or [""]
            if name in self.commands:
                self.commands[name][2]("".join(rest))
            elif re.match("/(?!/)", text):
                near = nearest(name, self.commands)
                meant = f"did you mean {near}?" if near else "/help lists them."
                self.screen.refuse(f"{name}: no such command; {meant} As a text it is written /{name}")
            elif text:
                self.answer(text[1:] if text.startswith(("//", "\\/")) else text)

    def answer(self, text: str) -> None:
        """Asks and shows the answer."""
        import torch

        must_stop: Callable[[], bool] = bool  # nobody has asked yet
        try:
            with self.screen.answering() as must_stop:
                spoken = self.talk.ask(text, self.screen.write, must_stop, self.screen.say)
        except KeyboardInterrupt:  # asked twice, before the first token or behind the last
            if not must_stop():
                raise
            self.screen.refuse("interrupted; this turn is not kept")
        except (ValueError, TimeoutError) as error:
            self.screen.refuse(str(error))
        except torch.OutOfMemoryError:
            self.screen.refuse(
                "GPU memory is not enough; /reset shortens the conversation, --memory.budget streams weights"
            )
        else:
            facts = {"answer": spoken.text, "ended": spoken.ended, "num_tokens": spoken.num_tokens}
            facts |= {"seconds": round(spoken.seconds, 3), "adapters": self.has_adapters and self.talk.with_adapters}
            self.screen.end_answer(about(spoken), **facts)
            if spoken.ended == "length":
                self.screen.warn(f"the answer is cut after {spoken.num_tokens} tokens; {self.longer(spoken)}")

    def longer(self, spoken: "Spoken") -> str:
        """How an answer that was cut could have been longer."""
        if spoken.num_tokens < self.talk.sampling.max_new_tokens:
            return "the model's context is full: /reset forgets what was said"
        return "--max-new-tokens N, or /set max-new-tokens N, lets it be longer"

    def base(self, _: str) -> None:
        """/base"""
        if not self.has_adapters:
            self.screen.refuse("/base: this model has no adapters to switch off")
            return
        self.talk.with_adapters = not self.talk.with_adapters
        self.screen.say("with the adapters" if self.talk.with_adapters else "the base alone, without the adapters")

    def reset(self, _: str) -> None:
        """/reset"""
        self.talk.reset()
        self.screen.say("forgotten")

    def system(self, text: str) -> None:
        """/system"""
        try:
            self.talk.set_system(text)
        except ValueError as error:
            self.screen.refuse(f"/system: {error}")
        else:
            self.screen.say("the system prompt is set" if text else "there is no system prompt")

    def save(self, name: str) -> None:
        """/save"""
        try:
            if not name:
                raise ValueError("name a file")
            count = self.talk.save(typed_path(name))
        except (ValueError, OSError) as error:
            self.screen.refuse(f"/save: {error}")
        else:
            self.screen.say(f"{name} has {count} conversation{'s' if count > 1 else ''} now")

    def set(self, words: str) -> None:
        """/set"""
        from train.deliver.sampling import SAMPLED

        name, _, value = words.partition(" ")
        try:
            if words:
                self.talk.sampling = self.talk.sampling.with_value(name, value.strip())
        except ValueError as error:
            self.screen.refuse(f"/set: {error}")
            return
        now: Sampling = self.talk.sampling
        self.screen.say(", ".join(f"{field.name} {getattr(now, field.name)}" for field in fields(now)))
        if name.replace("-", "_") in SAMPLED and now.is_greedy:
            self.screen.say(f"{name} changes nothing while temperature is 0")

    def exit(self, _: str) -> None:
        """/exit"""
        self.is_over = True

    def help(self, _: str) -> None:
        """/help"""
        for name, (argument, what, _run) in self.commands.items():
            self.screen.say(f"{name + ' ' + argument:18} {what}")
        self.screen.say("Alt+Enter, or a backslash before Enter, breaks the line; Ctrl-C ends an answer.")
        self.screen.say("A text that begins with / is written with // or \\/.")


def about(spoken: "Spoken") -> str:
    """What is said of an answer."""
    speed = spoken.num_tokens / spoken.seconds if spoken.seconds else 0.0
    end = ", interrupted" if spoken.ended == "interrupted" else ""
    return f"{spoken.num_tokens} tokens, {speed:.1f} tokens/s{end}"
