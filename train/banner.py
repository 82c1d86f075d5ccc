"""The banner at the start: the arithmetic of the run, in which a wrong number shows at once."""

from data_tools.chat_template import NO_TEMPLATE, PLAIN_TEMPLATE
from data_tools.data_lines import data_lines, data_warnings
from data_tools.prepare import Statistics
from data_tools.terminal import seen_from_here
from train.checkpoints.contents import Checkpoint
from train.config import Config
from train.data import Splits
from train.engine.plan import unshared
from train.grace import grace_warning
from train.memory.reference import ReferencePlan, engine_lines
from train.models.targets import Targets
from train.models.tokenizer import Tokenizer, trained_tokens, unseen_tokens
from train.profiles import GLOSSARY, HELD_OUT, PROFILES
from train.recipe import decided, recipe_warnings
from train.run import devices
from train.run.devices import device_name
from train.run.versions import versions
from train.step import Training

MIN_EXTENSION_RATE = 0.01  # of the peak; below it an extension is hardly training


def banner(training: Training, tokenizer: Tokenizer, splits: Splits, checkpoint: Checkpoint | None) -> str:
    """Lines on the model, the data, the batch arithmetic, memory and versions, and warnings."""
    is_plain = tokenizer.backend.chat_template == PLAIN_TEMPLATE
    config, data, about = training.config, training.data, training.model.about
    prepared, validation = splits.training.prepared, splits.validation
    statistics = prepared.statistics
    trainable = sum(p.numel() for p in training.parameters.values())
    device = training.accelerator.device
    compute = devices.compute_type(config.model.dtype, device)
    start = f"continues after step {checkpoint.state.step}" if checkpoint else "starts fresh"
    lines = [
        f"profile   {config.profile}: {_base(config)}, compute in {compute.name}"
        + (f" ({compute.reason})" if compute.reason else ""),
        f"device    {device_name(device)}"
        + (f", capped at {config.memory.budget}" if config.memory.budget and device.type == "cuda" else ""),
        *_choices(training),
        *(f"kernels   {line}" for line in (devices.kernel_fallbacks(device) if training.plan.is_fused else [])),
        f"weights   {about.held}",
        *(f"base      {note}" for note in about.notes),
        f"trained   {_trained(config, about.targets)}: {trainable:,} trainable parameters",
        *_trained_beside(config),
        f"data      {', '.join(map(seen_from_here, config.data.path))}: {statistics.num_records:,} records "
        f"({' and '.join(statistics.formats)}), {len(data.samples):,} samples"
        + (f", {len(validation.samples):,} held out for validation" if validation else ""),
        *data_lines(statistics, prepared.notes),
        *_template_arguments(config),
        f"tokens    {sum(data.row_tokens):,} per epoch, {data.supervised_tokens_per_epoch():,} of them trained",
        f"batch     {data.layout.arithmetic()}" + _executed(training),
        f"memory    {training.plan}",
        *(f"          {line}" for line in [unshared(training.plan, config.memory)] if line),
        *_parts(training),
        *_packing(training),
        f"steps     {data.steps_per_epoch:,} per epoch, {training.total_steps:,} in all{_limit(training)}; {start}",
        f"optimizer {config.optim.name}, lr {config.optim.lr:g} {config.optim.schedule}, "
        f"warmup {training.schedule.warmup:,} steps"
        + (f", B at {config.optim.lora_plus_ratio:g} times the rate" if config.optim.lora_plus_ratio != 1 else ""),
        *_extensions(training),
        *(f"tokenizer {note}" for note in tokenizer.notes),
        "versions  " + ", ".join(f"{name} {number}" for name, number in versions().items()),
    ]
    return "\n".join([*lines, *_warnings(training, splits, is_plain)])


def _trained(config: Config, targets: Targets) -> str:
    if config.train.method == "full":
        return "every weight, in fp32 (train.method full; lora.* is not read)"
    lora = config.lora
    kind, scale = ("rsLoRA", lora.alpha / lora.r**0.5) if lora.rslora else ("LoRA", lora.alpha / lora.r)
    start = f", from {lora.init_from}," if lora.init_from else ""
    settings = f"r={lora.r} alpha={lora.alpha} (scale {scale:.3g}) dropout={lora.dropout}"
    return f"{kind} {settings}{start} on {_targets(targets)}"


def _trained_beside(config: Config) -> list[str]:
    """What is trained beside the adapters."""
    tokens, layers = config.lora.trainable_tokens, config.lora.modules_to_save
    lines = [f"          and the rows of {len(tokens)} tokens: {' '.join(tokens)}"] if tokens else []
    return lines + ([f"          and whole, in fp32: {', '.join(layers)}"] if layers else [])


def _targets(targets: Targets) -> str:
    """Each word of lora.target_modules with the number of layers that it stands for."""
    if sum(targets.counts.values()) == targets.num_layers and len(targets.counts) > 1:
        return f"all {targets.num_layers} linear layers ({', '.join(targets.counts)})"
    counted = [f"{word} ({count})" for word, count in targets.counts.items()]
    return f"{', '.join(counted)} of {targets.num_layers} linear layers"


def _limit(training: Training) -> str:
    """Which limit decided the number of steps, where two are given."""
    told = decided(training.config.train, training.data.steps_per_epoch)
    return f" ({told})" if told else ""


def _extensions(training: Training) -> list[str]:
    """The decays by which the run was extended."""
    shape, lines = training.config.optim.schedule, []
    for decay in training.schedule.extensions:
        new = f"new {shape} decay from {decay.rate:.2g} to step {decay.end:,}"
        lines.append(f"schedule  extended after step {decay.start:,}: {new}")
    return lines


def _parts(training: Training) -> list[str]:
    """The parts of the predicted peak."""
    parts = [f"{name} {num_bytes / 2**30:.2f}" for name, num_bytes in training.plan.parts if num_bytes >= 2**20]
    return [f"          GiB: {', '.join(parts)}"] if parts else []


def _template_arguments(config: Config) -> list[str]:
    """The profile's, where they are left out: another base or template does not read them, or none was asked for."""
    profile = PROFILES.get(config.profile)
    arguments = profile().data.template_arguments if profile is not None else ()
    if not arguments or config.data.template_arguments:
        return []
    told = " ".join(arguments)
    return [f"template  the profile's {told} is left out; if the template reads it: --data.template_arguments {told}"]


def _packing(training: Training) -> list[str]:
    data, max_length = training.data, training.config.data.max_length
    if not data.packed:
        return []
    filled = f"{data.fill_rate(max_length):.1%} filled"
    lines = [f"packing   {len(data.samples):,} samples in {len(data.rows):,} rows of {max_length} tokens, {filled}"]
    profile = PROFILES.get(training.config.profile)
    if profile is not None and profile().data.group_by_length:
        lines.append("          in place of data.group_by_length, which the profile sets")
    return lines


def _choices(training: Training) -> list[str]:
    """What was chosen on the reference engine, and why."""
    plan = training.plan
    if not isinstance(plan, ReferencePlan):
        return []
    return engine_lines(training.reference_reason, plan.choices)


def _executed(training: Training) -> str:
    """How the first step's batch is divided into micro-batches, where none is padded."""
    if not training.data.is_packed(training.plan):
        return ""
    sizes = [batch.input_ids.numel() for batch in training.data.batch(0, training.plan).micro_batches]
    batches = "1 micro-batch of" if len(sizes) == 1 else f"{len(sizes)} micro-batches of up to"
    return f", executed without padding: the first step as {batches} {max(sizes):,} tokens"


def _base(config: Config) -> str:
    weights = "random weights" if config.model.random_init else "frozen"
    weights = "trained whole" if config.train.method == "full" else weights
    return f"{seen_from_here(config.model.name_or_path)} ({weights})"


def _warnings(training: Training, splits: Splits, is_plain: bool) -> list[str]:
    """What a user should know before waiting for the result."""
    config, lines = training.config, []
    statistics = splits.training.prepared.statistics
    if warning := devices.int8_warning(config.model.quantization, training.accelerator.device):
        lines.append(f"warning   {warning}")
    if config.data.path == (GLOSSARY,) and config.profile not in HELD_OUT:
        lines.append("warning   without --data.path, this run trains on the bundled glossary")
    if training.plan.seconds and (warning := _slow_stop(training)):
        lines.append(f"warning   {warning}")
    if unseen := unseen_tokens(splits.training.samples, trained_tokens(config)):
        lines.append(
            f"warning   {len(unseen)} of lora.trainable_tokens are in no sample, so that their embedding stays as it "
            f"starts: {' '.join(config.lora.trainable_tokens[place] for place in unseen)}"
        )
    if is_plain:
        lines.append(f"warning   {NO_TEMPLATE}")
    lines += [f"warning   {line}" for line in _lost(config, statistics)]
    if config.data.validation_path and splits.validation is not None:
        lost = _lost(config, splits.validation.prepared.statistics)
        lines += [f"warning   validation: {line}" for line in lost]
    data, schedule = training.data, training.schedule
    recipe = recipe_warnings(config, len(data.samples), data.steps_per_epoch, training.total_steps, schedule.warmup)
    lines += [f"warning   {warning}" for warning in recipe]
    last = training.schedule.decays[-1]
    if last.rate < MIN_EXTENSION_RATE * config.optim.lr:
        lines.append(
            f"warning   the extension begins at {last.rate / config.optim.lr:.2g} of the peak learning rate, where the "
            "run had nearly ended, so its steps will hardly change the adapters; a longer run from the start "
            "(--run.resume never) learns more"
        )
    return lines


def _slow_stop(training: Training) -> str:
    """A warning if a micro-batch is predicted to take longer than who stops the run will wait."""
    num_micro_batches = len(training.data.batch(0, training.plan).micro_batches)
    return grace_warning(training.config.run, training.plan.seconds / num_micro_batches, save_seconds=0.0)


def _lost(config: Config, statistics: Statistics) -> list[str]:
    """What of the data is not in the samples."""
    longer = f"longer than data.max_length = {config.data.max_length} tokens (data.truncation {config.data.truncation})"
    lines = []
    if statistics.num_dropped:
        dropped = f"{statistics.num_dropped} of {statistics.num_records} records were dropped"
        lines.append(f"{dropped}: {longer}, or without a supervised token; handloop audit names them")
    if statistics.num_cut_answers:
        cut = f"{statistics.num_cut_answers} of {statistics.num_records} records lost an answer or part of one"
        lines.append(f"{cut}: {longer}")
    if statistics.num_skipped:
        lines.append(f"{statistics.num_skipped} bad records were skipped (data.on_error skip):")
        lines += [f"  {line}" for line in statistics.skipped]
    return [*lines, *data_warnings(statistics)]
