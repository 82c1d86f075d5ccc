"""Options of TRL, PEFT and transformers, of axolotl, Unsloth and LLaMA-Factory, and ours in their place.

docs/MIGRATING.md shows this table; a test compares them, and sees that every option of ours in it is one.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from data_tools.spelling import nearest
from train.foreign import values
from train.foreign.values import Spell, Words

TRAINERS = ("TRL", "axolotl", "Unsloth", "LLaMA-Factory")
DTYPES = {"bfloat16": "bf16", "bf16": "bf16", "float16": "fp16", "half": "fp16", "fp16": "fp16"}
DTYPES |= {"float32": "fp32", "float": "fp32", "fp32": "fp32", "auto": "auto", "none": "", "null": ""}
METHODS = {"lora": "lora", "qlora": "lora", "full": "full", "none": "full", "null": "full", "": "full"}
OPTIMIZERS = {"adamw": "adamw", "adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_hf": "adamw"}
OPTIMIZERS |= {"adamw_apex_fused": "adamw", "adamw_torch_xla": "adamw", "adamw_torch_npu_fused": "adamw"}
OPTIMIZERS |= {"paged_adamw_32bit": "adamw", "paged_adamw": "adamw", "adamw_8bit": "adamw_8bit"}
OPTIMIZERS |= {"adamw_bnb_8bit": "adamw_8bit", "adamw_torch_8bit": "adamw_8bit", "paged_adamw_8bit": "paged_adamw_8bit"}
SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant", "constant_with_warmup": "constant"}
BITS = {"4": "nf4", "8": "int8", "none": "none", "null": "none", "4bit": "nf4", "8bit": "int8", "16bit": "none"}
BITS |= {"qlora": "nf4", "bnb": "nf4", "bitsandbytes": "nf4", "int4": "nf4", "fp4": "nf4"}
WHEN = {"epoch": "epoch", "steps": "", "no": "", "none": ""}


@dataclass(frozen=True)
class Row:
    """One option of ours, what each trainer calls it (several names with spaces between), and what is different."""

    option: str
    trl: str = ""
    axolotl: str = ""
    unsloth: str = ""
    llama_factory: str = ""
    typed: str = ""  # what else people type
    spell: Spell = values.same
    note: str = ""

    def names(self, trainer: str) -> list[str]:
        """What one trainer calls it; `typed`: what else people type."""
        return {**dict(zip(TRAINERS, self._columns, strict=True)), "typed": self.typed}[trainer].split()

    @property
    def _columns(self) -> tuple[str, str, str, str]:
        return self.trl, self.axolotl, self.unsloth, self.llama_factory


ROWS = (
    Row("model.name_or_path", "model_name_or_path base_model_name_or_path", "base_model", "model_name",
        "model_name_or_path", "model base_model_name model_id model_path pretrained_model_name_or_path",
        note="a folder or a hub id; no code from the hub is run"),
    Row("model.revision", "model_revision", "revision_of_model", "revision", "model_revision"),
    Row("model.quantization", "load_in_4bit", "load_in_4bit", "load_in_4bit", "", "use_4bit use_qlora",
        values.when("nf4"), "4 bits are always NF4 with double quantisation; none trains on the base in 16 bits"),
    Row("model.quantization", "load_in_8bit", "load_in_8bit", "load_in_8bit", "", "use_8bit", values.when("int8")),
    Row("model.quantization", llama_factory="quantization_bit",
        spell=values.one_of(BITS)),
    Row("model.dtype", "dtype torch_dtype bnb_4bit_compute_dtype", "torch_dtype", "dtype", "",
        "compute_dtype precision mixed_precision", values.one_of(DTYPES)),
    Row("model.dtype", "bf16", "bf16 bfloat16", "bf16", "bf16 pure_bf16",
        spell=lambda value: ("auto",) if str(value) == "auto" else values.when("bf16")(value),
        note="adapters and their optimizer are in fp32 always"),
    Row("model.dtype", "fp16", "fp16 float16", "fp16", "fp16", spell=values.when("fp16")),
    Row("train.method", "use_peft", "", "", "", "use_lora", values.when("lora", "full")),
    Row("train.method", "", "adapter", "", "finetuning_type", "adapter_type", values.one_of(METHODS),
        "qlora is lora with model.quantization nf4"),
    Row("train.method", unsloth="full_finetuning", spell=values.when("full")),
    Row("lora.r", "lora_r r", "lora_r", "r", "lora_rank", "rank lora_dim"),
    Row("lora.alpha", "lora_alpha", "lora_alpha", "lora_alpha", "lora_alpha", "alpha", values.whole),
    Row("lora.dropout", "lora_dropout", "lora_dropout", "lora_dropout", "lora_dropout", "dropout"),
    Row("lora.rslora", "use_rslora", "peft_use_rslora", "use_rslora", "use_rslora", "rslora", values.flag),
    Row("lora.target_modules", "lora_target_modules target_modules", "lora_target_modules", "target_modules",
        "lora_target", "", values.modules, "without it all seven of a block, where PEFT takes two for Llama"),
    Row("lora.target_modules", axolotl="lora_target_linear", spell=values.when("all-linear")),
    Row("lora.modules_to_save", "lora_modules_to_save modules_to_save", "lora_modules_to_save", "modules_to_save",
        "additional_target", "", values.words, "lm_head and embed_tokens alone; lora.trainable_tokens for few tokens"),
    Row("lora.trainable_tokens", "", "tokens", "", "add_tokens add_special_tokens", "", values.words,
        "the rows of these tokens alone are trained"),
    Row("lora.init_from", "", "lora_model_dir", "", "adapter_name_or_path", "adapter_path",
        note="a new run that starts from an adapter"),
    Row("data.path", "dataset_name", "datasets", "train_dataset", "dataset",
        "data dataset data_path data_file data_files dataset_path train_file train_data train_files", values.file,
        "files, folders, globs, or hub data sets as owner/name:subset:split"),
    Row("data.validation_path", "", "test_datasets", "eval_dataset", "eval_dataset",
        "eval_file eval_data validation_file val_file", values.file),
    Row("data.validation_fraction", "", "val_set_size", "", "val_size", "test_size eval_split_ratio", values.share,
        "a share of the records, as it is for them below 1"),
    Row("data.chat_template", "chat_template_path", "chat_template_jinja", "", "", "", values.template,
        "a Jinja file; without it the tokenizer's own template is taken"),
    Row("data.max_length", "max_length", "sequence_len", "max_seq_length", "cutoff_len",
        "max_seq_length max_seq_len seq_length seq_len block_size model_max_length", values.whole,
        "a longer conversation is not cut within an answer: data.truncation says what becomes of it"),
    Row("data.truncation", "truncation_mode", "", "", "", "",
        values.one_of({"keep_start": "right", "keep_end": "left"}), "right ends after the last whole answer"),
    Row("data.truncation", axolotl="excess_length_strategy",
        spell=values.one_of({"drop": "drop", "truncate": "right"})),
    Row("data.packing", "packing", "sample_packing", "packing", "packing neat_packing", "", values.flag,
        "a sample never sees another in its row; batch.per_device then counts rows"),
    Row("data.group_by_length", "group_by_length", "group_by_length", "group_by_length", "group_by_length", "",
        values.flag),
    Row("data.group_by_length", "train_sampling_strategy",
        spell=values.one_of({"group_by_length": "true", "random": ""})),
    Row("data.history", llama_factory="mask_history", spell=values.when("last")),
    Row("batch.per_device", "per_device_train_batch_size", "micro_batch_size", "per_device_train_batch_size",
        "per_device_train_batch_size", "batch_size train_batch_size per_gpu_train_batch_size", values.whole,
        "samples in a step = per_device x accumulation x processes; each trained token of a step counts the same"),
    Row("batch.accumulation", "gradient_accumulation_steps", "gradient_accumulation_steps",
        "gradient_accumulation_steps", "gradient_accumulation_steps",
        "gradient_accumulation grad_accum accumulate_grad_batches accumulation_steps", values.whole),
    Row("batch.context_parallel", axolotl="context_parallel_size sequence_parallel_degree", spell=values.whole,
        note="such a group of GPUs counts as one process"),
    Row("optim.name", "optim", "optimizer", "optim", "optim", "", values.one_of(OPTIMIZERS)),
    Row("optim.lr", "learning_rate", "learning_rate", "learning_rate", "learning_rate", "lr"),
    Row("optim.schedule", "lr_scheduler_type", "lr_scheduler", "lr_scheduler_type", "lr_scheduler_type",
        "scheduler schedule lr_schedule", values.one_of(SCHEDULES)),
    Row("optim.warmup", "warmup_steps", "warmup_steps", "warmup_steps", "warmup_steps", "warmup num_warmup_steps",
        values.warmup),
    Row("optim.warmup", "warmup_ratio", "warmup_ratio", "warmup_ratio", "warmup_ratio", "", values.warmup,
        "a number below 1 is a share of the run, any other a number of steps"),
    Row("optim.weight_decay", "weight_decay", "weight_decay", "weight_decay", "weight_decay", "wd"),
    Row("optim.max_grad_norm", "max_grad_norm", "max_grad_norm", "max_grad_norm", "max_grad_norm", "grad_clip clip",
        values.norm),
    Row("optim.lora_plus_ratio", "loraplus_lr_ratio", "loraplus_lr_ratio", "", "loraplus_lr_ratio",
        "lora_plus_lr_ratio loraplus_ratio lora_plus_ratio"),
    Row("train.epochs", "num_train_epochs", "num_epochs", "num_train_epochs", "num_train_epochs",
        "epochs num_epoch n_epochs epoch", values.whole, "whole epochs; train.max_steps for less than one"),
    Row("train.max_steps", "max_steps", "max_steps", "max_steps", "max_steps", "num_steps steps", values.limit,
        "0 is no limit; train.epochs ends the run if it comes first"),
    Row("train.seed", "seed", "seed", "random_state seed", "seed", "random_seed",
        note="also of the order of samples and of dropout"),
    Row("memory.checkpointing", "gradient_checkpointing activation_checkpointing", "gradient_checkpointing",
        "use_gradient_checkpointing", "", "",
        lambda value: ("auto",) if str(value) in ("unsloth", "offload") else values.when("auto", "none")(value),
        "auto recomputes as few blocks as memory needs; full recomputes all"),
    Row("memory.checkpointing", llama_factory="disable_gradient_checkpointing", spell=values.when("none")),
    Row("checkpoint.every", "save_steps", "save_steps", "save_steps", "save_steps", "", values.steps,
        "optimizer steps, or epoch"),
    Row("checkpoint.every", "save_strategy", "save_strategy", "save_strategy", "save_strategy", "",
        values.one_of(WHEN), "there is a checkpoint at the end always"),
    Row("checkpoint.every", axolotl="saves_per_epoch", spell=values.parts_of_epoch),
    Row("checkpoint.keep", "save_total_limit", "save_total_limit", "save_total_limit", "save_total_limit", "",
        values.at_least_two, "two at least, and the one with the lowest validation loss beside them"),
    Row("validate.every", "eval_steps", "eval_steps", "eval_steps", "eval_steps", "", values.steps,
        "needs held-out data; a float is a share of an epoch"),
    Row("validate.every", "eval_strategy evaluation_strategy", "eval_strategy", "eval_strategy", "eval_strategy", "",
        values.one_of(WHEN)),
    Row("validate.every", axolotl="evals_per_epoch", spell=values.parts_of_epoch),
    Row("validate.at_start", "eval_on_start", "", "eval_on_start", "eval_on_start", "", values.flag),
    Row("validate.final", "load_best_model_at_end", "load_best_model_at_end", "load_best_model_at_end",
        "load_best_model_at_end", "", values.when("best"), "by the validation loss"),
    Row("validate.patience", "early_stopping_patience", "early_stopping_patience", "", "early_stopping_steps",
        "patience"),
    Row("run.dir", "output_dir", "output_dir", "output_dir", "output_dir", "out_dir output save_dir",
        note="a run folder; the result is in its final/"),
    Row("run.resume", "resume_from_checkpoint", "resume_from_checkpoint", "resume_from_checkpoint",
        "resume_from_checkpoint", "resume", values.resume, "the same command resumes by itself"),
    Row("run.resume", "overwrite_output_dir", "", "", "overwrite_output_dir", "", lambda value: (),
        "the same command resumes; --run.resume never starts again, and keeps the earlier run"),
    Row("run.device", "use_cpu no_cuda", "", "", "use_cpu", "", values.when("cpu")),
    Row("run.deterministic", "full_determinism", "", "", "full_determinism", "", values.flag),
    Row("run.timeout_minutes", "ddp_timeout", "ddp_timeout", "", "ddp_timeout", "", values.minutes,
        "minutes, a day at most, where theirs is in seconds"),
    Row("track.project", "", "wandb_project", "", "", "project_name"),
    Row("track.tensorboard", "", "use_tensorboard", "", "", "tensorboard", values.flag),
    Row("track.mlflow", "", "mlflow_tracking_uri", "", "", "mlflow"),
    Row("track.wandb", "report_to", "use_wandb", "report_to", "report_to", "use_wandb wandb",
        lambda value: REPORTS.get(str(value[0] if isinstance(value, list) and len(value) == 1 else value).lower()),
        "auto: where there is a key; others are --track.mlflow on and --track.tensorboard true"),
)  # fmt: skip
# what report_to may name, and what is then track.wandb
REPORTS: dict[str, Words] = dict.fromkeys(("wandb", "all", "true"), ("auto",))
REPORTS |= dict.fromkeys(("none", "[]", "false"), ("off",))


def rows(trainer: str) -> Iterator[tuple[str, Row]]:
    """Every name that `trainer` knows, with its row."""
    return ((name, row) for row in ROWS for name in row.names(trainer))


def row_of(name: str, trainer: str = "") -> Row | None:
    """What a name means here: to `trainer`, or else to the first of all that know it."""
    order = [*([trainer] if trainer else []), *TRAINERS, "typed"]
    return next((row for each in order for known, row in rows(each) if known == name), None)


def nearest_name(name: str, trainer: str = "") -> tuple[str, str]:
    """The name of another trainer's option that is most like `name`, and our option; empty where none comes near.

    Of `trainer` alone where one is given.
    """
    columns = (trainer,) if trainer else (*TRAINERS, "typed")
    near = nearest(name, dict.fromkeys(known for each in columns for known, _ in rows(each)), cutoff=0.85)
    row = row_of(near, trainer) if near else None
    return (near, row.option) if row else ("", "")


def spelled_here(option: str, given: str) -> str:
    """Our word for another trainer's value of this option, such as adamw for adamw_torch_fused; empty: none is known.

    true and false are left alone: of a value they say too little.
    """
    if values.truth(given) is not None:
        return ""
    found = (row.spell(given) for row in ROWS if row.option == option)
    return next((words[0] for words in found if words and len(words) == 1 and words[0] != given), "")


def counterpart(name: str, given: Any) -> tuple[str, Words | None, str] | None:
    """(our option, its values, what is different) for a name typed with this value; None where it is not known."""
    row = row_of(name)
    return None if row is None else (row.option, row.spell(given), row.note)
