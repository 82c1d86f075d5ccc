"""`handloop import-config`: another trainer's configuration file -> our command."""

import json
import shlex
import textwrap
from typing import Any

from data_tools.arguments import Parser
from data_tools.terminal import escaped, typed_path
from train.cli import parse
from train.commands.options import say
from train.foreign.files import read_config, trainer_of
from train.foreign.translation import Translation, translate
from train.profiles import PROFILES
from train.run.exits import ExitCode, ExitWith

WIDTH = 100  # columns of what is said behind #


def main(words: list[str]) -> int:
    """Prints the command, and below it what of the file is not simply in it; returns the exit code."""
    own = Parser(
        "handloop import-config",
        "Reads a configuration of TRL (SFTConfig as JSON or YAML, trl sft, PEFT's adapter_config.json), axolotl or "
        "LLaMA-Factory, and prints the command for the same training here. What is printed is a shell script: all but "
        "the command is comments.",
        usage="handloop import-config FILE [--profile NAME] [--json]",
    )
    own.add_argument("file", type=typed_path, metavar="FILE", help="a .json, .yaml or .yml file")
    own.add_argument("--profile", choices=list(PROFILES), help="profile to build on, instead of the one that is chosen")
    own.add_argument("--json", action="store_true", help="all of it as JSON")
    options = own.parse_args(words)
    found = read_config(options.file)
    trainer = trainer_of(options.file, found)
    result = translate(trainer, found, options.file)
    if options.profile:
        result.profile, result.why_profile = options.profile, "as asked for"
    result.leave_to(PROFILES[result.profile]())
    problem = _refusal(result)
    if result.unknown:  # on stderr, because stdout may go to a file that is run unread
        keys = [" ".join(filter(None, (key, result.meant(key)))) for key, _ in result.unknown]
        say(f"{options.file}: not in the command, because not known here: {', '.join(keys)}")
    if options.json:
        print(json.dumps({**_as_json(result), "refused": problem}, indent=2, default=str))
    else:
        print("\n".join([*_said_before(result, str(options.file)), *_command(result), *_said_after(result)]))
        if problem:
            print("\n".join(["", "# the command would be refused as it stands:", *_commented(problem)]))
    return ExitCode.FINISHED


def _refusal(result: Translation) -> str:
    """What the command line's parser has against the command; empty: nothing."""
    try:
        parse(["--profile", result.profile, *result.words()], "")
    except ExitWith as refused:
        return refused.reason.strip()
    return ""


def _command(result: Translation) -> list[str]:
    launch = f"handloop train --profile {result.profile}"
    options = [f"  --{option} {shlex.join(words)}" for option, words in result.options.items()]
    return [*(f"{line} \\" for line in [launch, *options[:-1]]), options[-1]]


def _said_before(result: Translation, name: str) -> list[str]:
    lines = _commented(f"{name}: a configuration of {result.trainer}")
    return [*lines, *_commented(f"profile {result.profile}: {result.why_profile}")]


def _said_after(result: Translation) -> list[str]:
    """A comment for every key that is not simply in the command."""
    parts: tuple[tuple[str, list[str]], ...] = (
        (f"not in the file, and written out as {result.trainer} does it", [", ".join(result.defaults)]),
        ("means something else here", [f"{key}: {note}" for key, note in result.notes]),
        ("is so anyway", [f"{', '.join(keys)}: {reason}" for reason, keys in _by_reason(result.anyway).items()]),
        ("has no counterpart", [f"{key} {_short(value)}: {reason}" for key, value, reason in result.missing]),
        (
            "is not known here; docs/MIGRATING.md has what is",
            [f"{key} {_short(value)} {result.meant(key)}".rstrip() for key, value in result.unknown],
        ),
        ("is empty or off there", [", ".join(result.off)]),
    )
    lines = []
    for title, entries in parts:
        if any(entries):
            lines += ["", f"# {title}:", *(line for entry in entries for line in _commented(entry, "#   "))]
    return lines


def _by_reason(told: list[tuple[str, str]]) -> dict[str, list[str]]:
    """The keys of each reason, in order."""
    grouped: dict[str, list[str]] = {}
    for key, reason in told:
        grouped.setdefault(reason, []).append(key)
    return grouped


def _commented(text: str, mark: str = "# ") -> list[str]:
    lines = escaped(text, keep="\n").split("\n")
    return [
        folded
        for line in lines
        for folded in textwrap.wrap(
            line,
            WIDTH,
            initial_indent=mark,
            subsequent_indent=mark + "  ",
            break_long_words=False,
            break_on_hyphens=False,
        )
    ]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _as_json(result: Translation) -> dict[str, Any]:
    return {
        "trainer": result.trainer,
        "profile": result.profile,
        "why_profile": result.why_profile,
        "command": ["handloop", "train", "--profile", result.profile, *result.words()],
        "options": result.options,
        "from_keys": result.keys,
        "their_defaults": result.defaults,
        "means_something_else": dict(result.notes),
        "is_so_anyway": dict(result.anyway),
        "no_counterpart": [{"key": key, "value": value, "reason": reason} for key, value, reason in result.missing],
        "unknown": dict(result.unknown),
        "off": result.off,
    }
