"""Rows longer than one GPU trains at a speed, or at all: one row a step, shared by 1, 2 and 4 GPUs.

    python -m benchmarks.long_context [--gpus 1 4] [--lengths 32768 131072] [--longest] [--shape FOLDER]

Rows are random words of the bundled tokenizer, weights random, NF4, of the shape of Llama-3.1-8B or of FOLDER's
config.json, whose positions are not limited here. Each run is the real job (benchmarks.real_job), with
--batch.context_parallel N on N GPUs; the same rows in the same steps, so losses differ by rounding. --longest begins
at the length that the plan predicts and shortens it by 5 % until a run does not end with 78.
"""

import argparse
import json
import random
import re
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.real_job import handloop_plan, measured, record, single_words
from benchmarks.scaling import default_shape
from benchmarks.speed_workloads import BIG
from train.run.exits import ExitCode
from train.run.folder import RunFolder, read_object

RESULTS = Path(__file__).resolve().parent / "results" / "long_context.json"
MOST_TOKENS = 2**22  # of a row that is looked for
SHORTER = 0.95
STEP = 1024  # tokens


def main() -> None:
    """Runs every length on every number of GPUs, prints a line each and adds the rows to the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--lengths", nargs="*", type=int, default=[131072], help="tokens of a row")
    parser.add_argument("--longest", action="store_true", help="also the longest row that fits")
    parser.add_argument("--shape", type=Path, help="folder with config.json and a tokenizer")
    parser.add_argument("--warmup", type=int, default=1, help="steps that are not counted")
    parser.add_argument("--steps", type=int, default=2, help="steps that are")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("words", nargs="*", help="behind --: further options of train/main.py")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as scratch:
        folder = Path(scratch)
        rows: list[dict[str, Any]] = json.loads(options.out.read_text())["rows"]["rows"] if options.out.exists() else []
        shape = options.shape or default_shape(folder / "shape")
        for count in options.gpus:
            words = words_of(shape, count, options)
            lengths = [[length] for length in options.lengths] + ([tried(words, count)] if options.longest else [])
            for number, candidates in enumerate(lengths):
                row = first_that_fits(words, candidates, count, options, folder / f"{count}-{number}")
                print(line(row), flush=True)
                rows = [each for each in rows if (each["gpus"], each["tokens"]) != (count, row["tokens"])] + [row]
                record(options.out, "rows", rows, {})


def words_of(shape: Path, count: int, options: argparse.Namespace) -> list[str]:
    """The run's command line, but for its rows."""
    words = [*BIG, "--model.name_or_path", str(shape), "--model.random_init", "true"]
    words += ["--model.max_positions", str(MOST_TOKENS)]
    words += ["--batch.per_device", "1", "--batch.accumulation", "1", "--batch.context_parallel", str(count)]
    words += ["--train.max_steps", str(options.warmup + options.steps), "--checkpoint.every", "1000000"]
    words += ["--lora.target_modules", "all-linear", "--data.text_overlap", "0", "--validate.general_text", "off"]
    return words + options.words


def tried(words: list[str], count: int) -> list[int]:
    """Lengths to try, the longest that the plan predicts to fit first; asked in a process of its own, which then gives
    back the memory that CUDA takes.
    """
    far = ["--data.max_length", str(MOST_TOKENS), "--mean-length", str(MOST_TOKENS), "--gpus", str(count), "--json"]
    done = handloop_plan([*words, *far])
    found = re.search(r"--data.max_length (\d+)", done.stdout)
    if found is None:
        raise SystemExit(f"no length was predicted: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return [int(int(found[1]) * SHORTER**times) // STEP * STEP for times in range(8)]


def first_that_fits(
    words: list[str], lengths: list[int], count: int, options: argparse.Namespace, place: Path
) -> dict[str, Any]:
    """The figures of the first of these lengths whose plan fits."""
    ended = {"gpus": count, "tokens": 0}
    for length in lengths:
        own = place.with_name(f"{place.name}-{length}")
        data = written(Path(words[words.index("--model.name_or_path") + 1]), length, options, own.with_suffix(".jsonl"))
        further = ["--data.path", str(data), "--data.max_length", str(length)]
        try:
            found = measured(count, words + further, own, options.warmup)
        except RuntimeError:  # of the launcher, which flattens codes
            how = read_object(RunFolder(own).exit) if RunFolder(own).exit.exists() else {}
            if how.get("code") != ExitCode.BAD_INPUT:
                raise
            ended = {"gpus": count, "tokens": length, "does_not_fit": str(how["reason"]).splitlines()[0]}
        else:
            return {"gpus": count, "tokens": length, **found}
    return ended


def written(shape: Path, length: int, options: argparse.Namespace, target: Path) -> Path:
    """Rows of so many tokens, with what begins and ends a text, for each step one."""
    single, draw = single_words(shape), random.Random(length)
    texts = [
        "".join(f" {draw.choice(single)}" for _ in range(length - 2)) for _ in range(options.warmup + options.steps)
    ]
    target.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return target


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    begins = f"{row['gpus']} x, rows of {row['tokens']:>9,} tokens: "
    if "step_seconds" not in row:
        return begins + row.get("does_not_fit", "nothing fits")
    return begins + (
        f"{row['step_seconds']:.2f} s a step, {row['tokens_per_second']:,.0f} tokens/s, peak {row['peak_gib']:.1f} "
        f"GiB, loss {row['final_loss']:.5f}; {row['plan']}"
    )


if __name__ == "__main__":
    main()
