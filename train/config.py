"""What a run is made of: frozen dataclasses, one docstring a field, and every problem found at once."""

import datetime
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

LLAMA_LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_UNITS = {"b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}


def parse_bytes(text: str) -> int:
    """Bytes in a size such as `4GiB` or `3.5 gb`; raises ValueError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)", text.strip())
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError(f"{text!r} is not a size; write for example 4GiB")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def parse_argument(text: str) -> tuple[str, Any]:
    """(name, value) of `name=value`, the value as JSON where it is JSON; raises ValueError for anything else."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise ValueError("write name=value, such as enable_thinking=false")
    if name in ("messages", "tools", "documents", "add_generation_prompt", "strftime_now") or name.endswith("_token"):
        raise ValueError(f"{name} is what the template is given anyway")
    try:
        return name, json.loads(value)
    except ValueError:
        # as Python spells them, which JSON does not
        return name, {"True": True, "False": False, "None": None}.get(value, value)


@dataclass(frozen=True)
class ModelConfig:
    """The frozen base model."""

    name_or_path: str
    """Folder with config.json and safetensors weights, or a hub id."""
    revision: str = "main"
    """Hub branch, tag or commit; a folder has none."""
    quantization: Literal["nf4", "int8", "none"] = "nf4"
    """How the frozen linear layers are stored: NF4 with double quantisation, LLM.int8, or not quantised. Experts that
    the base has in MXFP4 stay so."""
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Compute type of the base. auto: bf16 on GPUs that have it (compute capability 8.0), fp16 with a loss scale on
    older ones whose fp16 is fast (7.x, 6.0, 5.3), fp32 on others and on a CPU."""
    random_init: bool = False
    """Real shape, random weights: only config.json and the tokenizer are read. For probes and benchmarks."""
    max_positions: int = 0
    """Raise the base's max_position_embeddings to this number, for samples longer than it was made for; 0: as
    config.json says. Where positions are a learned table, or rotary scaling depends on it, that is refused."""


@dataclass(frozen=True)
class LoraConfig:
    """The trained low-rank adapters (Hu et al. 2021)."""

    r: int = 8
    """Rank."""
    alpha: int = 16
    """Scale: the adapter's output is multiplied by alpha / r."""
    rslora: bool = False
    """Multiply by alpha / sqrt(r) instead (rsLoRA, Kalajdzievski 2023): a higher rank then learns no slower."""
    dropout: float = 0.0
    """Probability that an element of an adapter's input is zeroed while training."""
    target_modules: tuple[str, ...] = LLAMA_LINEAR_LAYERS
    """Linear layers that get an adapter: ends of their names, regular expressions over whole names, or all-linear."""
    init_from: str = ""
    """Folder of an adapter that a new run starts from, with the same rank, scale and layers: a run folder, its final/,
    a checkpoint, or what PEFT has saved. Learning rate and optimizer start anew."""
    trainable_tokens: tuple[str, ...] = ()
    """Tokens whose rows of embedding and head are trained with the adapter. Those that the tokenizer lacks are added to
    it, and start as the mean of all rows; written <|so|>, they are special tokens, for a chat template to use."""
    modules_to_save: tuple[str, ...] = ()
    """Layers trained whole in fp32 and saved with the adapter: lm_head, embed_tokens, or both. 12 to 18 bytes a weight
    on the GPU; for a new language or script, where the rows of a few tokens are not enough."""


@dataclass(frozen=True)
class DataConfig:
    """What is trained on."""

    path: tuple[str, ...]
    """Files (.jsonl .json .csv .parquet .txt .md, also compressed), folders, globs, or hub data sets (owner/name,
    :split or :subset:split); repeatable."""
    weights: tuple[float, ...] = ()
    """How often each path's samples are seen in an epoch, one number a path; a part such as 0.5 leaves some out."""
    format: Literal["auto", "text", "prompt_response", "messages", "alpaca", "sharegpt"] = "auto"
    """auto: by the fields of each file's first row; .txt and .md files are text."""
    fields: tuple[str, ...] = ()
    """Names of the columns of a prompt/response data set: prompt=COLUMN response=COLUMN."""
    on_error: Literal["stop", "skip"] = "stop"
    """What a bad record does: end the run before it starts, or be skipped, counted and named."""
    gate: Literal["stop", "warn"] = "stop"
    """What the audit at the start does when it finds a reason not to train on the data (see handloop audit)."""
    validation_path: tuple[str, ...] = ()
    """Files like `path`, never trained on."""
    validation_fraction: float = 0.0
    """Share of the records (rows, or whole text files) held out of `path` when validation_path is empty."""
    chat_template: str = ""
    """Jinja file used instead of the tokenizer's own chat template."""
    template_arguments: tuple[str, ...] = ()
    """What the chat template is given beside the conversation, such as enable_thinking=false; a row's own
    chat_template_kwargs come on top."""
    history: Literal["each", "last", "refuse"] = "each"
    """Where the template renders earlier answers otherwise than the last one: each is a sample as it would be
    generated, or the last answer alone is trained, or the conversation is refused."""
    empty_reasoning: Literal["mask", "train"] = "mask"
    """An empty think block before an answer without reasoning is context, or is trained."""
    leave_out: tuple[Literal["reasoning", "system", "tools"], ...] = ()
    """Parts of the rows' conversations that are not wanted: neither rendered nor trained."""
    date: str = "auto"
    """The day (YYYY-MM-DD) for templates that ask for it; auto: the day on which the run started."""
    max_length: int = 1024
    """Tokens in a sample at most. Text is cut into such pieces; for longer conversations see truncation."""
    truncation: Literal["drop", "left", "right", "split"] = "drop"
    """A conversation longer than max_length is dropped, loses its beginning, ends after its last whole answer, or is
    split into pieces."""
    packing: bool = False
    """Pack several samples into one row of max_length tokens; none sees another. batch.per_device then counts rows."""
    group_by_length: bool = False
    """Put samples of similar length into one step, so that less is padding; the steps stay shuffled."""
    text_overlap: float = 0.125
    """Share of a piece of text that repeats the piece before it, as context that is not trained again."""


@dataclass(frozen=True)
class BatchConfig:
    """Samples in one optimizer step = per_device x accumulation x processes, or as batch.samples says."""

    per_device: int = 2
    """Samples in one micro-batch of one process."""
    accumulation: int = 4
    """Micro-batches in one optimizer step (gradient accumulation); 0: as many as batch.samples takes."""
    samples: int = 0
    """Samples in one optimizer step, on any number of processes: batch.accumulation follows, and what does not divide
    evenly is dealt unevenly; 0: per_device x accumulation x processes."""
    context_parallel: int = 1
    """GPUs of a machine that share each micro-batch's tokens, for rows longer than one has memory for; such a group
    counts as one process. It divides attention's query heads. The fused engine only."""
    merge: Literal["auto", "off"] = "auto"
    """auto: a step's samples run as fewer, larger micro-batches without padding where memory allows and none sees
    another; off: literally per_device x accumulation, padded on the reference engine."""


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer of the adapters, and its learning rate."""

    name: Literal["paged_adamw_8bit", "adamw_8bit", "adamw"] = "paged_adamw_8bit"
    """bitsandbytes' 8-bit AdamW with or without paging, or torch's fp32 AdamW."""
    lr: float = 1e-4
    """Peak learning rate."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Shape of the decay from the end of the warmup to the last step."""
    warmup: int | float = 0
    """Optimizer steps over which the learning rate rises linearly to its peak: a number, or a share of the run such as
    0.1, rounded up."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; inf turns clipping off."""
    lora_plus_ratio: float = 1.0
    """The adapters' B learn at this multiple of the learning rate (LoRA+, Hayou et al. 2024); 1: as A does."""


@dataclass(frozen=True)
class TrainConfig:
    """What is trained, how long, and from which seed."""

    method: Literal["lora", "full"] = "lora"
    """lora: adapters on a frozen base. full: every weight of the language model, in fp32 with products in model.dtype,
    on the reference engine; 10 to 16 bytes a weight. final/ is then a model, and lora.* is not read."""
    epochs: int = 3
    """Passes over the data."""
    max_steps: int = 0
    """Stop after this many optimizer steps, if that comes before the last epoch's end; 0 is no limit."""
    seed: int = 0
    """Seed of the sample order, the adapters' start and dropout."""
    max_skipped_steps: int = 10
    """Steps that may be skipped because their loss or gradient was not finite, three of them in a row at most; one
    more ends the run. 0 ends it at the first."""


@dataclass(frozen=True)
class MemoryConfig:
    """What is kept on the device."""

    checkpointing: Literal["auto", "full", "none"] | int = "auto"
    """Decoder blocks whose activations are recomputed in the backward pass: all but the last (full), none, or a number;
    auto: as few as memory needs. The reference engine recomputes all (so for a number, and auto on a CPU) or none."""
    budget: str = ""
    """Hard cap on the device memory that the allocator may take, such as 4GiB; empty is all that is free. What is kept,
    recomputed, streamed and split follows from it (handloop plan)."""
    shard: bool = False
    """Each GPU of the machine holds an equal part of the packed weights and reads the others' when it needs them: for a
    base that is too large for one. All have the same adapters and optimizer. The fused engine only."""
    offload: Literal["auto", "none", "stream"] = "auto"
    """Decoder blocks whose weights are streamed from host memory: as many as memory needs, none, or all. The fused
    engine only."""


@dataclass(frozen=True)
class EngineConfig:
    """What runs the decoder blocks."""

    kind: Literal["auto", "fused", "reference"] = "auto"
    """fused: our own forward and backward of Llama-family blocks; reference: transformers and PEFT. auto: fused on a
    GPU where that is possible, and a line that says why where it is not."""
    products: Literal["bf16", "fp8"] = "bf16"
    """How the fused engine multiplies with the frozen NF4 weights: in model.dtype (bf16), or weights, activations and
    gradients rounded to fp8 (e4m3), on GPUs of compute capability 8.9 or higher. Adapters and head stay in bf16."""
    liger: Literal["auto", "off"] = "auto"
    """auto: on a GPU the reference engine takes liger-kernel's norms, MLPs and rotary embeddings, where the package is
    installed, knows the family and agrees with transformers on a sample; off: transformers' own."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written, and which stay."""

    every: Literal["epoch"] | int | float = "epoch"
    """At each epoch's end, every N optimizer steps, or a share of an epoch such as 0.25; always at the end."""
    minutes: float = 0.0
    """Also this many minutes after the last one; 0: never by the clock."""
    keep: int = 2
    """Newest verified checkpoints that stay; at least 2, so that one always stands while another is written. The one
    with the lowest validation loss stays beside them."""
    mirror: str = ""
    """Where checkpoints are copied in the background, for machines that vanish: s3://BUCKET/PREFIX, gs://BUCKET/PREFIX,
    or file:///FOLDER. A machine whose run folder is empty goes on from the newest that is whole there."""


@dataclass(frozen=True)
class ValidateConfig:
    """What is measured on held-out data while training, and what follows from it."""

    every: Literal["epoch"] | int | float = "epoch"
    """At each epoch's end, every N optimizer steps, or a share of an epoch such as 0.25; and at the end."""
    at_start: bool = True
    """Also before the first step."""
    tokens: int = 0
    """Measure on about this many tokens of the held-out data, the same samples each time; 0: on all."""
    general_text: str = "bundled"
    """Text file on which forgetting is measured; the small bundled one (where data are held out); or off."""
    num_questions: int = 4
    """Held-out questions that are answered at each validation, by the base and by the model as it is; 0: none."""
    max_new_tokens: int = 64
    """Such an answer ends here at the latest."""
    patience: int = 0
    """Stop after this many validations in a row without an improvement of the loss; 0: never."""
    min_improvement: float = 0.0
    """A fall of the validation loss below the lowest so far must be greater than this to count for patience."""
    target_loss: float = 0.0
    """Stop when the validation loss is as low as this; 0: never."""
    final: Literal["last", "best"] = "last"
    """What final/ is made of: the last step, or the checkpoint with the lowest validation loss."""

    @property
    def needs_held_out(self) -> list[tuple[str, object]]:
        """The options that are set and mean nothing without held-out data."""
        wanted: dict[str, object] = {
            "validate.patience": self.patience,
            "validate.target_loss": self.target_loss,
            "validate.tokens": self.tokens,
            "validate.every": self.every if self.every != "epoch" and self.general_text in ("bundled", "off") else "",
            "validate.final": "best" if self.final == "best" else "",
        }
        return [(option, value) for option, value in wanted.items() if value]


@dataclass(frozen=True)
class RunConfig:
    """Where and on what."""

    dir: str
    """The run folder; repeating the command with the same folder resumes."""
    resume: str = "auto"
    """auto: from the newest valid checkpoint if there is one; must: fail without one; never: start again (the
    earlier run is kept in previous-N); or the path of one checkpoint folder."""
    extend: bool = False
    """Where train.epochs or train.max_steps differ from the checkpoint's and the schedule depends on them: go on with a
    further decay of the same shape, from the last learning rate to the new end."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """cuda refuses to start without a GPU; auto takes a GPU if there is one."""
    timeout_minutes: float = 10.0
    """How long a process waits for the others before it gives up; several processes only."""
    grace_seconds: float = 30.0
    """What a scheduler gives between its stop signal and the kill; a run that would need longer says so."""
    deterministic: bool = False
    """Only deterministic kernels, at some cost in speed: then resumed runs on a GPU are bitwise equal, as on a CPU."""


@dataclass(frozen=True)
class TrackConfig:
    """Who watches. metrics.jsonl in the run folder is always written."""

    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    """Weights & Biases. auto: what WANDB_DISABLED, WANDB_MODE, `wandb offline` or `wandb disabled` say; otherwise
    online with a key (WANDB_API_KEY or netrc), else recorded offline for a later sync."""
    project: str = ""
    """Project at Weights & Biases, experiment at MLflow; empty: WANDB_PROJECT, MLFLOW_EXPERIMENT_NAME, or handloop."""
    wandb_artifact: bool = False
    """Send final/ to Weights & Biases at the end, as an artifact; the run waits for it for ten minutes at most."""
    mlflow: str = "off"
    """off; on: where MLFLOW_TRACKING_URI says, or mlflow.db in the working directory; or a server's address."""
    tensorboard: bool = False
    """Write event files for TensorBoard into the run folder."""


@dataclass(frozen=True)
class CompareConfig:
    """Questions answered at the end, without and with the adapters (conversations only)."""

    num_questions: int = 8
    """Ask the first N rows of data.path, and of data.validation_path; 0 asks none."""
    max_new_tokens: int = 128
    """An answer ends here at the latest, and then counts as not stopped."""
    general_questions: str = "off"
    """File of further questions, rows or a question a line, that show what is forgotten; the bundled ones; or off."""


@dataclass(frozen=True)
class Config:
    """A whole run."""

    profile: str
    """Name of the profile that this configuration started from."""
    model: ModelConfig
    data: DataConfig
    run: RunConfig
    lora: LoraConfig = field(default_factory=LoraConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validate: ValidateConfig = field(default_factory=ValidateConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
    compare: CompareConfig = field(default_factory=CompareConfig)

    def problems(self) -> list[str]:
        """Every impossible value, one line each: the option, its value, and what would work."""
        return [f"--{option} {value}: {remedy}" for option, value, remedy in self._checks()]

    def _checks(self) -> Iterator[tuple[str, object, str]]:
        yield from self._number_checks()
        yield from self._warmup_checks()
        yield from self._range_checks()
        yield from self._place_checks()
        yield from self._data_checks()
        yield from self._target_checks()
        yield from self._token_checks()
        yield from self._method_checks()
        yield from self._interval_checks()
        yield from self._mirror_checks()
        yield from self._validation_checks()
        yield from self._track_checks()
        if isinstance(self.memory.checkpointing, int):
            if self.memory.checkpointing < 0:
                yield "memory.checkpointing", self.memory.checkpointing, "must be at least 0, or auto, full, none"
            elif self.memory.checkpointing and self.engine.kind == "reference":
                remedy = "engine.kind reference recomputes all blocks or none; write full or none"
                yield "memory.checkpointing", self.memory.checkpointing, remedy
        if self.batch.context_parallel > 1 and self.engine.kind == "reference":
            remedy = "only the fused engine splits rows; use --engine.kind auto"
            yield "batch.context_parallel", self.batch.context_parallel, remedy
        yield from self._products_checks()
        if self.memory.offload == "stream" and self.engine.kind == "reference":
            yield "memory.offload", "stream", "only the fused engine streams; use --engine.kind auto"
        if self.memory.shard and self.engine.kind == "reference":
            yield "memory.shard", "true", "only the fused engine shards; use --engine.kind auto"
        if self.memory.budget:
            try:
                parse_bytes(self.memory.budget)
            except ValueError as error:
                yield "memory.budget", self.memory.budget, str(error)

    def _products_checks(self) -> Iterator[tuple[str, object, str]]:
        if self.engine.products != "fp8":
            return
        option = "engine.products fp8 with --"
        if self.engine.kind == "reference":
            yield f"{option}engine.kind", "reference", "only the fused engine has them; use --engine.kind auto"
        if self.model.quantization != "nf4":
            yield f"{option}model.quantization", self.model.quantization, "they are those of NF4 weights; use nf4"
        if self.model.dtype in ("fp16", "fp32"):
            yield f"{option}model.dtype", self.model.dtype, "fp8 products give bf16; use auto"

    def _token_checks(self) -> Iterator[tuple[str, object, str]]:
        tokens = self.lora.trainable_tokens
        for token in tokens:
            if not token or token != token.strip():
                yield "lora.trainable_tokens", repr(token), "a token has no white space at its ends"
        twice = sorted({token for token in tokens if tokens.count(token) > 1})
        if twice:
            yield "lora.trainable_tokens", " ".join(twice), "is there twice"

    def _track_checks(self) -> Iterator[tuple[str, object, str]]:
        place = self.track.mlflow
        if self.track.wandb_artifact and self.track.wandb == "off":
            yield "track.wandb_artifact", True, "there is no Weights & Biases with --track.wandb off; leave one out"
        if not re.fullmatch(r"off|on|databricks|[a-z0-9+-]+://.+", place):
            yield "track.mlflow", place, "write off, on, or an address such as http://127.0.0.1:5000"
        elif re.match(r"[^/]+://[^/@]*:[^/@]*@", place):
            reason = "a password here is read by everybody: use MLFLOW_TRACKING_PASSWORD, or on and MLFLOW_TRACKING_URI"
            yield "track.mlflow", place.partition("://")[0] + "://...", reason

    def _method_checks(self) -> Iterator[tuple[str, object, str]]:
        if self.train.method != "full":
            return
        if self.model.quantization != "none":
            reason = "full trains weights that are not quantised; add --model.quantization none"
            yield "train.method full with --model.quantization", self.model.quantization, reason
        split = self.batch.context_parallel if self.batch.context_parallel > 1 else ""
        of_engine = {"engine.kind": self.engine.kind, "memory.offload": self.memory.offload}
        for option, value in (of_engine | {"batch.context_parallel": split}).items():
            if value in ("fused", "stream", split) and value:
                yield option, value, "the fused engine trains adapters alone; leave it out with --train.method full"
        of_adapters = {
            "lora.init_from": self.lora.init_from,
            "lora.trainable_tokens": " ".join(self.lora.trainable_tokens),
            "lora.modules_to_save": " ".join(self.lora.modules_to_save),
            "optim.lora_plus_ratio": self.optim.lora_plus_ratio if self.optim.lora_plus_ratio != 1 else "",
        }
        for option, value in of_adapters.items():
            if value:
                yield option, value, "belongs to adapters; leave it out with --train.method full"

    def _interval_checks(self) -> Iterator[tuple[str, object, str]]:
        for option, every in (("validate.every", self.validate.every), ("checkpoint.every", self.checkpoint.every)):
            if isinstance(every, float) and not 0 < every <= 1:
                yield option, every, "a share of an epoch is greater than 0 and at most 1"
            elif isinstance(every, int) and every < 1:
                yield option, every, "must be at least 1 step, a share such as 0.25, or epoch"

    def _mirror_checks(self) -> Iterator[tuple[str, object, str]]:
        scheme, separator, place = self.checkpoint.mirror.partition("://")
        if not self.checkpoint.mirror:
            return
        # s3://KEY:SECRET@BUCKET, in which a secret may have slashes, or a signed address
        if re.search(r"[@?#]" if scheme == "file" else r"[@?#:]", place):
            remedy = "an address holds no credentials: give them in the environment, or in the cloud's own files"
            yield "checkpoint.mirror", f"{scheme[:8]}://...", remedy
        elif not separator or scheme not in ("s3", "gs", "file"):
            yield "checkpoint.mirror", self.checkpoint.mirror, "write s3://BUCKET/PREFIX, gs://..., or file:///FOLDER"
        elif scheme == "file" and not re.match(r"/[^/]", place):
            yield "checkpoint.mirror", self.checkpoint.mirror, "write a whole path: file:///FOLDER"
        elif scheme != "file" and not re.fullmatch(r"[\w.-]+(/[^/]+)+/?", place):
            yield "checkpoint.mirror", self.checkpoint.mirror, f"write {scheme}://BUCKET/PREFIX, a folder for this run"

    def _validation_checks(self) -> Iterator[tuple[str, object, str]]:
        settings = self.validate
        if not (self.data.validation_path or self.data.validation_fraction):
            for option, value in settings.needs_held_out:
                yield (
                    option,
                    value,
                    "needs held-out data: --data.validation_fraction 0.1 or --data.validation_path FILE",
                )
        if settings.min_improvement and not settings.patience:
            yield "validate.min_improvement", settings.min_improvement, "belongs to --validate.patience; give it, too"
        for option, value in (("min_improvement", settings.min_improvement), ("target_loss", settings.target_loss)):
            if not 0 <= value < float("inf"):
                yield f"validate.{option}", value, "must be a finite number, at least 0"
        if not self.compare.general_questions:
            yield "compare.general_questions", "(empty)", "name a file, or write bundled or off"
        if not settings.general_text:
            yield "validate.general_text", "(empty)", "name a file, or write bundled or off"

    def _target_checks(self) -> Iterator[tuple[str, object, str]]:
        if not self.lora.target_modules:
            yield "lora.target_modules", "(empty)", f"name layers, for example {' '.join(LLAMA_LINEAR_LAYERS)}"
        if "lm_head" in self.lora.target_modules:
            yield "lora.target_modules", "lm_head", "the output head stays frozen; leave it out"
        for word in self.lora.target_modules:
            if not word.strip():
                yield "lora.target_modules", repr(word), "is no name; leave it out"
            try:
                re.compile(word)
            except re.error as error:
                yield "lora.target_modules", word, f"is no regular expression: {error}"

    def _data_checks(self) -> Iterator[tuple[str, object, str]]:
        if not self.data.path:
            yield "data.path", "(empty)", "name at least one file or folder"
        columns = {name: column for name, _, column in (field.partition("=") for field in self.data.fields)}
        is_pair = sorted(columns) == ["prompt", "response"] and len(self.data.fields) == 2
        if columns and not (is_pair and len({*columns.values(), ""}) == 3):
            yield "data.fields", " ".join(self.data.fields), "write prompt=COLUMN response=COLUMN, two columns"
        yield from self._template_checks()
        if self.data.weights and len(self.data.weights) != len(self.data.path):
            yield "data.weights", " ".join(map(str, self.data.weights)), f"one for each of {len(self.data.path)} paths"
        if not all(0 < weight <= 100 for weight in self.data.weights):
            yield "data.weights", " ".join(map(str, self.data.weights)), "each must be greater than 0 and at most 100"
        if self.data.packing and self.data.group_by_length:
            yield "data.group_by_length", True, "packing leaves no padding to save; use one of the two"
        if self.data.validation_path and self.data.validation_fraction:
            yield (
                "data.validation_fraction",
                self.data.validation_fraction,
                "use it or data.validation_path, not both",
            )

    def _template_checks(self) -> Iterator[tuple[str, object, str]]:
        for argument in self.data.template_arguments:
            try:
                parse_argument(argument)
            except ValueError as error:
                yield "data.template_arguments", argument, str(error)
        if self.data.date != "auto":
            try:
                datetime.date.fromisoformat(self.data.date)
            except ValueError:
                yield "data.date", self.data.date, "write a day such as 2026-01-31, or auto"

    def _number_checks(self) -> Iterator[tuple[str, object, str]]:
        at_least = [
            ("model.max_positions", self.model.max_positions, 0),
            ("lora.r", self.lora.r, 1),
            ("lora.alpha", self.lora.alpha, 1),
            ("data.max_length", self.data.max_length, 8),
            ("batch.per_device", self.batch.per_device, 1),
            ("batch.accumulation", self.batch.accumulation, 0 if self.batch.samples else 1),
            ("batch.samples", self.batch.samples, 0),
            ("batch.context_parallel", self.batch.context_parallel, 1),
            ("optim.weight_decay", self.optim.weight_decay, 0),
            ("optim.lora_plus_ratio", self.optim.lora_plus_ratio, 1),
            ("train.epochs", self.train.epochs, 1),
            ("train.max_steps", self.train.max_steps, 0),
            ("train.seed", self.train.seed, 0),
            ("train.max_skipped_steps", self.train.max_skipped_steps, 0),
            ("checkpoint.minutes", self.checkpoint.minutes, 0),
            ("checkpoint.keep", self.checkpoint.keep, 2),
            ("validate.tokens", self.validate.tokens, 0),
            ("validate.num_questions", self.validate.num_questions, 0),
            ("validate.max_new_tokens", self.validate.max_new_tokens, 1),
            ("validate.patience", self.validate.patience, 0),
            ("compare.num_questions", self.compare.num_questions, 0),
            ("compare.max_new_tokens", self.compare.max_new_tokens, 1),
        ]
        for option, value, minimum in at_least:
            if not value >= minimum:
                yield option, value, f"must be at least {minimum}"
        positive = (
            ("optim.lr", self.optim.lr),
            ("optim.max_grad_norm", self.optim.max_grad_norm),
            ("run.timeout_minutes", self.run.timeout_minutes),
            ("run.grace_seconds", self.run.grace_seconds),
        )
        for option, value in positive:
            if not value > 0:
                yield option, value, "must be greater than 0"
        if self.train.seed >= 2**32:
            yield "train.seed", self.train.seed, f"must be less than {2**32}"
        if self.optim.lr == float("inf"):
            yield "optim.lr", self.optim.lr, "must be a finite number"

    def _warmup_checks(self) -> Iterator[tuple[str, object, str]]:
        warmup = self.optim.warmup
        if isinstance(warmup, float) and not 0 <= warmup < 1:
            yield "optim.warmup", warmup, "a share of the run is at least 0 and less than 1; steps are a whole number"
        elif warmup < 0:
            yield "optim.warmup", warmup, "must be at least 0"

    def _place_checks(self) -> Iterator[tuple[str, object, str]]:
        if not self.run.dir.strip():
            yield "run.dir", "(empty)", "name a folder for the run"
        elif Path(self.run.dir).resolve() == Path(self.model.name_or_path).resolve():
            yield "run.dir", self.run.dir, "is the base's folder, whose files a run would lie beside; choose another"

    def _range_checks(self) -> Iterator[tuple[str, object, str]]:
        below = [
            ("lora.dropout", self.lora.dropout, 1),
            ("data.validation_fraction", self.data.validation_fraction, 1),
            ("data.text_overlap", self.data.text_overlap, 0.9),
        ]
        for option, value, limit in below:
            if not 0 <= value < limit:
                yield option, value, f"must be at least 0 and less than {limit}"
        at_most = (
            ("lora.r", self.lora.r, 2**20),
            ("optim.lora_plus_ratio", self.optim.lora_plus_ratio, 1e6),
            ("compare.num_questions", self.compare.num_questions, 10**9),
            ("run.timeout_minutes", self.run.timeout_minutes, 525_600),  # a year
        )
        for option, value, most in at_most:
            if value > most:
                yield option, value, f"must be at most {most:,.0f}"
