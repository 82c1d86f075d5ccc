"""The README of an exported model: what it was made of and how, its figures, its receipts, and how it is loaded.

Only what the run folder, the base's own card and the export know is said: a licence is never invented, and of the data
no path of this machine is told.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import yaml

from data_tools.sources import is_hub_name
from train.deliver.finished import FinishedRun
from train.run.attempts import last_start
from train.run.json_lines import read_lines

RECIPE = {
    "lora": ("r", "alpha", "dropout", "target_modules", "rslora", "trainable_tokens", "modules_to_save"),
    "data": ("max_length", "packing", "truncation", "history"),
    "batch": ("per_device", "accumulation"),
    "optim": ("name", "lr", "schedule", "warmup", "weight_decay", "max_grad_norm"),
    "train": ("epochs", "max_steps", "seed"),
}


@dataclass(frozen=True)
class Contents:
    """What is exported: file names relative to the folder."""

    adapter: bool  # in the folder itself
    merged: str  # the folder of the merged model; empty: none
    gguf: Sequence[str]
    adapter_gguf: str
    modelfile: bool
    receipts: Mapping[str, Mapping[str, Any]]  # by what they are of
    notes: Sequence[str]

    @property
    def has_adapter(self) -> bool:
        """Whether adapters are among it, apart from their base."""
        return self.adapter or bool(self.adapter_gguf)

    @property
    def what(self) -> str:
        """What it is, in words."""
        kinds = ["LoRA adapters"] if self.adapter else []
        kinds += ["LoRA adapters as a GGUF file"] if self.adapter_gguf else []
        merged = ["safetensors"] if self.merged else []
        merged += ["GGUF files" if len(self.gguf) > 1 else "a GGUF file"] if self.gguf else []
        kinds += [f"a merged model, base and LoRA adapters in one, as {' and '.join(merged)}"] if merged else []
        text = "; ".join(kinds)
        return f"{text[0].upper()}{text[1:]}"


def card(run: FinishedRun, name: str, contents: Contents, licence: Mapping[str, str]) -> str:
    """README.md. `licence` is the base's: license, license_name and license_link, as its own card has them."""
    start = last_start(run.folder)
    sections = [
        f"# {name}",
        _about(run, start, contents),
        "## Use\n\n" + "\n\n".join(_uses(run, contents)),
        "## Data\n\n" + _data(run, start),
        "## Training\n\n" + _training(run, start),
        *_receipts(contents.receipts),
        *(["## Notes\n\n" + "\n".join(f"- {note}" for note in contents.notes)] if contents.notes else []),
        "## Licence\n\n" + _licence(run, licence),
    ]
    return f"---\n{_front_matter(run, contents, licence)}---\n\n" + "\n\n".join(sections) + "\n"


def _front_matter(run: FinishedRun, contents: Contents, licence: Mapping[str, str]) -> str:
    fields: dict[str, Any] = {}
    if run.base.get("commit"):
        fields["base_model"] = run.base["name"]
        fields["base_model_relation"] = "adapter" if contents.has_adapter else "finetune"
    fields["library_name"] = "peft" if contents.adapter else "transformers" if contents.merged else "gguf"
    fields["pipeline_tag"] = "text-generation"
    is_gguf = bool(contents.gguf or contents.adapter_gguf)
    fields["tags"] = [*(["lora"] if contents.has_adapter else []), *(["gguf"] if is_gguf else []), "handloop"]
    data_sets = [name.partition(":")[0] for name in run.config.data.path if _is_on_hub(name)]
    if data_sets:
        fields["datasets"] = sorted(set(data_sets))
    return yaml.safe_dump({**fields, **licence}, sort_keys=False, allow_unicode=True)


def _base_name(run: FinishedRun) -> str:
    """The hub id and commit of the base, or the last part of its folder's path."""
    name, commit = str(run.base.get("name", run.config.model.name_or_path)), run.base.get("commit")
    return f"[{name}](https://huggingface.co/{name}) (commit `{commit}`)" if commit else f"`{PurePath(name).name}`"


def _about(run: FinishedRun, start: Mapping[str, Any], contents: Contents) -> str:
    held = {"nf4": "4 bits (NF4)", "int8": "8 bits", "none": "16 or 32 bits"}[run.config.model.quantization]
    return (
        f"{contents.what}. The base is {_base_name(run)}, and was held in {held} while Handloop "
        f"{start.get('code_version', '')} trained the adapters."
    )


def _uses(run: FinishedRun, contents: Contents) -> list[str]:
    base = str(run.base.get("name", "")) if run.base.get("commit") else "BASE"
    kind = "AutoModelForImageTextToText" if run.base.get("served_as") else "AutoModelForCausalLM"
    uses = []
    if contents.adapter:
        uses.append(
            "With PEFT:\n\n```python\nfrom peft import PeftModel\nfrom transformers "
            f'import {kind}, AutoTokenizer\n\nbase = {kind}.from_pretrained("{base}", dtype="bfloat16")\n'
            'model = PeftModel.from_pretrained(base, "THIS_FOLDER")\n'
            'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")\n```'
        )
    if contents.merged:
        place = f"THIS_FOLDER/{contents.merged}" if contents.merged != "." else "THIS_FOLDER"
        uses.append(f'Merged, with transformers: `{kind}.from_pretrained("{place}", dtype="auto")`')
    if contents.gguf:
        uses.append("With llama.cpp: " + ", ".join(f"`llama-cli -m {name}`" for name in contents.gguf))
    if contents.adapter_gguf:
        uses.append(f"As an adapter in llama.cpp: `llama-cli -m BASE.gguf --lora {contents.adapter_gguf}`")
    if contents.modelfile:
        uses.append("With Ollama: `ollama create NAME -f Modelfile`, then `ollama run NAME`")
    given = ", ".join(f"`{each}`" for each in run.config.data.template_arguments)
    if given and (contents.adapter or contents.merged):
        uses.append(
            f"Conversations were rendered with {given}: give the same to `apply_chat_template`, or to a server as "
            "`chat_template_kwargs`. GGUF files have them in their template."
        )
    return uses


def _data(run: FinishedRun, start: Mapping[str, Any]) -> str:
    names = ", ".join(f"`{_data_name(name)}`" for name in run.config.data.path)
    data = start.get("data")
    if not isinstance(data, dict):
        return names
    counts = [("num_records", "records"), ("num_training_samples", "training samples"), ("num_tokens", "tokens")]
    counts.append(("supervised_tokens_per_epoch", "of them trained in an epoch"))
    told = [f"{data[key]:,} {what}" for key, what in counts if isinstance(data.get(key), int)]
    formats = data.get("formats")
    kinds = f" ({', '.join(map(str, formats))})" if isinstance(formats, list) and formats else ""
    return f"{names}{kinds}: {', '.join(told)}."


def _is_on_hub(name: str) -> bool:
    return is_hub_name(name) and not Path(name).exists()


def _data_name(name: str) -> str:
    return name if _is_on_hub(name) else PurePath(name).name or PurePath(name).as_posix()


def _training(run: FinishedRun, start: Mapping[str, Any]) -> str:
    rows = []
    for section, names in RECIPE.items():
        values = vars(getattr(run.config, section))
        rows += [f"| `{section}.{name}` | {_shown(values[name])} |" for name in names if name in values]
    lines = ["| option | value |", "|---|---|", *rows]
    versions = start.get("versions")
    if isinstance(versions, dict):
        lines += ["", "Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()) + "."]
    figures = _figures(run)
    return "\n".join([*lines, *(["", figures] if figures else [])])


def _shown(value: object) -> str:
    return ", ".join(f"`{each}`" for each in value) if isinstance(value, tuple) else f"`{value}`"


def _figures(run: FinishedRun) -> str:
    """Losses of metrics.jsonl."""
    try:
        rows = list(read_lines(run.folder.metrics))
    except OSError:
        return ""
    told = []
    for key, what in (("train/loss", "training loss"), ("eval/loss", "validation loss")):
        found = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), float) and "step" in row]
        if found:
            (first, before), (last, after) = found[0], found[-1]
            told.append(f"{what} {before:.4f} at step {first:,}")
            told[-1] += f", {after:.4f} at step {last:,}" if last != first else ""
            lowest = min(found, key=lambda each: each[1] if math.isfinite(each[1]) else math.inf)
            told[-1] += f" (lowest {lowest[1]:.4f} at step {lowest[0]:,})" if lowest[0] not in (first, last) else ""
    return "; ".join(told).capitalize() + "." if told else ""


def _receipts(receipts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    if not receipts:
        return []
    lines = [
        "## Receipt",
        "",
        "Each file was asked the same as base and adapter were right after training, and compared:",
        "",
        "| file | mean KL, nats | top-1 agreement | largest logit difference | loss | equal answers |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in receipts.items():
        lines.append(
            f"| `{name}` | {found['mean_kl']:.2g} | {found['agreement']:.1%} | {found['largest_difference']:.2g} | "
            f"{found['loss_trained']:.4f} -> {found['loss_served']:.4f} | "
            f"{found['equal_answers']} of {found['num_questions']} |"
        )
    one = next(iter(receipts.values()))
    lines += ["", f"Over {one['num_positions']:,} predictions in {one['num_rows']} {one['kind']} samples."]
    return ["\n".join(lines)]


def _licence(run: FinishedRun, licence: Mapping[str, str]) -> str:
    if not licence:
        return (
            f"What was trained is bound to the licence of its base, {_base_name(run)}, which is not known here. "
            "Look it up, and add it, before this is passed on."
        )
    told = ", ".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in licence.items())
    return f"That of its base, {_base_name(run)}: {told}."
