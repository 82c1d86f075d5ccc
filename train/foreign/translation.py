"""Another trainer's configuration -> our command, and what is to be said of every key that is not simply in it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from train.config import Config
from train.foreign.defaults import Defaults, unlike_profile
from train.foreign.names import REPORTS, Row, nearest_name, row_of
from train.foreign.reasons import why
from train.foreign.sources import IN_COMMAND, Told, axolotl_paths, is_local, llama_factory_paths, located
from train.foreign.values import Words, is_finite, number, truth

SMALL = 2.0  # billions of weights, as the name has them; below, the recipe for 4 GB is meant
SEVERAL = re.compile(r"deepspeed|fsdp.*|.*parallel_(size|degree)|num_gpus|n_gpu|nproc_per_node|world_size")
EFFECTIVE = (
    "{} samples in a step on one GPU, as there; with several GPUs times their number. The loss of a step is a mean "
    "over its trained tokens, however it is split"
)
TOLD = {  # options whose notes are told where the file sets them; others mean what they say
    "model.quantization", "lora.trainable_tokens", "lora.modules_to_save", "data.validation_fraction",
    "data.max_length", "data.truncation", "data.packing", "data.chat_template", "optim.warmup", "memory.checkpointing",
    "checkpoint.keep", "validate.final", "run.timeout_minutes",
}  # fmt: skip
OF_TRL = ("dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split")
NEEDS_HELD_OUT = ("validate.every", "validate.patience", "validate.final")


@dataclass
class Translation:
    """A command, and every key of the file in one of the lists; `missing`: (key, value, why it has no counterpart)."""

    trainer: str
    options: dict[str, Words] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)  # our option -> the key that it came from
    taken: list[str] = field(default_factory=list)  # all keys that an option says
    defaults: list[str] = field(default_factory=list)  # options that the file leaves to their defaults
    notes: list[tuple[str, str]] = field(default_factory=list)  # means something else here
    anyway: list[tuple[str, str]] = field(default_factory=list)
    missing: list[Told] = field(default_factory=list)
    off: list[str] = field(default_factory=list)
    unknown: list[tuple[str, Any]] = field(default_factory=list)
    profile: str = ""
    why_profile: str = ""

    def set(self, key: str, option: str, words: Words) -> bool:
        """Sets an option, and returns whether; a second key for it that says otherwise is told as such."""
        if self.options.get(option, words) != words:
            self.missing.append((key, " ".join(words), f"{self.keys[option]} has set {option} already"))
            return False
        self.taken.append(key)
        self.options[option] = words
        self.keys.setdefault(option, key)
        return True

    def words(self) -> list[str]:
        """The command line behind `--profile NAME`."""
        return [word for option, words in self.options.items() for word in (f"--{option}", *words)]

    def leave_to(self, profile: Config) -> None:
        """Takes out the trainer's defaults that hardly a profile changes, where this one has them, too."""
        for option in [*self.defaults]:
            if not unlike_profile(option, self.options[option], profile):
                self.defaults.remove(option)
                del self.options[option]

    def meant(self, key: str) -> str:
        """What an unknown key was probably meant to be: the trainer's name and our option; empty where none is near."""
        name, option = nearest_name(key, self.trainer)
        return f"did you mean {name} (--{option})?" if name else ""


def translate(trainer: str, found: Mapping[str, Any], path: Path) -> Translation:
    """The command for a configuration of `trainer`, read from `path`."""
    result = Translation(trainer)
    for key, value in found.items():
        if not is_finite(value) and (key, value) != ("max_grad_norm", ".inf"):
            result.missing.append((key, value, f"{_option_of(key, trainer) or key} has no such value"))
        elif not _is_data(result, key, found, path):
            _take(result, key, value, found)
    _add_defaults(result, found)
    _add_stand_ins(result, path)
    _make_possible(result)
    _choose_profile(result, found)
    order = [f"{section.name}.{each.name}" for section in fields(Config) for each in _fields_of(section)]
    result.options = {option: result.options[option] for option in order if option in result.options}
    return result


def _fields_of(section: Any) -> tuple[Any, ...]:
    return fields(section.type) if is_dataclass(section.type) else ()


def _take(result: Translation, key: str, value: Any, found: Mapping[str, Any]) -> None:
    """Puts one key where it belongs."""
    waits_for = {"save_steps": "save_strategy", "eval_steps": "eval_strategy"}.get(key, "")
    is_total = result.trainer == "axolotl" and key == "batch_size"  # of a step, where for others it is a micro-batch's
    row = None if is_total else row_of(key, result.trainer)
    if key == "report_to":  # an empty list is `none`, too
        _take_trackers(result, value)
    elif value is None or value in ([], {}, "") or (key in ("warmup_ratio", "warmup_steps") and number(value) == 0):
        _take_nothing(result, key)
    elif waits_for and found.get(waits_for, "steps") != "steps":
        result.anyway.append((key, f"it counts only with {waits_for} steps, and that is {found[waits_for]}"))
    elif row is not None:
        _take_row(result, key, value, row)
    elif is_total:
        result.missing.append((key, value, "the number of samples in a step follows: per_device x accumulation x GPUs"))
    else:
        _take_reason(result, key, value)


def _take_nothing(result: Translation, key: str) -> None:
    if key in ("max_length", "max_seq_length"):
        result.missing.append((key, "null", "samples have a greatest length: data.max_length"))
    elif key in ("adapter", "finetuning_type"):
        result.set(key, "train.method", ("full",))
    else:
        result.off.append(key)


def _take_trackers(result: Translation, value: Any) -> None:
    names = [str(each).lower() for each in (value if isinstance(value, list) else [value])]
    known = {REPORTS[name] for name in names if name in REPORTS}
    result.set("report_to", "track.wandb", ("auto",) if ("auto",) in known else ("off",))
    for name in names:
        if name == "tensorboard":
            result.set("report_to", "track.tensorboard", ("true",))
        elif name == "mlflow":
            result.set("report_to", "track.mlflow", ("on",))
        elif name not in REPORTS:
            result.missing.append(("report_to", name, "there are Weights & Biases, MLflow and TensorBoard (track.*)"))


def _take_row(result: Translation, key: str, value: Any, row: Row) -> None:
    words = row.spell(value)
    if words is None:
        result.missing.append((key, value, f"{row.option} has no such value" + (f": {row.note}" if row.note else "")))
    elif words:
        result.set(key, row.option, words)
        if row.note and row.option in TOLD:
            result.notes.append((f"{key} -> {row.option}", row.note))
    else:
        result.anyway.append((key, row.note or f"{row.option} need not be set for that"))


def _take_reason(result: Translation, key: str, value: Any) -> None:
    reason = why(key, value)
    if reason and reason.is_so_anyway:
        result.anyway.append((key, reason.text))
    elif truth(value) is False and not (reason and reason.is_told_when_off):
        result.off.append(key)
    elif reason:
        result.missing.append((key, value, reason.text))
    else:
        result.unknown.append((key, value))


def _is_data(result: Translation, key: str, found: Mapping[str, Any], path: Path) -> bool:
    """Takes the keys that say where data is, where they are more than a path."""
    option = {"datasets": "data.path", "test_datasets": "data.validation_path", "dataset": "data.path",
              "eval_dataset": "data.validation_path"}.get(key, "")  # fmt: skip
    value, fields = found[key], list(result.options.get("data.fields", ()))
    if not value:
        return False
    if result.trainer in ("TRL", "Unsloth") and isinstance(found.get("dataset_name"), str) and key in OF_TRL:
        _take_trl_data(result, key, found)
        return True
    if option and isinstance(value, list) and result.trainer != "LLaMA-Factory":
        paths, fields, told = axolotl_paths(value, key, fields)
    elif option and result.trainer == "LLaMA-Factory":
        folder = Path(str(found.get("dataset_dir") or "data"))
        beside = path.parent / folder
        paths, told = llama_factory_paths(value, beside if not folder.is_dir() and beside.is_dir() else folder)
    else:
        return False
    if paths and not result.set(key, option, tuple(paths)):
        return True
    if fields:
        result.options["data.fields"] = tuple(fields)
        result.keys.setdefault("data.fields", key)
    for name, given, reason in told:
        if reason:
            result.missing.append((name, given, reason))
        elif name.rpartition(".")[2] in IN_COMMAND:
            result.taken.append(name)
        else:
            result.anyway.append((name, "rows are recognised by their fields, and files by their names"))
    return True


def _take_trl_data(result: Translation, key: str, found: Mapping[str, Any]) -> None:
    """`trl sft` names a data set, and beside it its subset and splits."""
    name, subset, split = found["dataset_name"], found.get("dataset_config"), found.get("dataset_train_split")
    path, of_subset, of_split = located(name, subset, split)
    validates = str(found.get("eval_strategy") or "no").lower().rpartition(".")[2] not in ("no", "none", "false")
    held_out, _, of_test = located(name, subset, found.get("dataset_test_split") or "test")
    if key == "dataset_name":
        result.set(key, "data.path", (path,))
        if validates and not is_local(name):
            result.set(key, "data.validation_path", (held_out,))
    elif key == "dataset_test_split" and not validates:
        result.anyway.append((key, "nothing is validated without eval_strategy"))
    elif reason := {"dataset_config": of_subset, "dataset_train_split": of_split, "dataset_test_split": of_test}[key]:
        is_file = key == "dataset_test_split" and is_local(name)
        result.missing.append((key, found[key], f"{reason}, or --data.validation_path" if is_file else reason))
    else:
        result.anyway.append((key, "it stands behind the data set's name, owner/name:subset:split"))


def _add_defaults(result: Translation, found: Mapping[str, Any]) -> None:
    """Writes out what the trainer does where the file says nothing, or what has no counterpart."""
    defaults, lost = Defaults(result.trainer, found, dict(result.options)), {key for key, *_ in result.missing}
    written: dict[str, Words] = {}
    for option, words, is_said in defaults.missing():
        written[option] = words
        if option == "validate.every":
            result.keys[option] = "eval_strategy (logging_steps)"
        if not is_said:
            result.defaults.append(option)
        elif key := next((key for key in found if key in lost and _option_of(key, result.trainer) == option), ""):
            result.notes.append((key, f"{' '.join(words)}, which is the default there, stands in the command instead"))
    result.options.update(written)
    result.notes += defaults.notes(written)


def _option_of(key: str, trainer: str) -> str:
    row = row_of(key, trainer)
    return row.option if row else ""


def _add_stand_ins(result: Translation, path: Path) -> None:
    """Words to be replaced where the file names no base or no data, and a run folder after its name."""
    options = result.options
    for option, stand_in, what in (("model.name_or_path", "MODEL", "no base model"), ("data.path", "FILE", "no data")):
        if option not in options:
            options[option] = (stand_in,)
            result.notes.append((option, f"the file names {what}: put yours in the place of {stand_in}"))
    if "run.dir" not in options:
        options["run.dir"] = (f"runs/{path.stem}",)


def _make_possible(result: Translation) -> None:
    """Takes out what our parser would refuse together, or would measure nothing, and says so."""
    options = result.options
    if set(options.get("data.validation_path", ())) & set(options["data.path"]):
        reason = "it is trained on, too, so its loss would say nothing: add --data.validation_fraction 0.05"
        _leave_out(result, "data.validation_path", reason)
    if not ({"data.validation_path", "data.validation_fraction"} & set(options)):
        for option in NEEDS_HELD_OUT:
            _leave_out(result, option, f"{option} needs held-out data: add --data.validation_fraction 0.05")
    if "data.validation_path" in options:
        _leave_out(result, "data.validation_fraction", "the held-out data has a path of its own")
    if options.get("data.packing") == ("true",):
        _leave_out(result, "data.group_by_length", "packing leaves no padding to save")
    if options.get("train.method") == ("full",):
        for option in [option for option in options if option.startswith("lora.") or option == "optim.lora_plus_ratio"]:
            _leave_out(result, option, "every weight is trained (train.method full), so there are no adapters")
        if options.get("model.quantization") != ("none",):
            _leave_out(
                result, "model.quantization", "every weight is trained, which needs a base that is not quantised"
            )
        options["model.quantization"] = ("none",)
    size = [number((options.get(name) or ("",))[0]) for name in ("batch.per_device", "batch.accumulation")]
    samples = number((size[0] or 0) * (size[1] or 0))  # None of two numbers whose product is not finite
    if samples and "batch.per_device" not in result.defaults:
        result.notes.append(("effective batch", EFFECTIVE.format(int(samples))))


def _leave_out(result: Translation, option: str, reason: str) -> None:
    """Takes an option out of the command; a key of the file that asked for it then has no counterpart."""
    words, key = result.options.pop(option, None), result.keys.get(option, "")
    if option in result.defaults:
        result.defaults.remove(option)
    if key and words == ("false",):
        result.off.append(key)
    elif key and words is not None:
        result.missing.append((key, " ".join(words), reason))
    result.notes[:] = [note for note in result.notes if note[0] != option and not note[0].endswith(f"-> {option}")]


def _choose_profile(result: Translation, found: Mapping[str, Any]) -> None:
    """The profile whose remaining options fit: by the device, several GPUs, or the size in the model's name."""
    base = (result.options.get("model.name_or_path") or ("",))[0]
    sizes = re.findall(r"(?<![\w.])(\d+(?:\.\d+)?)\s*[bB](?![a-zA-Z])", base.replace("-", " ").replace("_", " "))
    several = [key for key, value in found.items() if SEVERAL.fullmatch(key) and value and truth(value) is not False]
    if result.options.get("run.device") == ("cpu",):
        result.profile, result.why_profile = "demo", "the file asks for a CPU"
    elif several:
        result.profile, result.why_profile = "multi_gpu", f"the file has {several[0]}, so there are several GPUs"
    elif sizes and float(sizes[0]) < SMALL and result.options.get("model.quantization") == ("nf4",):
        result.profile, result.why_profile = "4gb", f"{sizes[0]}B in 4 bits; --profile a100 takes all memory of a GPU"
    else:
        result.profile, result.why_profile = "a100", "one GPU, of any size: memory is planned for what is there"
