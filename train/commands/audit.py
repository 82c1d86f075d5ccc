"""`handloop audit`."""

from datetime import date

from rich.console import Console

from train.commands.options import Options, print_document
from train.run.exits import ExitCode, ExitWith


def main(words: list[str]) -> int:
    """Prints the audit; raises ExitWith(BAD_INPUT) if the data should not be trained on."""
    own = Options(
        "audit",
        "Audits the data before training; exit 78 if it should not be trained on. Steps are counted for one process.",
        takes_files=True,
    )
    own.add_argument("--json", action="store_true", help="print everything as one JSON object")
    options, rest = own.parse_known_args(words)
    config = own.config(rest)
    # imported here because they take seconds, for which --help and a misspelt option should not wait
    from data_tools.abilities import abilities_of
    from data_tools.audit import failures
    from data_tools.audit_report import show_audit
    from train.audit_gate import run_audit
    from train.data import TrainingData, prepare_settings, read_data, run_date
    from train.layout import BatchLayout, arranged
    from train.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(config).backend
    today = run_date(config, date.today())
    splits = read_data(config, tokenizer, today)
    abilities = abilities_of(tokenizer, prepare_settings(config, config.data.path, today).render)
    # one process, or group of them, because only accelerate launch knows their number
    count = config.batch.context_parallel
    layout = BatchLayout.of_first(arranged(config.batch, count), count)
    found = run_audit(config, tokenizer, TrainingData(splits.training.samples, config, layout, 0), splits)
    reasons = failures(found)
    if options.json:
        print_document({**found.as_json(), "template": abilities.as_json()})
    else:
        show_audit(found, Console(), abilities)
    if reasons:
        number = "a reason" if len(reasons) == 1 else f"{len(reasons)} reasons"
        raise ExitWith(ExitCode.BAD_INPUT, f"the audit found {number} not to train on this data")
    return 0
