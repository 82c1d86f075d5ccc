"""What `--help` prints: one screen of what is changed most; all options or one section, from config.py's docstrings."""

import ast
import dataclasses
import re
import textwrap
from collections.abc import Iterator
from typing import Literal, Union, get_args, get_origin, get_type_hints

import train.config
from data_tools.spelling import nearest
from train.config import Config
from train.profiles import PROFILES
from train.run.exits import ExitCode, ExitWith

WIDTH = 80
FIRST = (  # what people change most, and what it is in few words
    ("model.name_or_path", "base: folder or hub id"),
    ("data.path", "files, folders, hub data sets"),
    ("data.validation_fraction", "share of the data that is held out"),
    ("data.max_length", "tokens in a sample at most"),
    ("batch.per_device", "samples in a micro-batch"),
    ("batch.accumulation", "micro-batches in a step"),
    ("train.epochs", "passes over the data"),
    ("optim.lr", "peak learning rate"),
    ("lora.r", "rank of the adapters"),
    ("memory.budget", "GPU memory to stay within"),
    ("run.dir", "run folder, which resumes"),
)
EXAMPLES = """\
  handloop train --profile a100 --data.path pairs.jsonl
  handloop train --profile 4gb --data.path texts/ --lora.r 16"""


def help_page(topic: str, config: Config | None, usage: str) -> str:
    """The page that `--help TOPIC` asks for, with the values of `config`, or of no profile.

    A topic is empty (one screen), all, a section or an option; raises ExitWith(BAD_INPUT) for another word.
    """
    if not topic:
        return _screen(config, usage)
    values = config or PROFILES["a100"]()
    sections = [field.name for field in dataclasses.fields(Config) if field.name != "profile"]
    whose = f"values in brackets are those of --profile {values.profile}\n"
    if topic == "all":
        return "\n\n".join([whose.rstrip(), *(_section(name, values) for name in sections)])
    if topic in sections:
        return f"{whose}\n{_section(topic, values)}"
    options = [f"{section}.{field.name}" for section in sections for field in _fields(values, section)]
    wanted = topic.replace("-", "_")
    found = [option for option in options if wanted in (option, option.partition(".")[2])]
    if not found:
        near = nearest(wanted, [*sections, *options, "all"])
        known = f"write --help, or --help with all, {', '.join(sections)} or an option"
        reason = f"--help {topic}: there is no such page; {f'did you mean {near}? ' if near else ''}{known}"
        raise ExitWith(ExitCode.BAD_INPUT, reason)
    return "\n\n".join([whose.rstrip(), *(_option(option, values) for option in found)])


def _screen(config: Config | None, usage: str) -> str:
    profiles = [f"  {name:13} {_first_part(make.__doc__ or '')}" for name, make in PROFILES.items()]
    sections = ", ".join(field.name for field in dataclasses.fields(Config) if field.name != "profile")
    more = f"--help all: every option; --help SECTION: {sections}"
    return "\n".join(
        [
            *textwrap.wrap(usage, WIDTH, subsequent_indent="       "),
            "",
            "profiles, each a whole recipe:",
            *profiles,
            "",
            f"changed most (in {config.profile}):" if config else "changed most:",
            *(_in_short(option, what, config) for option, what in FIRST),
            "",
            "examples:",
            EXAMPLES,
            "",
            *textwrap.wrap(more, WIDTH),
        ]
    )


def _in_short(option: str, what: str, config: Config | None) -> str:
    """An option on one line, with its value; of a long one the end."""
    line = f"  --{option:26} {what}"
    if config is None:
        return line
    section, name = option.split(".")
    value, room = _shown(getattr(getattr(config, section), name)), WIDTH - len(line) - 3
    return f"{line} [{value if len(value) <= room else '...' + value[3 - room :]}]"


def _first_part(text: str) -> str:
    return re.split(r"[:;.,]( |$)", text, maxsplit=1)[0]


def _section(name: str, config: Config) -> str:
    kind = type(getattr(config, name))
    options = [_option(f"{name}.{field.name}", config) for field in _fields(config, name)]
    return "\n".join([textwrap.fill(f"{name}: {(kind.__doc__ or '').strip()}", WIDTH), *options])


def _fields(config: Config, section: str) -> tuple[dataclasses.Field, ...]:
    return dataclasses.fields(getattr(config, section))


def _option(option: str, config: Config) -> str:
    section, name = option.split(".")
    value = getattr(config, section)
    kind = get_type_hints(type(value))[name]
    head = f"--{option} {_spelled(kind)}  [{_shown(getattr(value, name))}]"
    about = meanings()[f"{type(value).__name__}.{name}"]
    head_lines = textwrap.wrap(head, WIDTH, subsequent_indent=" " * 10, break_long_words=False, initial_indent="  ")
    text = textwrap.wrap(about, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join([*head_lines, *text])


def _spelled(kind: object) -> str:
    """What may be written for a value of this type."""
    if get_origin(kind) is Literal:
        return "|".join(map(str, get_args(kind)))
    if get_origin(kind) is tuple:
        return f"{_spelled(get_args(kind)[0])} ..."
    if get_origin(kind) is Union or type(kind).__name__ == "UnionType":
        return "|".join(dict.fromkeys(map(_spelled, get_args(kind))))
    return {bool: "true|false", int: "NUMBER", float: "NUMBER"}.get(kind, "TEXT")  # type: ignore[arg-type]


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def meanings() -> dict[str, str]:
    """`Class.field` -> the docstring below the field in config.py."""
    return dict(_meanings())


def _meanings() -> Iterator[tuple[str, str]]:
    assert train.config.__file__
    with open(train.config.__file__, encoding="utf-8") as file:
        tree = ast.parse(file.read())
    for node in tree.body:
        if not isinstance(node, ast.ClassDef):
            continue
        for field, text in zip(node.body, node.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                assert isinstance(field.target, ast.Name)
                yield f"{node.name}.{field.target.id}", " ".join(ast.literal_eval(text.value).split())
