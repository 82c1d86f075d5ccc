"""What other trainers do where their file says nothing: written into the command, so that it does the same.

Looked up in the sources of transformers 5.23, TRL 1.16, PEFT 0.21, axolotl 0.19 and LLaMA-Factory 0.9.5, and of Unsloth
in 2026, whose trainer is TRL's with some defaults of its own.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from train.config import Config
from train.foreign.names import row_of
from train.foreign.values import Words, number, plain

# of transformers' TrainingArguments, which all of them extend
OF_TRAINER = {
    "optim.name": "adamw", "optim.schedule": "linear", "optim.warmup": "0", "optim.weight_decay": "0",
    "optim.max_grad_norm": "1", "train.seed": "42", "batch.accumulation": "1", "lora.dropout": "0",
    "checkpoint.every": "500", "track.wandb": "off", "data.packing": "false", "data.group_by_length": "false",
    "data.truncation": "right",
}  # fmt: skip
DEFAULTS = {
    "TRL": {**OF_TRAINER, "optim.lr": "2e-5", "train.epochs": "3", "batch.per_device": "8", "data.max_length": "1024",
            "lora.r": "16", "lora.alpha": "32", "lora.dropout": "0.05", "lora.target_modules": "q_proj v_proj"},
    # FastLanguageModel.get_peft_model and UnslothSFTConfig
    "Unsloth": {**OF_TRAINER, "optim.name": "adamw_8bit", "optim.lr": "5e-5", "optim.warmup": "0.1",
                "optim.weight_decay": "0.001", "train.epochs": "3", "train.seed": "3407", "batch.per_device": "4",
                "batch.accumulation": "2", "data.max_length": "2048", "lora.r": "16", "lora.alpha": "16",
                "lora.target_modules": "all-linear"},
    "axolotl": {**OF_TRAINER, "optim.schedule": "cosine", "optim.warmup": "0.03", "train.epochs": "1",
                "batch.per_device": "1", "data.max_length": "512", "data.truncation": "drop",
                "checkpoint.every": "epoch", "checkpoint.keep": "4", "train.method": "full"},
    "LLaMA-Factory": {**OF_TRAINER, "optim.lr": "5e-5", "train.epochs": "3", "batch.per_device": "8",
                      "data.max_length": "2048", "lora.r": "8", "lora.target_modules": "all-linear",
                      "train.method": "lora"},
}  # fmt: skip
PEFT_DEFAULTS = {"lora.r": "8", "lora.alpha": "8", "lora.dropout": "0", "lora.target_modules": "q_proj v_proj"}
# how often they validate by steps that are not said
LOGGING_STEPS = {"TRL": "10", "Unsloth": "1", "LLaMA-Factory": "500"}
IF_OTHERWISE = ("data.packing", "data.group_by_length")  # left out where the profile does the same
# what else is to be said where one of these stands in the command: (trainer, option) -> words; "" is any trainer
ABOUT = {
    ("TRL", "optim.lr"): "2e-5 is SFTConfig's; a script with transformers' TrainingArguments alone has 5e-5",
    (
        "Unsloth",
        "optim.lr",
    ): "5e-5 is of SFTConfig as Unsloth changes it, like batch, optimizer, warmup, weight decay and "
    "seed where the file names none; a script with transformers' TrainingArguments has that one's",
    ("", "data.truncation right"): "they cut a conversation at the greatest length, also within an answer; right, the "
    "nearest here, ends it after its last whole answer",
    (
        "axolotl",
        "optim.warmup 0.03",
    ): "its default is 3 % of the run and at most 100 steps: for a run of more than 3,333 steps write 100",
    ("TRL", "lora.target_modules"): "PEFT takes q_proj and v_proj of Llama, Mistral, Qwen and Gemma; for other "
    "families name what PEFT takes there. All seven layers of a block usually learn better: leave the option out",
}
NO_TARGETS = "the file names none, which axolotl refuses; here it is all seven of a block (--lora.target_modules)"
PROFILES_ADAPTERS = (
    "the file says nothing of them, so they are the profile's (lora.*); a trainer without peft_config trains every "
    "weight: --train.method full"
)
WHOLE_CONVERSATIONS = (
    "the file is silent, and then TRL trains on whole conversations, prompts too (of prompt/completion rows the "
    "completion); here it is the assistant's turns alone, as with assistant_only_loss true"
)
KEEPS_ALL = (
    "without save_total_limit they keep every checkpoint; here the newest two stay, and the best (--checkpoint.keep)"
)


class Defaults:
    """The trainer's defaults for one file, whose options are known by now."""

    def __init__(self, trainer: str, found: Mapping[str, Any], options: Mapping[str, Words]) -> None:
        self.trainer, self.found, self.options = trainer, found, options
        self.is_adapter = "peft_type" in found
        self.is_adapter_alone = self.is_adapter and not any(
            not option.startswith(("lora.", "model.", "data.path")) for option in self._options_said()
        )
        self.values = self._values()
        method = options.get("train.method") or (self.values.get("train.method", ""),)
        self.says_adapters = self.is_adapter or method[0] != "" or any(name.startswith("lora.") for name in options)
        self.is_full = method == ("full",)

    def missing(self) -> Iterator[tuple[str, Words, bool]]:
        """(option, words, whether the file says anything of it) for each that is not in the command yet."""
        said = self._options_said()
        trains_adapters = self.says_adapters and not self.is_full
        for option, value in self.values.items():
            if option not in self.options and (trains_adapters or not option.startswith("lora.")):
                yield option, tuple(value.split()), option in said

    def notes(self, written: Mapping[str, Words]) -> Iterator[tuple[str, str]]:
        """What is to be said of the defaults in `written`, and of what the file leaves open."""
        for (trainer, about), text in ABOUT.items():
            option, _, value = about.partition(" ")
            if trainer in ("", self.trainer) and option in written and value in ("", *written[option]):
                yield option, text
        if not self.says_adapters:
            yield "adapters", PROFILES_ADAPTERS
        elif self.trainer == "axolotl" and not self.is_full and "lora.target_modules" not in self.options:
            yield "lora.target_modules", NO_TARGETS
        if self.is_adapter_alone:
            return
        if self.trainer in ("TRL", "Unsloth") and self.found.get("assistant_only_loss") is None:
            yield "assistant_only_loss", WHOLE_CONVERSATIONS
        if "checkpoint.keep" not in self.options and "checkpoint.keep" not in written:
            yield "checkpoint.keep", KEEPS_ALL

    def _options_said(self) -> set[str]:
        """Our options of which the file's keys say anything."""
        found = [row_of(key, self.trainer) for key, value in self.found.items() if value is not None]
        return {row.option for row in found if row is not None}

    def _values(self) -> dict[str, str]:
        if self.is_adapter_alone:
            return dict(PEFT_DEFAULTS)
        values = {**DEFAULTS[self.trainer], **(PEFT_DEFAULTS if self.is_adapter else {})}
        if "model.name_or_path" in self.options:
            is_in_4bit = self.trainer == "Unsloth" and not self._says("load_in_4bit", "load_in_8bit", "load_in_16bit")
            is_qlora = is_in_4bit or self.found.get("adapter") == "qlora"
            values["model.quantization"] = "nf4" if is_qlora else "none"
        if self.trainer == "LLaMA-Factory":
            values["lora.alpha"] = str(2 * int(number((self.options.get("lora.r") or ("8",))[0]) or 8))
        if self.trainer == "axolotl":
            if self._says("warmup_steps", "warmup_ratio"):  # 0, or it would be an option
                values["optim.warmup"] = "0"
            if self._says("wandb_project") and not self._says("use_wandb"):
                values["track.wandb"] = "auto"
        if self._strategy("save") != "steps" or self._says("save_steps", "saves_per_epoch"):
            values.pop("checkpoint.every")
        logged = number(self.found.get("logging_steps") or LOGGING_STEPS.get(self.trainer))
        if self.found.get("eval_strategy") == "steps" and not self._says("eval_steps") and logged and logged >= 1:
            values["validate.every"] = plain(logged)
        return values

    def _strategy(self, what: str) -> str:
        """When it saves, without the name of an enum before it."""
        return str(self.found.get(f"{what}_strategy") or "steps").lower().rpartition(".")[2]

    def _says(self, *keys: str) -> bool:
        return any(self.found.get(key) is not None for key in keys)


def unlike_profile(option: str, words: Words, profile: Config) -> bool:
    """Whether a default that is mostly the profile's, too, is to be written out."""
    section, name = option.split(".")
    value = getattr(getattr(profile, section), name)
    return option not in IF_OTHERWISE or words != (str(value).lower(),)
