"""Trains given rows with another program and writes how fast it was; run by benchmarks.speed in a process of its own.

    python -m benchmarks.peers JOB.json

Needs what the job names: trl, liger-kernel or unsloth. `seed` is transformers' Trainer as the wildfire notebook had it.
"""

import json
import os
import sys
import time
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="disabled", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")


class Padded:
    """Pads rows on the right to the longest."""

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        import torch

        width = max(len(row["input_ids"]) for row in rows)

        def filled(name: str, value: int) -> torch.Tensor:
            return torch.tensor([list(row[name]) + [value] * (width - len(row[name])) for row in rows])

        ids = filled("input_ids", self.pad_token_id)
        lengths = torch.tensor([[len(row["input_ids"])] for row in rows])
        mask = (torch.arange(width)[None] < lengths).long()
        return {"input_ids": ids, "attention_mask": mask, "labels": filled("labels", -100)}


def main() -> None:
    """Trains the job's rows and writes steps, tokens, losses and the peak."""
    job = json.loads(Path(sys.argv[1]).read_text())
    unsloth = (
        import_module("unsloth") if job["system"] == "unsloth" else None
    )  # patches transformers, so it comes first
    import datasets
    import torch
    import transformers

    if job["cap_gib"]:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(job["cap_gib"] * 2**30 / total)
    collator = Padded(job["pad_token_id"])
    times, losses = [time.perf_counter()], []

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            torch.cuda.synchronize()
            times.append(time.perf_counter())

        def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
            if logs and "loss" in logs:
                losses.append(float(logs["loss"]))

    rows = datasets.Dataset.from_list(job["rows"])
    trainer = build(job, rows, collator, unsloth)
    # rows come in the order of the job: both trainers shuffle otherwise
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(rows)
    trainer.add_callback(Watch)
    trainer.train()
    seconds = [later - earlier for earlier, later in pairwise(times)]
    # not counted by the collator: loaders fetch ahead
    size = job["per_device"] * job["accumulation"]
    lengths = [len(row["input_ids"]) for row in job["rows"]]
    counts = [sum(lengths[start : start + size]) for start in range(0, len(lengths), size)]
    result = {
        "seconds": seconds,
        "tokens": counts,
        "losses": losses,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
    }
    Path(job["out"]).write_text(json.dumps(result))


def weights(job: dict[str, Any]) -> dict[str, Any]:
    """How the base is loaded."""
    import torch
    import transformers

    options: dict[str, Any] = {"dtype": torch.bfloat16, "device_map": {"": 0 if torch.cuda.is_available() else "cpu"}}
    if job["quantization"] == "nf4":
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    return options


def build(job: dict[str, Any], rows: Any, collator: Padded, unsloth: Any) -> Any:
    """The trainer of the job's system, at the job's settings."""
    import peft
    import torch
    import transformers

    common: dict[str, Any] = {
        "output_dir": job["scratch"],
        "per_device_train_batch_size": job["per_device"],
        "gradient_accumulation_steps": job["accumulation"],
        "max_steps": job["steps"],
        "learning_rate": job["lr"],
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "remove_unused_columns": False,
        **job["arguments"],
    }
    shape = {
        "r": job["r"],
        "lora_alpha": job["alpha"],
        "lora_dropout": job["dropout"],
        "target_modules": job["modules"],
    }
    lora = peft.LoraConfig(**shape, task_type="CAUSAL_LM")
    options = weights(job)
    if job["system"] == "seed":
        model = transformers.AutoModelForCausalLM.from_pretrained(
            job["model"], **options, use_safetensors=True, trust_remote_code=False
        )
        model.gradient_checkpointing_enable()
        model = peft.get_peft_model(peft.prepare_model_for_kbit_training(model), lora)
        model.config.use_cache = False
        arguments = transformers.TrainingArguments(bf16=False, **common)
        return transformers.Trainer(model=model, train_dataset=rows, args=arguments, data_collator=collator)
    trl: Any = import_module("trl")
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(job["model"], trust_remote_code=False)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(job["pad_token_id"])
    settings = {"bf16": True, "max_length": 2048, "dataset_kwargs": {"skip_prepare_dataset": True}, **common}
    more: dict[str, Any] = {"train_dataset": rows, "data_collator": collator, "processing_class": tokenizer}
    if unsloth is not None:
        loader = unsloth.FastLanguageModel
        length = {"max_seq_length": 2048, "dtype": torch.bfloat16, "load_in_4bit": job["quantization"] == "nf4"}
        model, _ = loader.from_pretrained(job["model"], **length, use_safetensors=True, trust_remote_code=False)
        checkpointing = "unsloth" if job["checkpointing"] else False
        model = loader.get_peft_model(model, **shape, use_gradient_checkpointing=checkpointing, bias="none")
        return trl.SFTTrainer(model=model, args=trl.SFTConfig(**settings), **more)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        job["model"], **options, use_safetensors=True, trust_remote_code=False
    )
    settings |= {"gradient_checkpointing": job["checkpointing"], "use_liger_kernel": "liger" in job["system"]}
    return trl.SFTTrainer(model=model, args=trl.SFTConfig(**settings), peft_config=lora, **more)


if __name__ == "__main__":
    main()
