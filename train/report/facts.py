"""What a run was made of, as sections of the page."""

from typing import Any

from train.report.blocks import Block, Cell, Facts, Section, Table, Text
from train.report.record import RunRecord
from train.report.summary import NOT_COMPARED, flat, profile_of
from train.report.values import NOTHING, at, number, shown, texts, whole

GIB = 2**30
COUNTS = {
    "num_records": "records read",
    "num_samples": "samples made of them",
    "num_training_samples": "samples trained on",
    "num_tokens": "tokens in all samples",
    "tokens_per_epoch": "tokens an epoch",
    "supervised_tokens_per_epoch": "of them trained",
    "num_dropped": "records dropped: too long, or without a supervised token",
    "num_cut_answers": "records whose answer was cut",
    "num_rewritten": "records that the template renders otherwise",
    "num_history_tokens": "tokens of earlier turns that are seen again",
    "num_left_out_turns": "turns left out",
    "num_empty_reasonings": "empty think blocks, not trained",
    "num_skipped": "bad records skipped",
}


def batch_line(run: RunRecord) -> str:
    """The batch arithmetic, as the banner says it; empty where the options are not known."""
    sizes = [whole(at(run.config, "batch", name)) for name in ("per_device", "accumulation")]
    num_processes = whole(run.start.get("num_processes"))
    group = whole(at(run.config, "batch", "context_parallel")) or 1
    per_device, accumulation = sizes
    if per_device is None or accumulation is None or num_processes is None:
        return ""
    processes = f"process{'es' if num_processes > 1 else ''}" + (f" in groups of {group}" if group > 1 else "")
    product = per_device * accumulation * num_processes // group
    samples = whole(at(run.config, "batch", "samples")) or product
    factors = f"{per_device} per device x {accumulation} accumulated x {num_processes} {processes}"
    text = f"{factors} = {samples} samples a step"
    if samples != product:
        text = f"{samples} samples a step in uneven shares, of at most {factors}"
    tokens, steps = (number(at(run.start, "data", name)) for name in ("tokens_per_epoch", "steps_per_epoch"))
    if tokens and steps:
        text += f", {tokens / steps:,.0f} tokens a step on average"
    is_packed = at(run.plan, "is_fused") or at(run.plan, "layout") == "unpadded"
    if is_packed and (most := whole(at(run.plan, "micro_batch_tokens"))):
        text += f"; executed without padding, in micro-batches of up to {most:,} tokens"
    return text


def trained_section(run: RunRecord) -> Section:
    """What was trained on what."""
    data = at(run.config, "data") or {}
    rows = [
        ("base", _base(run)),
        ("weights", _weights(run)),
        ("method", _method(run)),
        ("data", " ".join(texts(at(data, "path")))),
        ("read", _counts(run)),
        ("held out", _held_out(run)),
        ("batch", batch_line(run)),
        ("steps", _steps(run)),
        ("optimizer", _optimizer(run)),
        ("device", shown(run.start.get("device"))),
        ("engine", " ".join(filter(None, (shown(run.plan.get("engine")), _because(run))))),
        ("memory plan", shown(run.plan.get("summary"))),
    ]
    known: list[Block] = [Facts([(name, value) for name, value in rows if value and value != NOTHING])]
    missing = [name for name, value in rows if not value or value == NOTHING]
    if missing:
        known.append(Text(f"Not recorded in this folder: {', '.join(missing)}."))
    return Section("trained", "What was trained on what", known)


def _because(run: RunRecord) -> str:
    return f"({run.plan['reason']})" if run.plan.get("reason") else ""


def _base(run: RunRecord) -> str:
    name = at(run.config, "model", "name_or_path") or run.base.get("name")
    commit = at(run.start, "base", "commit") or run.base.get("commit")
    if not name:
        return ""
    return f"{shown(name)}{f' (commit {shown(commit)})' if commit else ''}"


def _weights(run: RunRecord) -> str:
    weights = at(run.start, "base", "weights")
    kinds = at(weights, "quantized")
    told = [
        f"{count:,} in {kind}" for kind, count in (kinds.items() if isinstance(kinds, dict) else []) if whole(count)
    ]
    others = at(weights, "others")
    rest = [(part, count) for part, count in (others.items() if isinstance(others, dict) else []) if whole(count)]
    if rest:
        kind = shown(at(weights, "type_of_others"))
        told.append(f"{sum(count for _, count in rest):,} in {kind} ({', '.join(part for part, _ in rest)})")
    if total := whole(at(weights, "total")):
        return f"{total:,}: {', '.join(told)}" if told else f"{total:,}"
    quantization = at(run.config, "model", "quantization")
    return f"quantisation {shown(quantization)}" if quantization else ""


def _counted(value: Any) -> dict[str, int]:
    """Names with counts; what is none is left out."""
    return {name: count for name, count in value.items() if whole(count)} if isinstance(value, dict) else {}


def _method(run: RunRecord) -> str:
    lora = at(run.config, "lora")
    if at(run.config, "train", "method") == "full":
        return "every weight, in fp32 (full fine-tuning)"
    r, alpha = number(at(lora, "r")), number(at(lora, "alpha"))
    if not r or alpha is None:
        return ""
    is_rs = bool(at(lora, "rslora"))
    scale = alpha / r**0.5 if is_rs else alpha / r
    counts = _counted(at(run.start, "base", "adapted_layers"))
    on = ", ".join(f"{name} ({count})" for name, count in counts.items()) or shown(at(lora, "target_modules"))
    text = f"{'rsLoRA' if is_rs else 'LoRA'} r={r:g} alpha={alpha:g} (scale {scale:.3g})"
    beside = [*texts(at(lora, "trainable_tokens")), *texts(at(lora, "modules_to_save"))]
    also = f"; beside them {', '.join(beside)}" if beside else ""
    return f"{text} dropout={shown(at(lora, 'dropout'))} on {on}{also}"


def _counts(run: RunRecord) -> str:
    data = at(run.start, "data")
    told = [
        f"{count:,} {what}"
        for name, what in (
            ("num_records", "records"),
            ("num_training_samples", "training samples"),
            ("tokens_per_epoch", "tokens an epoch"),
            ("supervised_tokens_per_epoch", "of them trained"),
        )
        if (count := whole(at(data, name))) is not None
    ]
    formats = texts(at(data, "formats"))
    return ", ".join(told) + (f" ({', '.join(formats)})" if formats and told else "")


def _held_out(run: RunRecord) -> str:
    paths = texts(at(run.config, "data", "validation_path"))
    made, trained = (whole(at(run.start, "data", name)) for name in ("num_samples", "num_training_samples"))
    if paths:
        return " ".join(paths)
    share = number(at(run.config, "data", "validation_fraction"))
    if not share:
        return "nothing" if run.config else ""
    count = f": {made - trained:,} samples" if made is not None and trained is not None else ""
    return f"{share:.3g} of the data{count}"


def _steps(run: RunRecord) -> str:
    per_epoch, total = whole(at(run.start, "data", "steps_per_epoch")), run.total_steps
    if total is None:
        return ""
    epochs = f"{per_epoch:,} an epoch, " if per_epoch else ""
    return f"{epochs}{total:,} planned; {run.last_step:,} recorded"


def _optimizer(run: RunRecord) -> str:
    optim = at(run.config, "optim")
    if not isinstance(optim, dict):
        return ""
    rate = f"{shown(optim.get('name'))}, learning rate {shown(optim.get('lr'))} {shown(optim.get('schedule'))}"
    return f"{rate}, warmup {shown(optim.get('warmup'))}, gradient norm at most {shown(optim.get('max_grad_norm'))}"


def plan_section(run: RunRecord) -> Section | None:
    """What the plan spends memory on, beside what was measured."""
    parts = at(run.plan, "parts")
    rows: list[list[Cell]] = []
    if isinstance(parts, dict):
        rows = [[name, round(count / GIB, 3)] for name, value in parts.items() if (count := number(value))]
    peak = number(run.plan.get("peak_bytes"))
    measured = [max(run.values(f"memory/peak_{kind}_gib"), default=None) for kind in ("allocated", "reserved")]
    if not rows and not any(measured):
        return None
    rows.append(["peak, planned", round(peak / GIB, 3) if peak else None])
    rows += [["peak, allocated", measured[0]], ["peak, reserved by torch", measured[1]]]
    return Section("plan", "Memory: plan and measurement", [Table("GiB on the GPU", ["part", "GiB"], rows)])


def data_section(run: RunRecord) -> Section:
    """What was read of the data, and where the audit is to be had."""
    data, blocks = at(run.start, "data"), list[Block]()
    rows: list[list[Cell]] = [
        [what, count] for name, what in COUNTS.items() if (count := whole(at(data, name))) is not None
    ]
    if rows:
        blocks.append(Table("Records, samples and tokens", ["what", "count"], rows))
    else:
        blocks.append(Text("The attempt's start, which has the counts of the data, is not recorded in this folder."))
    for name, what in (("ignored_fields", "fields that were not read"), ("unread_keys", "keys that were not read")):
        counts = at(data, name)
        if isinstance(counts, dict) and counts:
            blocks.append(Table(what.capitalize(), ["name", "records"], [[key, whole(n)] for key, n in counts.items()]))
    skipped = texts(at(data, "skipped"))
    if skipped:
        blocks.append(Table("Bad records that were skipped", ["place and reason"], [[line] for line in skipped]))
    profile = shown(run.config.get("profile")) if run.config.get("profile") else "NAME"
    again = f"handloop audit --profile {profile}, with the run's options of model and data"
    if run.audit:
        blocks.append(_audit(run.audit))
        blocks.append(Text(f"Which rows these are: {again}."))
    else:
        blocks.append(Text(f"What the audit found is not in the run folder. To see it: {again}."))
    return Section("data", "Data and audit", blocks)


def _audit(lines: list[dict[str, Any]]) -> Table:
    """What the audit counted, for the training and the validation data."""
    splits = list(dict.fromkeys(name for line in lines for name in line if name != "finding"))
    rows: list[list[Cell]] = [
        [shown(line.get("finding")), *(whole(line.get(name)) for name in splits)] for line in lines
    ]
    return Table("What the audit counted before training", ["what", *splits], rows)


def config_section(run: RunRecord) -> Section:
    """The options, those first that the profile has otherwise."""
    options, own = flat(run.config), profile_of(run.config)
    if not options:
        return Section(
            "configuration", "Configuration", [Text(f"{run.folder.config.name} is not there, or damaged.", True)]
        )
    blocks: list[Block] = []
    if own:
        rows: list[list[Cell]] = [
            [name, shown(value), shown(own.get(name))]
            for name, value in options.items()
            if value != own.get(name) and name not in NOT_COMPARED
        ]
        caption = f"Options that differ from the profile {shown(run.config.get('profile'))}"
        blocks.append(Table(caption, ["option", "this run", "profile"], rows) if rows else Text(f"{caption}: none."))
    else:
        blocks.append(Text(f"This version has no profile {shown(run.config.get('profile'))} to compare with."))
    every: list[list[Cell]] = [[name, shown(value)] for name, value in options.items()]
    blocks.append(Table(f"All {len(every)} options", ["option", "value"], every, is_folded=True))
    return Section("configuration", "Configuration", blocks)
