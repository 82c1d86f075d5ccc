"""How a run went and ended, and what can be done with its result, as sections of the page."""

import shlex
from datetime import UTC, datetime
from typing import Any

from train.report.blocks import Block, Cell, Code, Section, Table, Text
from train.report.record import RunRecord
from train.report.state import State, meaning
from train.report.values import NOTHING, at, brief, number, plural, shown, span, whole
from train.run.folder import read_object

MAX_WARNINGS = 100
RECEIPT = {
    "mean_kl": "mean KL, nats",
    "agreement": "top-1 agreement",
    "largest_difference": "largest logit difference",
    "loss_trained": "loss as trained",
    "loss_served": "loss",
}


def ending_section(run: RunRecord) -> Section:
    """The attempts, how the last one ended, what was warned of, and the versions."""
    blocks: list[Block] = [Text(ending_line(run), is_warning=run.state in (State.FAILED, State.KILLED))]
    if run.attempts:
        blocks.append(_attempts(run))
    warnings: list[list[Cell]] = [[row["step"], shown(row["warning"])] for row in run.rows if row.get("warning")]
    if warnings:
        more = f"; the last {MAX_WARNINGS} are shown" if len(warnings) > MAX_WARNINGS else ""
        caption = f"Warnings while training: {len(warnings)}{more}"
        blocks.append(Table(caption, ["step", "warning"], warnings[-MAX_WARNINGS:]))
    versions = at(run.start, "versions")
    if isinstance(versions, dict):
        ours = {"this program": run.start["code_version"]} if run.start.get("code_version") else {}
        rows: list[list[Cell]] = [[name, shown(version)] for name, version in (ours | versions).items()]
        blocks.append(Table("Versions of the last attempt", ["package", "version"], rows))
    return Section("ending", "How it went and ended", blocks)


def _attempts(run: RunRecord) -> Table:
    rows: list[list[Cell]] = []
    for attempt in run.attempts:
        start, end = attempt.start, attempt.end or {}
        how = f"{shown(end.get('name'))} ({shown(end.get('code'))})" if attempt.end else "no end is recorded"
        began, ended = (shown(each.get("time")).replace("T", " ")[:19] for each in (start, end))
        last = whole(end.get("last_step"))
        rows.append([str(attempt.number), began, whole(start.get("from_step")), ended, last, how])
    return Table("Attempts", ["attempt", "started (UTC)", "after step", "ended (UTC)", "last step", "how"], rows)


def ending_line(run: RunRecord) -> str:
    """What became of the run, in a sentence or two."""
    if run.total_steps is None:
        where = f"{plural(len(run.rows), 'row')} of steps recorded"
    else:
        where = f"step {run.last_step:,} of {run.total_steps:,} recorded"
    if run.state == State.RUNNING:
        return f"Running: {where}. What follows is as far as it is."
    if run.state == State.NOT_STARTED:
        return "It has not begun: no step and no attempt are recorded."
    if run.state == State.KILLED and not run.ending:
        seen = datetime.fromtimestamp(run.last_sign, UTC).strftime("%Y-%m-%d %H:%M:%S")
        return (
            f"Killed: {where}, and no end; nothing on this machine holds the folder. The last sign of life is of {seen}"
            " (UTC): a run on another machine may be going on. Otherwise repeat the command, and it continues."
        )
    code, reason = whole(run.ending.get("code")), shown(run.ending.get("reason"))
    told = "" if reason in (NOTHING, "finished") else f" {reason}"
    return f"{run.state.capitalize()} with code {code} ({meaning(-1 if code is None else code)}): {where}.{told}"


def figures_of(run: RunRecord) -> list[tuple[str, str]]:
    """What is seen first: value and name."""
    losses, held_out = run.values("train/loss"), run.held_out.values
    peak = max(run.values("memory/peak_reserved_gib"), default=None)
    of = f" of {run.total_steps:,}" if run.total_steps is not None else ""
    told = [
        (f"{run.last_step:,}{of}", "steps"),
        (f"{losses[0]:.3g} → {losses[-1]:.3g}" if losses else "", "training loss"),
        (f"{min(held_out):.3g}" if held_out else "", "lowest validation loss"),
        (brief(run.median("perf/tokens_per_second")), "tokens/s, median"),
        (f"{peak:.2f} GiB" if peak else "", "peak memory reserved"),
        (span(run.seconds), "from start to end"),
    ]
    return [(value, name) for value, name in told if value not in ("", NOTHING)]


def loading_section(run: RunRecord) -> Section:
    """How the result is loaded and handed on."""
    final, folder, title = run.folder.final, shlex.quote(str(run.folder.path)), "How to load it"
    if not final.is_dir():
        missing = f"{final.name}/ is not there yet: it is written when training has ended. Repeat the command to go on."
        return Section("loading", title, [Text(missing)])
    tokenizer = f"tokenizer = AutoTokenizer.from_pretrained({str(final)!r})"
    kind = "AutoModelForImageTextToText" if run.base.get("served_as") else "AutoModelForCausalLM"
    imports = f"from transformers import {kind}, AutoTokenizer"
    if at(run.config, "train", "method") == "full":
        model = f"model = AutoModelForCausalLM.from_pretrained({str(final)!r})"
        whole_imports = "from transformers import AutoModelForCausalLM, AutoTokenizer"
        return Section("loading", title, [Code("\n".join([whole_imports, "", model, tokenizer]))])
    base, commit = run.base.get("name") or at(run.config, "model", "name_or_path"), run.base.get("commit")
    revision = f", revision={shown(commit)!r}" if commit else ""
    vocabulary = whole(run.base.get("vocabulary"))
    lines = [
        "from peft import PeftModel",
        imports,
        "",
        f'base = {kind}.from_pretrained({shown(base)!r}{revision}, dtype="bfloat16")',
        *([f"base.resize_token_embeddings({vocabulary})"] if vocabulary else []),
        f"model = PeftModel.from_pretrained(base, {str(final)!r})",
        f"{tokenizer}  # with the chat template that was trained",
    ]
    onto = "original" if at(run.config, "model", "quantization") == "none" else "dequantized"
    commands = [
        f"handloop chat {folder}",
        f"handloop compare {folder}",
        f"handloop merge {folder} --onto {onto}",
        f"handloop export {folder} --format adapter",
    ]
    return Section("loading", title, [Code("\n".join(lines)), Code("\n".join(commands))])


def receipts_section(run: RunRecord) -> Section | None:
    """How merged and exported models differ from what was trained, by their receipts; None where there are none."""
    rows: list[list[Cell]] = []
    for path in run.folder.receipts:
        record, name = read_object(path), path.parent.name
        found = {name: record.get("receipt"), f"{name}, if merge_and_unload did it": record.get("merge_and_unload")}
        files = record.get("files")
        if isinstance(files, dict):
            found |= {f"{name}/{file}": receipt for file, receipt in files.items()}
        rows += [_receipt(what, receipt) for what, receipt in found.items() if isinstance(receipt, dict)]
    if not rows:
        return None
    header = ["model", *RECEIPT.values(), "equal answers"]
    return Section("receipts", "Merged and exported models", [Table("Against what was trained", header, rows)])


def _receipt(name: str, found: dict[str, Any]) -> list[Cell]:
    equal = f"{shown(found.get('equal_answers'))} of {shown(found.get('num_questions'))}"
    return [name, *(number(found.get(key)) for key in RECEIPT), equal]
