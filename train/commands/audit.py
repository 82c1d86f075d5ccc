"""`handloop audit`."""

import json

from rich.console import Console

from train.commands.options import Options
from train.run.exits import ExitCode, ExitWith


def main(words: list[str]) -> int:
    """Judges the data; 78 where it must not be trained on."""
    own = Options(
        "audit",
        "Judges the data before it is trained on; exit 78 where it must not be. Steps are counted for one process.",
    )
    own.add_argument("--json", action="store_true", help="print everything as one JSON object")
    options, rest = own.parse_known_args(words)
    from data_tools.audit import failures, show_audit
    from data_tools.prepare import prepare
    from train.audit_gate import run_audit
    from train.data import BatchLayout, TrainingData, hold_out, prepare_settings
    from train.models.tokenizer import load_tokenizer

    config = own.config(rest)
    tokenizer = load_tokenizer(config).backend
    prepared = prepare(prepare_settings(config, config.data.path), tokenizer)
    samples, validation = hold_out(config, prepared, tokenizer)
    # one process: how many there will be is only known to accelerate launch
    cut = BatchLayout(config.batch.per_device, config.batch.accumulation, num_processes=1, rank=0)
    found = run_audit(config, tokenizer, TrainingData(samples, config, cut, pad_token_id=0), validation)
    refused = failures(found)
    if options.json:
        print(json.dumps(found.as_json(), indent=2, ensure_ascii=False))
    else:
        show_audit(found, Console())
    if refused:
        reasons = "a reason" if len(refused) == 1 else f"{len(refused)} reasons"
        raise ExitWith(ExitCode.BAD_INPUT, f"the audit found {reasons} not to train on this data")
    return 0
