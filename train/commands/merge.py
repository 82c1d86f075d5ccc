"""`handloop merge`."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_tools.terminal import typed_path
from train.commands.options import RunOptions, check_output_folder, fitted, print_document, say, table_console
from train.run.durable import make_readable, publish

if TYPE_CHECKING:
    from train.deliver.merge import Merge
    from train.deliver.receipt import Limits, Receipt

RECEIPT = "receipt.json"
ONTO = ("dequantized", "original")


def main(words: list[str]) -> int:
    """Writes base and adapters as one model, and a receipt of how it differs from what was trained."""
    own = RunOptions("merge", "Adds the adapters to the base's weights, and proves what came of it.")
    own.add_argument("--onto", choices=ONTO, help="the base as it was trained on, or before it was quantised")
    own.add_argument("--output", type=typed_path, metavar="FOLDER", help="default RUN/merged-ONTO")
    own.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="of the merged weights; default the base's own")
    own.add_argument("--max-kl", type=float, metavar="NATS", help="mean KL divergence that is allowed")
    own.add_argument("--min-agreement", type=float, metavar="SHARE", help="top-1 agreement that is wanted")
    own.add_argument("--overwrite", action="store_true", help="replace an earlier merged model")
    own.add_argument("--json", action="store_true", help="print the receipt, and where the model is, as JSON")
    options, rest = own.parse_known_args(words)
    if options.onto is None:
        own.error("write --onto original, the base before quantisation, or --onto dequantized, the one trained on")
    # imported here because they take seconds, for which --help should not wait
    from train.deliver.merge import Merge
    from train.deliver.proof import limits_of
    from train.deliver.receipt import Unlike
    from train.deliver.receipt_table import show_merged

    run = own.run(rest)
    merge = Merge.of(run, options.onto, options.dtype or "")
    limits = limits_of(merge).with_options(options.max_kl, options.min_agreement)
    target = Path(options.output or run.folder.path / f"merged-{options.onto}")
    check_output_folder(target, options.overwrite, "merged model", (target / RECEIPT).is_file())
    try:
        record = write_with_receipt(merge, limits, target)
    except Unlike as unlike:
        show_merged(table_console(is_error=True), unlike.receipt.as_json(), limits, None)
        raise
    if options.json:
        print_document({"folder": str(target), **record})
    else:
        _show(record, limits, target)
    return 0


def write_with_receipt(merge: "Merge", limits: "Limits", target: Path) -> dict[str, Any]:
    """Writes the merged model and its receipt; raises Unlike, and leaves nothing, over a limit."""
    from train.deliver.proof import data_for_proof, proof_of

    proof = proof_of(merge.run, data_for_proof(merge.run, say), say, unloads=True)
    with publish(target) as temporary:
        receipt = proof.write_merged(merge, temporary, limits, say)
        record = _record(merge, receipt, proof.unloaded)
        (temporary / RECEIPT).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        make_readable(temporary)
    return record


def _record(merge: "Merge", receipt: "Receipt", unloaded: "Receipt | None") -> dict[str, Any]:
    """What is written beside the merged model, and is true of it alone."""
    from train.run.versions import versions

    base, held = dict(merge.run.base), merge.run.base.get("held", "")
    if not base.get("commit"):  # a folder, whose path is this machine's business
        base["name"] = Path(str(base.get("name", ""))).name
    return {
        "base": {name: base.get(name, "") for name in ("name", "commit", "fingerprint")},
        "trained_in": held,
        "adapter_sha256": merge.run.adapter_sha256,
        "onto": merge.onto,
        "dtype": str(merge.dtype).removeprefix("torch."),
        "versions": versions(),
        "receipt": receipt.as_json(),
        "merge_and_unload": unloaded.as_json() if unloaded else None,
    }


def _show(record: dict[str, Any], limits: "Limits", target: Path) -> None:
    """What a user reads: the receipt with its limits, what else was measured, and where the model is."""
    from train.deliver.receipt_table import asked_of, show_merged

    receipt, unloaded = record["receipt"], record["merge_and_unload"]
    print(fitted(asked_of(receipt), sys.stdout))
    show_merged(table_console(), receipt, limits, unloaded)
    lines = [
        f"this model ({record['onto']}, {record['dtype']}) is within both limits of the trained one; answers may part "
        "where two tokens are nearly equally likely"
    ]
    if unloaded:
        lines.append(
            f"merge_and_unload, of PEFT on the {record['trained_in']} base, is there to compare: it rounds base and "
            "adapter to 4 or 8 bits together, which is another model than was trained"
        )
    lines.append(f"merged model and {RECEIPT} in {target}")
    print("\n".join(fitted(line, sys.stdout) for line in lines))
