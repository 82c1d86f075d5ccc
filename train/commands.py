"""The `handloop` command: tools that are not the training itself."""

import argparse
import difflib
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console

from data_tools.records import DataError
from train.exits import ExitCode, ExitWith, write_atomically
from train.scrub import scrub

if TYPE_CHECKING:
    from train.config import Config
    from train.data import TrainingData

USAGE = """usage: handloop COMMAND [options]

  preview   show, token by token, what is trained on
  audit     judge the data before it is trained on; exit 78 where it must not be
  glossary  turn a glossary into prompt/response JSONL
  plan      memory and speed before a byte of weights is read

handloop COMMAND --help tells the options of one"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; whatever ends it early is said in one message. Returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal without UTF-8 still shows all of it
    try:
        return _command(words)(words[1:])
    except ExitWith as end:
        code, reason = end.code, end.reason
    except (DataError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # the reader, such as head, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        code, reason = ExitCode.BAD_INPUT, str(error)
    print(f"\nhandloop: {scrub(reason)}", file=sys.stderr, flush=True)
    return int(code)


def _command(words: list[str]) -> Callable[[list[str]], int]:
    commands = {"preview": preview, "audit": audit, "glossary": glossary, "plan": plan}
    if not words or words[0] in ("-h", "--help", "help"):
        return _help
    if words[0] in commands:
        return commands[words[0]]
    near = difflib.get_close_matches(words[0], commands, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ExitWith(ExitCode.BAD_INPUT, f"no command {words[0]!r}{hint}\n{USAGE}")


def _help(words: list[str]) -> int:
    print(USAGE)
    return 0


def preview(words: list[str]) -> int:
    """Shows the first samples token by token."""
    own = _Options("preview", "Shows, token by token, what is trained on.")
    own.add_argument("--rows", type=_positive, default=5, metavar="K", help="how many samples (default 5)")
    own.add_argument("--html", type=Path, metavar="FILE", help="write one self-contained page instead")
    own.add_argument("--json", action="store_true", help="print one JSON object a sample")
    options, rest = own.parse_known_args(words)
    # these take seconds to import, which --help and the other commands need not wait for
    from data_tools.prepare import prepare
    from data_tools.preview import as_html, show
    from data_tools.preview import preview as rows_of
    from train.data import Layout, TrainingData, prepare_settings
    from train.model import load_tokenizer

    config = own.config(rest)
    tokenizer = load_tokenizer(config).backend
    samples = prepare(prepare_settings(config, config.data.path), tokenizer).dataset
    data = TrainingData(samples, config, Layout(1, 1, num_processes=1, rank=0), pad_token_id=0)
    rows = list(rows_of(_first_rows(data, options.rows), tokenizer))
    if options.json:
        for row in rows:
            print(json.dumps(row.as_json(), ensure_ascii=False))
    if options.html:
        subtitle = f"{len(rows):,} of {len(samples):,} samples of {', '.join(config.data.path)}, tokenised for "
        write_atomically(options.html, as_html(rows, f"{subtitle}{config.model.name_or_path}"))
        print(f"written to {options.html}", file=sys.stderr)
    if not (options.json or options.html):
        show(rows, Console())
    return 0


def _first_rows(data: "TrainingData", count: int) -> Iterator[dict[str, Any]]:
    """The samples of the first rows, which with packing hold several, each with its place."""
    for number, members in enumerate(data.rows[:count], start=1):
        start = 0
        for i in members:
            place = {"packed_row": number, "packed_start": start} if data.packed else {}
            yield {**data.samples[i], **place}
            start += data.num_tokens[i]


def audit(words: list[str]) -> int:
    """Judges the data; 78 where it must not be trained on."""
    own = _Options(
        "audit",
        "Judges the data before it is trained on; exit 78 where it must not be. Steps are counted for one process.",
    )
    own.add_argument("--json", action="store_true", help="print everything as one JSON object")
    options, rest = own.parse_known_args(words)
    from data_tools.audit import failures, show
    from data_tools.prepare import prepare
    from train.data import Layout, TrainingData, hold_out, prepare_settings
    from train.gate import judge
    from train.model import load_tokenizer

    config = own.config(rest)
    tokenizer = load_tokenizer(config).backend
    prepared = prepare(prepare_settings(config, config.data.path), tokenizer)
    samples, validation = hold_out(config, prepared, tokenizer)
    # one process: how many there will be is only known to accelerate launch
    cut = Layout(config.batch.per_device, config.batch.accumulation, num_processes=1, rank=0)
    found = judge(config, tokenizer, TrainingData(samples, config, cut, pad_token_id=0), validation)
    refused = failures(found)
    if options.json:
        print(json.dumps(found.as_json(), indent=2, ensure_ascii=False))
    else:
        show(found, Console())
    if refused:
        reasons = "a reason" if len(refused) == 1 else f"{len(refused)} reasons"
        raise ExitWith(ExitCode.BAD_INPUT, f"the audit found {reasons} not to train on this data")
    return 0


def glossary(words: list[str]) -> int:
    """Hands over to the glossary tool."""
    from data_tools.glossary import main as run

    return int(run(words) or 0)


def plan(words: list[str]) -> int:
    """Says what a run needs, from config.json alone; 78 where it does not fit."""
    own = _Options("plan", "Says what a run needs and how fast it would be, from the base's config.json alone.")
    own.add_argument("--gpu", metavar="CARD", help="a card, such as A100-40, or a size, such as 4GiB")
    own.add_argument("--mean-length", type=_positive, metavar="N", help="tokens of a row (default data.max_length)")
    own.add_argument("--probe", action="store_true", help="run steps on random weights here, and compare")
    own.add_argument("--steps", type=_positive, metavar="K", help="that a probe measures (default 5)")
    own.add_argument("--json", action="store_true", help="print one JSON object")
    options, rest = own.parse_known_args(words)
    from train import forecast
    from train.model import check_length

    config = own.config(rest)
    check_length(config)
    mean_length = options.mean_length or config.data.max_length
    if mean_length > config.data.max_length:
        raise ExitWith(ExitCode.BAD_INPUT, f"--mean-length {mean_length}: rows hold data.max_length at most")
    if options.probe and options.gpu is not None:
        raise ExitWith(ExitCode.BAD_INPUT, f"--gpu {options.gpu}: a probe runs on the GPU that is here; leave it out")
    if options.steps and not options.probe:
        raise ExitWith(ExitCode.BAD_INPUT, f"--steps {options.steps}: only --probe makes steps; write both or none")
    if options.probe:
        measured = forecast.probe(config, mean_length, options.steps or 5)
        print(json.dumps(measured, indent=1) if options.json else forecast.beside(measured))
        return 0
    card = forecast.default_card(config) if options.gpu is None else forecast.card_of(options.gpu)
    found = forecast.forecast(config, card, mean_length) if card else None
    # a card that is named is the one that is asked about
    others = forecast.forecasts(config, mean_length) if options.json or options.gpu is None else []
    if options.json:
        cards = {"cards": [each.as_json() for each in others]}
        print(json.dumps((found.as_json() if found else {}) | cards, indent=1))
    else:
        if found:
            forecast.show(found, Console())
        if others:
            forecast.show_known(others, Console())
    fits = found.fits if found else any(each.fits for each in others)
    return 0 if fits else int(ExitCode.BAD_INPUT)


class _Options(argparse.ArgumentParser):
    """A command's own options; what it does not know is left for train.cli, and errors end like everywhere else."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(
            prog=f"handloop {command}",
            usage=f"handloop {command} --profile NAME [--section.field VALUE ...] [options]",
            description=description,
            epilog="Profile, model and data are chosen with the options of train/main.py: "
            "python train/main.py --profile NAME --help tells all of them.",
            allow_abbrev=False,
        )

    def config(self, words: list[str]) -> "Config":
        """What train.cli makes of the others; raises ExitWith(BAD_INPUT) with this command's usage."""
        from train.cli import parse

        return parse(words, self.format_usage().strip())

    def error(self, message: str) -> NoReturn:
        raise ExitWith(ExitCode.BAD_INPUT, f"{message}\n{self.format_usage().strip()}")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)
