"""`handloop export`."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_tools.terminal import fitted, typed_path
from train.commands.merge import ONTO
from train.commands.options import RunOptions, check_output_folder, print_document, say, table_console

if TYPE_CHECKING:
    from train.deliver.export import Export
    from train.deliver.receipt import Limits

FORMATS = ("adapter", "safetensors", "gguf", "adapter-gguf", "ollama")
QUANTIZED = ("Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")
QUANTIZED_LIMITS = (1.0, 0.5)  # mean KL in nats and top-1 agreement: what is beyond them is broken, not only coarse


def main(words: list[str]) -> int:
    """Writes a finished run as files for others, with a README and receipts; sends them to the hub if asked."""
    own = _options()
    options, rest = own.parse_known_args(words)
    _check(own, options)
    # imported here because they take seconds, for which --help should not wait
    from train.deliver.export import Export, Wanted
    from train.deliver.exported import check_is_of, receipts_of
    from train.deliver.push import check_push, files_of, push

    run = own.run(rest, needs_base=bool(options.format))
    if options.push:
        check_push(options.push, needs_token=not options.dry_run)
    target = Path(options.output or run.folder.path / "export")
    notes, limits = [], {}
    if options.format:
        onto = options.onto or ("original" if run.config.model.quantization == "none" else "")
        if not onto and {"safetensors", "gguf", "ollama"} & set(options.format):
            own.error("write --onto original, the base before quantisation, or --onto dequantized, the one trained on")
        check_output_folder(target, options.overwrite, "export", _is_export(target))
        wanted = Wanted(
            frozenset(options.format),
            tuple(dict.fromkeys(options.quantize)),
            onto or "original",
            _quantized_limits(options),
        )
        export = Export(run, wanted, say)
        notes, limits = _written(export, target), export.limits
    elif not (target / "README.md").is_file():
        own.error(f"write --format: there is no export in {target}")
    else:
        check_is_of(target, run)
    files = files_of(target)
    if not options.json:
        print("\n".join(f"{size:>15,}  {name}" for name, size in files))
        _show(receipts_of(target), limits)
        print("\n".join(fitted(line) for line in [*(f"note: {note}" for note in notes), f"in {target}"]))
    sent = []
    if options.push and not options.dry_run:
        sent = push(target, options.push, options.public, [name for name, _ in files])
    elif options.push:
        visible = "public" if options.public else "private"
        sent = [f"--dry-run: nothing was sent to {options.push}, which would be made {visible} if it is new"]
    if options.json:
        listed = [{"name": name, "bytes": size} for name, size in files]
        document = {"folder": str(target), "files": listed, "receipts": receipts_of(target), "notes": notes}
        print_document({**document, "push": sent})
    elif sent:
        print("\n".join(sent))
    return 0


def _options() -> RunOptions:
    """The command's own options."""
    own = RunOptions("export", "Writes adapter, merged model or GGUF files with a README, and sends them to the hub.")
    own.add_argument("--format", nargs="+", choices=FORMATS, default=[], help="what to write; ollama is gguf and more")
    own.add_argument("--quantize", nargs="+", choices=QUANTIZED, default=[], help="further GGUF files, by llama.cpp")
    own.add_argument("--onto", choices=ONTO, help="the base as it was trained on, or before it was quantised")
    own.add_argument("--max-kl", type=float, metavar="NATS", help="mean KL divergence that quantised files may have")
    own.add_argument("--min-agreement", type=float, metavar="SHARE", help="top-1 agreement that they must have")
    own.add_argument("--output", type=typed_path, metavar="FOLDER", help="default RUN/export")
    own.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    own.add_argument("--push", metavar="OWNER/NAME", help="send it to the hub; without --format what RUN/export holds")
    own.add_argument("--public", action="store_true", help="make the repository public; without it, it is private")
    own.add_argument("--dry-run", action="store_true", help="list what would be sent, and send nothing")
    own.add_argument("--json", action="store_true", help="print files, receipts and notes as JSON")
    return own


def _written(export: "Export", target: Path) -> list[str]:
    """Writes it; the table of a file that is too far from what was trained is shown before the command ends by it."""
    from train.deliver.receipt import Unlike
    from train.deliver.receipt_table import show_files

    try:
        return export.write(target)
    except Unlike as unlike:
        receipts = {**export.receipts, unlike.name: unlike.receipt.as_json()}
        show_files(table_console(is_error=True), receipts, {**export.limits, unlike.name: unlike.limits})
        raise


def _show(receipts: dict[str, dict[str, Any]], limits: dict[str, "Limits"]) -> None:
    """The receipts as a table, if anything was asked; an earlier export's are shown without limits."""
    from train.deliver.receipt_table import asked_of, show_files

    if receipts:
        print(fitted(asked_of(next(iter(receipts.values())))))
        show_files(table_console(), receipts, limits)


def _quantized_limits(options: argparse.Namespace) -> "Limits":
    from train.deliver.receipt import Limits

    return Limits(*QUANTIZED_LIMITS).with_options(options.max_kl, options.min_agreement)


def _check(own: RunOptions, options: argparse.Namespace) -> None:
    """Refuses options that nothing would read."""
    if not options.format and not options.push:
        own.error("write --format, or --push to send what is exported already")
    if options.quantize and not {"gguf", "ollama"} & set(options.format):
        own.error("--quantize makes GGUF files: add --format gguf or --format ollama")
    if not options.quantize and (options.max_kl, options.min_agreement) != (None, None):
        own.error("--max-kl and --min-agreement are limits of quantised files: add --quantize")
    if options.onto and not {"safetensors", "gguf", "ollama"} & set(options.format):
        own.error("--onto: nothing is merged; add --format safetensors, gguf or ollama, or leave it out")
    if options.overwrite and not options.format:
        own.error("--overwrite: nothing is written without --format; leave it out, or add --format")
    if not options.push and (options.public or options.dry_run):
        own.error("--public and --dry-run belong to --push OWNER/NAME")


def _is_export(folder: Path) -> bool:
    """Whether its README has the tag that an export's has."""
    readme = folder / "README.md"
    return readme.is_file() and "\n- handloop\n" in readme.read_text(encoding="utf-8", errors="replace")
