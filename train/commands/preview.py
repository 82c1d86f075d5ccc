"""`handloop preview`."""

import sys
from collections.abc import Iterator
from datetime import date
from typing import TYPE_CHECKING, Any

from rich.console import Console

from data_tools.terminal import typed_path
from train.commands.options import Options, positive_number, print_document
from train.run.durable import write_atomically

if TYPE_CHECKING:
    from train.data import TrainingData


def main(words: list[str]) -> int:
    """Shows the first samples (with packing: packed rows) token by token."""
    own = Options("preview", "Shows the samples token by token, trained and masked.", takes_files=True)
    own.add_argument("--rows", type=positive_number, default=5, metavar="K", help="how many samples (default 5)")
    own.add_argument("--html", type=typed_path, metavar="FILE", help="write a self-contained HTML page instead")
    own.add_argument("--json", action="store_true", help="print the samples, and what is said of them, as JSON")
    options, rest = own.parse_known_args(words)
    config = own.config(rest)
    # imported here because they take seconds, for which --help and a misspelt option should not wait
    from data_tools.abilities import abilities_of
    from data_tools.data_lines import data_lines, data_warnings, described
    from data_tools.prepare import prepare
    from data_tools.preview import as_html, show_samples
    from data_tools.preview import preview as token_views
    from train.data import TrainingData, prepare_settings, run_date
    from train.layout import BatchLayout
    from train.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(config).backend
    settings = prepare_settings(config, config.data.path, run_date(config, date.today()))
    prepared = prepare(settings, tokenizer)
    samples, statistics = prepared.dataset, prepared.statistics
    abilities = abilities_of(tokenizer, settings.render)
    data = TrainingData(samples, config, BatchLayout(1, 1, num_processes=1, rank=0), pad_token_id=0)
    rows = list(token_views(_first_rows(data, options.rows), tokenizer))
    about = {**described(statistics, prepared.notes), "template": abilities.as_json()}
    if options.json:
        print_document({"about": about, "samples": [row.as_json() for row in rows]})
    if options.html:
        subtitle = f"{len(rows):,} of {len(samples):,} samples of {', '.join(config.data.path)}, tokenised for "
        write_atomically(options.html, as_html(rows, f"{subtitle}{config.model.name_or_path}"))
        print(f"written to {options.html}", file=sys.stderr)
    lines = [*data_lines(statistics, prepared.notes), *(f"template  {line}" for line in abilities.lines())]
    lines += [f"warning   {line}" for line in data_warnings(statistics)]
    if options.json or options.html:
        print("\n".join(lines), file=sys.stderr)
    else:
        print("\n".join(lines), end="\n\n")
        show_samples(rows, Console())
    return 0


def _first_rows(data: "TrainingData", count: int) -> Iterator[dict[str, Any]]:
    """The samples of the first `count` rows; with packing a row holds several, each with its place."""
    for number, members in enumerate(data.rows[:count], start=1):
        start = 0
        for i in members:
            place = {"packed_row": number, "packed_start": start} if data.packed else {}
            yield {**data.samples[i], **place}
            start += data.num_tokens[i]
