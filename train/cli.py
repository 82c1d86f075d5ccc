"""argv -> Config: `--profile NAME`, `--section.field VALUE`, `--print-config`; unknown options are refused."""

import contextlib
import dataclasses
import errno
import io
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path

import tyro

from data_tools.spelling import nearest
from data_tools.template_files import has_word, template_texts
from train import advice
from train.config import Config, parse_argument
from train.help_pages import help_page
from train.profiles import PROFILES, data_alone
from train.run.exits import ExitCode, ExitWith

SHORT_USAGE = "usage: handloop train --profile NAME [--section.field VALUE ...]"
USAGE = f"{SHORT_USAGE} [--print-config] [--help [all|SECTION]]"
# `--model.random_init true` instead of a pair of flags
_PARSING = (tyro.conf.FlagConversionOff,)
# options that name files or folders, some of them beside other values
PATHS = ("run.dir", "run.resume", "model.name_or_path", "data.path", "data.validation_path", "data.chat_template")
PATHS += ("lora.init_from", "validate.general_text", "compare.general_questions")
# beginnings of the options that a finished run takes: where its base and data are, how and where it is executed
MAY_CHANGE = ("model.name_or_path", "model.revision", "model.dtype", "data.", "memory.", "run.device", "compare.")
ITS_OWN = ("profile", "print-config", "help")  # what the command line knows beside the configuration


def parse(argv: Sequence[str], usage: str = USAGE, needs_profile: bool = True, own: Sequence[str] = ITS_OWN) -> Config:
    """The configuration that `argv` asks for; where it needs no profile, `data_alone` stands in for one.

    `own` names the command's further options, one of which may be meant by a misspelt word. Raises
    ExitWith(BAD_INPUT) with every unknown option and invalid value, and the usage; SystemExit(0) after `--help` or
    `--print-config`.
    """
    try:
        return _parse(argv, needs_profile, own)
    except ExitWith as end:
        raise ExitWith(end.code, f"{end.reason}\n{usage}") from None


def _parse(argv: Sequence[str], needs_profile: bool, own: Sequence[str]) -> Config:
    words = [word for word in argv if word != "--print-config"]
    options = dict(_grouped(words))
    topics = [values for name, values in options.items() if name in ("h", "help")]
    if topics:
        named = options.get("profile", [])
        profile = PROFILES[named[0]]() if len(named) == 1 and named[0] in PROFILES else None
        print(help_page(topics[0][0] if topics[0] else "", profile, SHORT_USAGE))
        raise SystemExit(0)
    needs_profile = needs_profile or "profile" in options
    profile, words = _take_profile(words, own) if needs_profile else (data_alone(), words)
    changed, problems = _override(profile, words, own)
    config = checked(_for_its_base(changed, profile, words), problems)
    if "--print-config" in argv:
        print(json.dumps(dataclasses.asdict(config), indent=2))
        raise SystemExit(0)
    return config


def parse_over(config: Config, words: Sequence[str], usage: str) -> Config:
    """`config` with the options in `words` over it; raises ExitWith(BAD_INPUT) as `parse` does."""
    try:
        return checked(*_override(config, list(words)))
    except ExitWith as end:
        raise ExitWith(end.code, f"{end.reason}\n{usage}".rstrip()) from None


def check_words(words: Sequence[str], own: Sequence[str], others: tuple[str, ...], usage: str) -> None:
    """Raises ExitWith(BAD_INPUT) with every option in `words` that there is not, and every invalid value.

    It needs no profile. A misspelt word is taken for one of `own`, or for an option that begins with one of `others`.
    """
    try:
        if problems := _override(data_alone(), list(words), own, others)[1]:
            raise unusable(problems)
    except ExitWith as end:
        raise ExitWith(end.code, f"{end.reason}\n{usage}") from None


def checked(config: Config, problems: Sequence[str] = ()) -> Config:
    """`config` with home folders in its paths; raises ExitWith(BAD_INPUT) with what is impossible, and `problems`."""
    config, homeless = with_home(config)
    found = [*problems, *homeless, *config.problems()]
    if found:
        raise unusable(found)
    return config


def unusable(problems: Sequence[str]) -> ExitWith:
    """The refusal of a configuration, a line for each problem."""
    lines = "\n".join(f"  {problem}" for problem in problems)
    return ExitWith(ExitCode.BAD_INPUT, f"the configuration cannot be used:\n{lines}")


def _take_profile(words: list[str], own: Sequence[str]) -> tuple[Config, list[str]]:
    """The profile that the command line names, and the remaining words."""
    known = ", ".join(PROFILES)
    options = _grouped(words)
    names = [values for name, values in options if name == "profile"]
    if len(names) != 1 or not names[0]:
        wrong = [] if names else _override(data_alone(), words, own)[1]
        for name, values in () if names else options:
            wrong += [f"--{name} {one}: did you mean --profile {one}?" for one in values if name and one in PROFILES]
        problems = "".join(f"\n  {problem}" for problem in wrong)
        reason = f"give one profile: --profile NAME, where NAME is one of {known}{problems}"
        raise ExitWith(ExitCode.BAD_INPUT, reason)
    name = names[0][0]
    if name not in PROFILES:
        near = nearest(name, PROFILES)
        hint = f"did you mean {near}? " if near else ""
        raise ExitWith(ExitCode.BAD_INPUT, f"unknown profile {name!r}: {hint}known profiles: {known}")
    rest = names[0][1:]  # what stands behind the profile belongs to no option
    for option, values in options:
        if option != "profile":
            rest += [f"--{option}", *values] if option else values
    return PROFILES[name](), rest


def _grouped(words: list[str]) -> list[tuple[str, list[str]]]:
    """(option without dashes, its values), in order; `--a=b` is split; `-1` and `-inf` are values.

    Words before the first option are values of an empty one.
    """
    groups: list[tuple[str, list[str]]] = []
    for word in words:
        if re.match(r"--?[a-zA-Z]", word) and word != "-inf":
            name, equals, value = word.lstrip("-").partition("=")
            groups.append((name, [value] if equals else []))
        elif groups:
            groups[-1][1].append(word)
        else:
            groups.append(("", [word]))
    return groups


def _override(
    config: Config, words: list[str], own: Sequence[str] = (), others: tuple[str, ...] = ("",)
) -> tuple[Config, list[str]]:
    """`config` with the valid overrides, and a message for each invalid one."""
    problems: list[str] = []
    known = dict(_options(config))
    offered = [name for name in known if name.startswith(others)]
    merged: dict[str, list[str]] = {}
    for typed, values in _grouped(words):
        name = typed.replace("-", "_")
        if not typed:
            problems += [advice.on_stray(word, offered) for word in values]
        elif name not in known:
            problems.append(f"--{typed}: {advice.on_option(name, values, own, offered)}")
        elif name in merged and not isinstance(known[name], tuple):
            problems.append(f"--{name}: given more than once")
        else:
            taken, stray = _split(name, values, known[name])
            merged.setdefault(name, []).extend(taken)
            problems += [advice.on_stray(word, offered) for word in stray]
    spelled = {name: _spelled(values, known[name]) for name, values in merged.items()}
    changed, error = _parsed(config, spelled)  # all at once, because each takes tyro a twentieth of a second
    if not error:
        return _without_replaced(changed, set(merged)), problems
    for name, values in merged.items():
        # one at a time, because tyro stops at the first invalid value
        config, error = _parsed(config, {name: spelled[name]})
        if error:
            remedy = f"write --{name} true or --{name} false" if isinstance(known[name], bool) else error
            if told := advice.on_value(name, values):
                remedy = f"{remedy.rstrip('.')}. {told}"
            problems.append(f"{' '.join([f'--{name}', *values])}: {remedy}")
    return _without_replaced(config, set(merged)), problems


def _spelled(values: list[str], default: object) -> list[str]:
    """The values as tyro has them, which spells booleans True and False."""
    is_flag = isinstance(default, bool)
    return [value.title() if is_flag and value.lower() in ("true", "false") else value for value in values]


def _parsed(config: Config, given: Mapping[str, list[str]]) -> tuple[Config, str]:
    """`config` with options over it, and why not."""
    words = [word for name, values in given.items() for word in (f"--{name}", *values)]
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(errors):
            return tyro.cli(Config, default=config, args=words, config=_PARSING), ""
    except SystemExit:
        return config, _message(errors.getvalue())


def _without_replaced(config: Config, given: Set[str]) -> Config:
    """`config` without what the profile sets and an option that was given replaces.

    data.packing replaces data.group_by_length, and batch.samples batch.accumulation.
    """
    data, batch = config.data, config.batch
    if "data.packing" in given and data.packing and "data.group_by_length" not in given:
        data = dataclasses.replace(data, group_by_length=False)
    if "batch.samples" in given and batch.samples > 0 and "batch.accumulation" not in given:
        batch = dataclasses.replace(batch, accumulation=0)
    return dataclasses.replace(config, data=data, batch=batch)


def _for_its_base(config: Config, profile: Config, words: list[str]) -> Config:
    """`config` without the profile's data.template_arguments where it names a base or template that does not read them.

    One that does not is refused with them. A folder's templates and a template's file are looked into; of another base
    on the hub nothing is known here.
    """
    is_own = config.model.name_or_path == profile.model.name_or_path and not config.data.chat_template
    if is_own or any(typed.replace("-", "_") == "data.template_arguments" for typed, _ in _grouped(words)):
        return config
    texts = _templates(config)

    def is_read(argument: str) -> bool:
        return any(has_word(text, parse_argument(argument)[0]) for text in texts)

    read = tuple(filter(is_read, config.data.template_arguments))
    return dataclasses.replace(config, data=dataclasses.replace(config.data, template_arguments=read))


def _templates(config: Config) -> list[str]:
    """The chat templates that are used, where they lie on this machine."""
    if file := config.data.chat_template:
        with contextlib.suppress(OSError, ValueError):
            return [Path(os.path.expanduser(file)).read_text(encoding="utf-8-sig")]
        return []
    return template_texts(Path(os.path.expanduser(config.model.name_or_path)))


def _split(name: str, values: list[str], default: object) -> tuple[list[str], list[str]]:
    """The values of an option, and the words behind it that cannot be its own."""
    if not isinstance(default, tuple):
        return values[:1], values[1:]
    if name in PATHS:
        return values, []
    stray = [word for word in values if advice.looks_like_data(word)]
    return [word for word in values if word not in stray], stray


def with_home(config: Config) -> tuple[Config, list[str]]:
    """`config` with `~` and `~user` at the beginning of its paths replaced, and a message for each unknown user and
    each name that no file can have.

    No shell does so in `--run.dir=~/run`. A file whose name begins with ~ is written ./~name.
    """
    problems: list[str] = []

    def expanded(option: str, value: str) -> str:
        found = os.path.expanduser(value)
        if found.startswith("~"):
            problems.append(f"--{option} {value}: there is no such user; for a name that begins with ~ write ./{value}")
        elif reason := impossible(found):
            problems.append(f"--{option} {value}: {reason}")
        return found

    for option in PATHS:
        section_name, name = option.split(".")
        section = getattr(config, section_name)
        value = getattr(section, name)
        one = isinstance(value, str)
        new = expanded(option, value) if one else tuple(expanded(option, each) for each in value)
        config = dataclasses.replace(config, **{section_name: dataclasses.replace(section, **{name: new})})
    return config, problems


def impossible(path: str) -> str:
    """Why no file has this name, or why we take none of this name; empty where one may."""
    try:
        os.stat(path.encode())
    except UnicodeEncodeError:
        return "its name is not UTF-8; rename it"
    except OSError as error:
        return "file name too long" if error.errno == errno.ENAMETOOLONG else ""
    return ""


def _options(config: Config) -> Iterator[tuple[str, object]]:
    """Every `section.field` and its current value."""
    for section in dataclasses.fields(config):
        value = getattr(config, section.name)
        if dataclasses.is_dataclass(value):
            yield from (
                (f"{section.name}.{field.name}", getattr(value, field.name)) for field in dataclasses.fields(value)
            )


def _message(panel: str) -> str:
    """The reason in tyro's error panel: the lines between the first two rules."""
    lines = [line.strip(" │|") for line in panel.splitlines()]
    rules = [number for number, line in enumerate(lines) if line and set(line) <= set("─-╭╮╰╯├┤+")]
    body = lines[rules[0] + 1 : rules[1]] if len(rules) > 1 else lines
    reason = " ".join(line for line in body if line)
    reason = re.sub(r"^Error parsing --\S+: invalid literal for int\(\).*", "it is no whole number", reason)
    return re.sub(r"^Error parsing --\S+: could not convert string to float.*", "it is no number", reason)
