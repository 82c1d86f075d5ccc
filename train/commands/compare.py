"""`handloop compare`."""

import json
import os
import re
from pathlib import Path

from data_tools.terminal import typed_path
from train.commands.options import RunOptions, positive_number, print_document, say, table_console
from train.profiles import DEMO
from train.run.durable import write_atomically
from train.run.exits import ExitCode, ExitWith


def main(words: list[str]) -> int:
    """Asks base and tuned model of a finished run the same questions, and measures what was learnt and forgotten."""
    own = RunOptions("compare", "Asks the base and the tuned model the same questions.")
    own.add_argument("--num", type=positive_number, default=32, metavar="N", help="questions a group (default 32)")
    own.add_argument(
        "--max-new-tokens", type=positive_number, metavar="N", help="an answer's limit (default the run's)"
    )
    own.add_argument("--questions", type=typed_path, metavar="FILE", help="also ask these: rows, or .txt, one a line")
    own.add_argument("--general", type=typed_path, metavar="FILE", help="text for the loss, not the bundled one")
    own.add_argument(
        "--loss-tokens", type=positive_number, default=65536, metavar="N", help="tokens for each loss (default 65536)"
    )
    own.add_argument("--show", type=positive_number, metavar="N", help="also print the first N answers of each group")
    own.add_argument("--output", type=typed_path, metavar="FILE", help="write the JSON there, not into the run folder")
    own.add_argument("--json", action="store_true", help="print the JSON instead of tables")
    options, rest = own.parse_known_args(words)
    if any(re.match(r"--compare[.]num[_-]questions\b", word) for word in rest):
        own.error("--compare.num_questions: it is of the answers at a run's end; here --num says how many are asked")
    if options.output is not None:
        _check_output(Path(options.output))
    # imported here because they take seconds, for which --help should not wait
    from train.deliver.comparison import Wanted, compared, material_of
    from train.deliver.comparison_table import show_comparison
    from train.deliver.finished import load_tuned

    run = own.run(rest)
    wanted = Wanted(
        num_questions=options.num,
        max_new_tokens=options.max_new_tokens or run.config.compare.max_new_tokens,
        num_loss_tokens=options.loss_tokens,
        general_questions=DEMO / "general_questions.jsonl",
        general_text=options.general or DEMO / "general.txt",
        questions=options.questions,
    )
    material = material_of(run, wanted)  # before the weights are read, because a file may be wrong
    for note in material.notes:
        say(f"note: {note}")
    found = compared(load_tuned(run), material, wanted, say)
    text = json.dumps(found.as_json(), indent=2, ensure_ascii=False) + "\n"
    target = options.output or run.folder.comparison
    write_atomically(target, text)
    if options.json:
        print_document(found.as_json())
    else:
        show_comparison(table_console(), found, options.show or 0)
    say(f"written to {target}")
    return 0


def _check_output(path: Path) -> None:
    """Refuses a file that could not be written, before minutes are spent on what it is to hold."""
    reason = ""
    if path.is_dir():
        reason = "it is a folder; name a file in it"
    elif not path.parent.is_dir():
        reason = f"there is no folder {path.parent}; make it, or name a file elsewhere"
    elif not os.access(path.parent, os.W_OK | os.X_OK):
        reason = f"the folder {path.parent} cannot be written to; name a file elsewhere"
    if reason:
        raise ExitWith(ExitCode.BAD_INPUT, f"--output {path}: {reason}")
