"""Speed and memory of preparing data, and masks and packing beside TRL's on the same rows where TRL is installed.

    python -m benchmarks.prepare --out benchmarks/results/prepare.json --tokenizer FOLDER [--chat N] [--million] PATH

Rows are prompt/response pairs, texts, or with --chat N conversations of one to three questions. Both sides start from
the files and end with token ids and masks in an Arrow table. Each is run once, ours first; TRL in one process, which is
its default, ours on all cores. The audit of what we prepared is timed, too.
"""

import argparse
import json
import os
import random
import resource
import tempfile
import time
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.interrupted_run import commit
from data_tools.audit import Schedule, audit
from data_tools.chat_template import PLAIN_TEMPLATE, Dialect
from data_tools.packing import pack
from data_tools.prepare import DataSplit, Prepared, PrepareSettings, prepare
from data_tools.records import Conversation, Tally, read_records
from train.run.versions import versions

MAX_LENGTH = 1024
WORDS = (
    "pump",
    "valve",
    "crate",
    "order",
    "pilot",
    "wing",
    "invoice",
    "gauge",
    "permit",
    "hangar",
    "rivet",
    "audit",
    "seal",
)


def main() -> None:
    """Measures, prints a line each, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument(
        "--million", action="store_true", help="also a million synthetic rows, for the memory they take"
    )
    parser.add_argument("--chat", type=int, default=0, metavar="N", help="also N synthetic conversations")
    parser.add_argument("paths", nargs="*")
    options = parser.parse_args()
    tokenizer: Any = AutoTokenizer.from_pretrained(options.tokenizer, trust_remote_code=False)
    tokenizer.chat_template = tokenizer.chat_template or PLAIN_TEMPLATE
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["HANDLOOP_CACHE"] = scratch
        chats = [conversations(Path(scratch) / "chat.jsonl", options.chat)] if options.chat else []
        for path in [*options.paths, *chats]:
            settings = PrepareSettings((path,), max_length=MAX_LENGTH)
            prepared, row = ours(settings, tokenizer)
            results.append(row)
            if find_spec("trl") is not None:
                results.append(trls(settings, tokenizer, prepared, scratch))
        if options.million:
            results.append(a_million(tokenizer, Path(scratch)))
    report = {"results": results, "versions": versions(), "cores": os.cpu_count(), "commit": commit()}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for row in results:
        print({key: value for key, value in row.items() if key != "first_difference"})


def ours(settings: PrepareSettings, tokenizer: Any) -> tuple[Prepared, dict[str, Any]]:
    """Our preparation from the files, into an empty cache."""
    began = time.perf_counter()
    prepared = prepare(settings, tokenizer)
    row = figures("handloop", settings, time.perf_counter() - began, prepared.statistics.num_tokens)
    lengths = prepared.dataset["num_tokens"][:]
    bins = pack(lengths, MAX_LENGTH)
    row["packing_fill"] = round(sum(lengths) / (len(bins) * MAX_LENGTH), 4)
    began = time.perf_counter()
    audit(DataSplit(prepared, prepared.dataset), None, tokenizer, Schedule(1, 1, 1, "samples", 1, 1, 1, 1, 1, ""))
    row["audit_seconds"] = round(time.perf_counter() - began, 2)
    records = prepared.statistics.num_records
    return prepared, row | {"records": records, "records_per_second": round(records / row["seconds"])}


def conversations(path: Path, count: int) -> str:
    """A file of conversations of one to three questions, 320 tokens on average."""
    draw = random.Random(0)
    with path.open("w") as file:
        for i in range(count):
            turns = []
            for k in range(draw.choice((1, 1, 1, 2, 3))):
                question, answer = (" ".join(draw.choices(WORDS, k=draw.randint(*n))) for n in ((5, 40), (10, 80)))
                turns.append({"role": "user", "content": f"{i}.{k}: {question}"})
                turns.append({"role": "assistant", "content": f"{answer} {i}."})
            file.write(json.dumps({"messages": turns}) + "\n")
    return str(path)


def trls(settings: PrepareSettings, tokenizer: Any, prepared: Prepared, scratch: str) -> dict[str, Any]:
    """SFTTrainer's preparation of the same rows, its masks against ours, and its bfd packing."""
    from datasets import Dataset

    trl: Any = import_module("trl")  # a peer, not a dependency
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    shape = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=1, **small)
    model = LlamaForCausalLM(shape)
    arguments = trl.SFTConfig(output_dir=scratch, report_to=[], max_length=MAX_LENGTH, use_cpu=True, bf16=False)
    began = time.perf_counter()
    dataset = Dataset.from_list(list(as_trl(settings)))
    trainer = trl.SFTTrainer(model=model, args=arguments, train_dataset=dataset, processing_class=tokenizer)
    seconds = time.perf_counter() - began
    made: Any = trainer.train_dataset
    lengths = [len(ids) for ids in made["input_ids"]]
    row = figures(f"trl {trl.__version__}", settings, seconds, sum(lengths))
    packed: Any = import_module("trl.data_utils").pack_dataset(
        made.select_columns(["input_ids"]), MAX_LENGTH, strategy="bfd"
    )
    row["packing_fill"] = round(sum(len(ids) for ids in packed["input_ids"]) / (len(packed) * MAX_LENGTH), 4)
    return row | compare(made.to_list(), prepared, tokenizer)


def compare(theirs: list[dict[str, Any]], prepared: Prepared, tokenizer: Any) -> dict[str, Any]:
    """How many rows have the same ids and the same mask, and the first that does not."""
    if "text" in prepared.statistics.formats:
        return {}
    same_ids = same_masks = 0
    first = None
    for mine, other in zip(prepared.dataset.to_list(), theirs, strict=True):
        mask = [label != -100 for label in other["labels"]]
        same_ids += mine["input_ids"] == other["input_ids"]
        same = mine["input_ids"] == other["input_ids"] and mine["trained"] == mask
        same_masks += same
        if not same and first is None:
            ours_only = [t for t, on in zip(mine["input_ids"], mine["trained"], strict=True) if on]
            theirs_only = [t for t, on in zip(other["input_ids"], mask, strict=False) if on]
            first = {"handloop": tokenizer.decode(ours_only[-8:]), "trl": tokenizer.decode(theirs_only[-8:])}
    return {"rows_with_equal_ids": same_ids, "rows_with_equal_masks": same_masks, "first_difference": first}


def as_trl(settings: PrepareSettings) -> Iterator[dict[str, Any]]:
    """The rows in the conversational prompt/completion layout, or as texts."""
    for record in read_records(settings.survey().sources, Tally.empty()):
        if isinstance(record, Conversation):
            turns = [Dialect().turn(message) for message in record.messages]
            yield {"prompt": turns[:-1], "completion": turns[-1:]}
        else:
            yield {"text": record.text}


def a_million(tokenizer: Any, scratch: Path) -> dict[str, Any]:
    """A million short rows: records a second, and the most memory that this process and each of its workers took."""
    path = scratch / "million.jsonl"
    with path.open("w") as file:
        for i in range(1_000_000):
            words = [WORDS[(i * k) % len(WORDS)] for k in range(1, 9 + i % 9)]
            file.write(json.dumps({"prompt": f"What is part {i}?", "response": " ".join(words) + "."}) + "\n")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    settings = PrepareSettings((str(path),), max_length=MAX_LENGTH)
    began = time.perf_counter()
    prepared = prepare(settings, tokenizer)
    row = figures("handloop", settings, time.perf_counter() - began, prepared.statistics.num_tokens)
    row["records"] = prepared.statistics.num_records
    row["records_per_second"] = round(row["records"] / row["seconds"])
    row["gib_before"] = round(before / 2**20, 2)
    row["peak_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    row["peak_gib_of_a_worker"] = round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20, 2)
    return row


def figures(system: str, settings: PrepareSettings, seconds: float, num_tokens: int) -> dict[str, Any]:
    """The row that every measurement begins with."""
    num_bytes = sum(source.num_bytes() for source in settings.survey().sources)
    return {
        "system": system,
        "data": Path(settings.paths[0]).name,
        "seconds": round(seconds, 2),
        "tokens": num_tokens,
        "tokens_per_second": round(num_tokens / seconds),
        "mb_per_second": round(num_bytes / 1e6 / seconds, 2),
    }


if __name__ == "__main__":
    main()
