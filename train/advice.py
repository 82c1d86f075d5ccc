"""What was probably meant by words of the command line that cannot be used."""

import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from data_tools.spelling import nearest
from train.foreign.names import counterpart, nearest_name, spelled_here
from train.foreign.reasons import why
from train.not_offered import reason_for
from train.profiles import PROFILES

# files of rows and texts by their names, as data_tools.sources reads them; which takes a second to import
DATA_FILE = re.compile(r".*\.(txt|md|jsonl|json|csv|parquet)(\.(gz|bz2|xz|zst|lz4))?", re.IGNORECASE)
DASHES = "\N{EN DASH}\N{EM DASH}\N{MINUS SIGN}"  # what editors and pages make of hyphens


def on_option(name: str, given: Sequence[str], own: Iterable[str], offered: Sequence[str]) -> str:
    """What to say of an option that there is not: ours in its place, why there is none, or the nearest name.

    `own` are a command's further options, of which one is meant first if no section is named; `offered` are those of
    the configuration that may be given.
    """
    last = name.rpartition(".")[2]
    if reason := reason_for(name):
        return f"no such option: {reason}"
    value = given[0] if len(given) == 1 else list(given) or "true"
    known = counterpart(last, value)
    if "." in name and known and known[0].endswith(f".{last}") and known[0] == nearest(name, offered):
        known = None  # --modle.dtype is no foreign name
    if known and known[0] in offered:
        return _instead(*known)
    if (reason := why(last, value)) and not known:
        return f"no such option: {reason.text}"
    near = _near(name, own, offered)
    return "no such option" + (f"; did you mean {near}?" if near else "")


def _near(name: str, own: Iterable[str], offered: Sequence[str]) -> str:
    """What a misspelt option may have been: of a command's own, of the configuration, or another trainer's."""
    if "." in name:
        near = nearest(name, offered, cutoff=0.75)
    else:
        field = nearest(name, {one.partition(".")[2] for one in offered}, cutoff=0.75)
        near = nearest(name, own) or " or --".join(one for one in offered if one.partition(".")[2] == field)
    if near:
        return f"--{near}"
    theirs, option = nearest_name(name.rpartition(".")[2].replace("-", "_"))
    if theirs and option in offered:
        return f"{theirs}, which is --{option} here"
    near = nearest(name, offered, cutoff=0.5) if "." in name else ""
    return f"--{near}" if near else ""


def on_value(option: str, given: Sequence[str]) -> str:
    """What to say of a value that an option of ours refuses, where another trainer has it; else empty."""
    ours = spelled_here(option, given[0]) if len(given) == 1 else ""
    return f"Here it is --{option} {shlex.quote(ours)}" if ours else ""


def _instead(option: str, values: tuple[str, ...] | None, note: str) -> str:
    about = f" ({note})" if note else ""
    if values is None:
        return f"here it is --{option}, which has no such value{about}; --help {option}"
    return f"here it is --{option} {shlex.join(values)}" if values else f"leave it out; here it is --{option}{about}"


def on_stray(word: str, offered: Sequence[str]) -> str:
    """What to say of a word that belongs to no option."""
    return f"{word} belongs to no option; {_stray(word, offered)}"


def _stray(word: str, offered: Sequence[str]) -> str:
    name, equals, value = word.partition("=")
    if word[0] in DASHES:
        return f"it begins with a dash that is no hyphen: write --{word.lstrip(DASHES + '-')}"
    if near := nearest(word, PROFILES, cutoff=0.75):
        return f"did you mean --profile {near}?"
    if name.replace("-", "_") in offered:
        return f"did you mean --{word}?"
    known = counterpart(name, value) if equals else None
    if known and known[0] in offered:
        return _instead(*known)
    if word.endswith((".yaml", ".yml")):
        return f"handloop import-config {shlex.quote(word)} reads other trainers' configurations"
    if looks_like_data(word) or Path(word).exists():
        return f"data files are --data.path {shlex.quote(word)}"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", word):
        return f"a model is --model.name_or_path {word}, a data set --data.path {word}"
    return "values follow their --section.field, and one with spaces is quoted"


def looks_like_data(word: str) -> bool:
    """Whether a word is named like a file of data, or is a pattern of such."""
    return bool(DATA_FILE.fullmatch(word))
