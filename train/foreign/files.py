"""Another trainer's configuration file -> its keys and values, and whose it is."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from data_tools.strict_json import parse_json, place_of
from train.foreign.names import rows
from train.not_offered import reason_for
from train.run.exits import ExitCode, ExitWith

UNSLOTH = {
    "random_state",
    "use_gradient_checkpointing",
    "full_finetuning",
    "finetune_language_layers",
}  # TRL lacks these
# what tells trainers apart beside the names of the table
MARKS = {
    "TRL": {"dataset_train_split", "dataset_config", "use_peft", "peft_type", "bnb_4bit_quant_type", "loss_type",
            *UNSLOTH},
    "axolotl": {"dataset_prepared_path", "flash_attention", "lora_target_linear", "sequence_len", "special_tokens",
                "pad_to_sequence_len", "train_on_inputs", "tokenizer_type", "model_type", "wandb_entity"},
    "LLaMA-Factory": {"stage", "template", "finetuning_type", "dataset_dir", "plot_loss", "overwrite_cache",
                      "preprocessing_num_workers", "neat_packing", "double_quantization", "flash_attn"},
}  # fmt: skip
MAX_BYTES = 2**20
MAX_VALUES = 100_000  # with each alias written out
MAX_DEPTH = 100
TOO_MANY = f"has more than {MAX_VALUES:,} values once its aliases are written out, so it is no configuration"
# what turns a script's settings into a file; LoraConfig.to_dict() has sets, which JSON lacks
DUMP = """is Python, which is not executed here. Let the script write its settings, after the lines that make them:
  import json
  settings = {"model_name_or_path": "MODEL", "dataset_name": "FILE", **training_args.to_dict(), **peft_config.to_dict()}
  with open("settings.json", "w") as file:
      json.dump(settings, file, default=lambda value: list(value) if isinstance(value, set) else str(value))
without peft_config where there is none, and quantization as "load_in_4bit": True; then
  handloop import-config settings.json
print(training_args.to_json_string()) is a file, too, and adapter_config.json beside a saved adapter"""


def read_config(path: Path) -> dict[str, Any]:
    """The keys and values of a JSON or YAML file; raises ExitWith(BAD_INPUT) with the place of what is wrong."""
    if path.suffix in (".py", ".ipynb"):
        raise _refusal(path, DUMP)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise _refusal(path, f"is larger than {MAX_BYTES:,} bytes, so it is no configuration")
        text = path.read_text(encoding="utf-8-sig")
        found = _plain(_json(text) if path.suffix.lower() == ".json" else _yaml(text))
    except OSError as error:
        raise _refusal(path, f"cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise _refusal(path, f"is not UTF-8 (byte {error.start})") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise ExitWith(ExitCode.BAD_INPUT, f"{path}{place}: not YAML: {error.problem or error.context}") from None
    except json.JSONDecodeError as error:
        place = ":".join(map(str, (path, *place_of(error))))
        raise ExitWith(ExitCode.BAD_INPUT, f"{place}: not JSON: {error.msg.removesuffix(' at')}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise _refusal(path, str(error).splitlines()[0]) from None
    if not isinstance(found, dict) or not found:
        kind = {list: "a list", dict: "empty", type(None): "empty"}.get(type(found), "a text or number")
        raise _refusal(path, f"is {kind}; a configuration has keys and values")
    return found


def _json(text: str) -> Any:
    json.loads(text)  # whose errors have lines
    return parse_json(text)


def _yaml(text: str) -> Any:
    root = yaml.compose(text, yaml.SafeLoader)
    if root is not None:
        _num_values(root, {})
    return yaml.safe_load(text)


def _num_values(node: yaml.Node, known: dict[yaml.Node, int]) -> int:
    """How many values a node is with each alias written out; every node is looked at once.

    Raises MarkedYAMLError where a mapping has a key twice, of which PyYAML takes the last one in silence, and
    ValueError where a node holds itself, or there are more than MAX_VALUES, which PyYAML's merge keys would write out.
    """
    if node in known:
        if not known[node]:
            raise ValueError(f"the value in line {node.start_mark.line + 1} holds itself")
        return known[node]
    known[node] = 0
    within: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        within = node.value
    elif isinstance(node, yaml.MappingNode):
        _check_repeats(node)
        within = [each for pair in node.value for each in pair]
    known[node] = 1 + sum(_num_values(each, known) for each in within)
    if known[node] > MAX_VALUES:
        raise ValueError(TOO_MANY)
    return known[node]


def _check_repeats(node: yaml.MappingNode) -> None:
    seen: set[str] = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):  # PyYAML refuses other keys
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} is there twice", problem_mark=key.start_mark)
            seen.add(key.value)


def _plain(value: Any, depth: int = 0) -> Any:
    """What JSON can say of a value: text for keys, dates and numbers that are not finite; raises ValueError if deep."""
    if depth > MAX_DEPTH:
        raise ValueError("nested too deeply")
    if isinstance(value, dict):
        return {str(key): _plain(each, depth + 1) for key, each in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(each, depth + 1) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"  # NOT_FINITE, as YAML spells them
    return value if isinstance(value, str | int | float | None) else str(value)


def _refusal(path: Path, reason: str) -> ExitWith:
    return ExitWith(ExitCode.BAD_INPUT, f"{path}: {reason}")


def trainer_of(path: Path, found: Mapping[str, Any]) -> str:
    """Whose configuration it is, by the names that it alone has.

    Raises ExitWith(BAD_INPUT) for nobody's, for a recipe of torchtune, and for an adapter that is not LoRA's.
    """
    if reason := _not_translated(found):
        raise _refusal(path, reason)
    known = {trainer: {name for name, _ in rows(trainer)} | marks for trainer, marks in MARKS.items()}
    if not any(name in names for name in found for names in known.values()):
        raise _refusal(path, f"has no key of {', '.join(MARKS)}: {', '.join(list(found)[:6])}")

    def likeness(trainer: str) -> tuple[int, int]:
        ours = [name for name in found if name in known[trainer]]
        alone = [name for name in ours if sum(name in names for names in known.values()) == 1]
        return len(alone), len(ours)

    trainer = max(MARKS, key=likeness)  # of equals the first
    return "Unsloth" if trainer == "TRL" and UNSLOTH & set(found) else trainer


def _not_translated(found: Mapping[str, Any]) -> str:
    """Why nothing of a file can be taken over; empty where something can."""
    if _has_key(found, "_component_"):
        return (
            "is a recipe of torchtune, which import-config does not translate: its keys are arguments of the functions "
            "that `_component_` names. docs/MIGRATING.md has our options"
        )
    method = str(found.get("peft_type") or "LORA").rpartition(".")[2]
    if method.upper() != "LORA":
        reason = reason_for(method)
        return f"peft_type {method}: adapters here are LoRA's alone" + (f"; {reason}" if reason else "")
    return ""


def _has_key(value: Any, name: str) -> bool:
    if isinstance(value, Mapping):
        return name in value or any(_has_key(each, name) for each in value.values())
    return isinstance(value, list) and any(_has_key(each, name) for each in value)
