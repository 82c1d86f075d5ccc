"""Seconds until a run's first step is done, by what they go into: the real job, in a process of its own.

    python -m benchmarks.first_step NAME [--out benchmarks/results/first_step.json] -- --profile a100 ...

What stands behind `--` is a run's command line; it ends after its first step, in a folder that is removed. NAME is the
row's. Parts are measured where the job calls them, the GPU idle before and after; what lies between two is `others`,
and what a part's own parts take is counted with them alone. `from loading` is what counts from the line that says so,
when data are prepared. A second row, `again`, is of the same command once more: kernels are compiled, data prepared.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import torch

from benchmarks.real_job import ROOT, record, run_words, split_words
from train.config import Config

RESULTS = Path(__file__).parent / "results" / "first_step.json"
# what is called -> what it does; a name where it is called from, since that is what is replaced
PARTS = {
    "train.main.load_tokenizer": "tokenizer",
    "train.main.read_data": "data",
    "train.main.start_accelerator": "processes",
    "train.main.report_audit": "audit",
    "train.assemble.planned_together": "plan",
    "train.models.language_model.load_base": "base",
    "train.models.language_model.with_adapters": "adapters",
    "train.assemble.check_agreement": "agreement with transformers",
    "train.assemble.build_optimizer": "optimizer",
    "train.assemble.fit_to_memory": "longest micro-batch",
    "train.assemble.record_graphs": "graphs",
    "train.main.banner": "banner",
    "train.main.check_folder": "run folder",
    "train.main.open_trackers": "trackers",
    "train.main.begin_record": "record",
    "train.main.training_loop": "first step",
}
LOADING = "train.main.assemble"  # right behind the line `loading`
PREFIX = "first_step "


class Clock:
    """Seconds of parts; those of a part within another count for the inner one alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.inside: list[str] = []
        self.last = self.start = time.perf_counter()
        self.loading = 0.0

    def turn(self, to: str | None) -> None:
        """Enters a part, or leaves the innermost one."""
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[self.inside[-1] if self.inside else "others"] += now - self.last
        self.last = now
        if to is None:
            self.inside.pop()
        else:
            self.inside.append(to)

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function as a part."""

        def call(*arguments: Any, **options: Any) -> Any:
            if part == LOADING:
                self.loading = time.perf_counter()
                return function(*arguments, **options)
            self.turn(part)
            try:
                return function(*arguments, **options)
            finally:
                self.turn(None)

        return call


def main() -> None:
    """Runs the job twice in processes of their own, prints the table and adds the rows to the results."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], usage="%(prog)s NAME [--out FILE] -- OPTION ..."
    )
    parser.add_argument("name")
    parser.add_argument("--out", type=Path, default=RESULTS)
    own, words = split_words()
    options = parser.parse_args(own)
    rows = []
    for run in ("first", "again"):
        rows.append({"run": run, **started(words)})
        print(table(rows[-1]), flush=True)
    record(options.out, options.name, rows, {"words": words})


def started(words: Sequence[str]) -> dict[str, Any]:
    """What a process of its own measured; raises RuntimeError where the job failed."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.first_step", "--one", folder, *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = [line.removeprefix(PREFIX) for line in done.stdout.splitlines() if line.startswith(PREFIX)]
    if not lines:
        raise RuntimeError(
            f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
        )
    return json.loads(lines[-1])


def one(folder: str, words: Sequence[str]) -> int:
    """Runs the job in this process; prints what was measured at its first row."""
    gc.freeze()  # as train/main.py does
    clock, packages = Clock(), time.time() - psutil.Process().create_time()

    def watcher(config: Config) -> Callable[[Mapping[str, Any]], None]:
        def watch(row: Mapping[str, Any]) -> None:
            if row["step"] != 1 or "train/loss" not in row:
                return
            clock.turn("end")
            clock.turn(None)
            parts = {part: round(clock.seconds[part], 2) for part in (*PARTS.values(), "others")}
            since = {
                "from_loading": round(clock.last - clock.loading, 2),
                "seconds": round(packages + clock.last - clock.start, 2),
            }
            print(PREFIX + json.dumps(since | {"packages": round(packages, 2), **parts}), flush=True)

        return watch

    with ExitStack() as patched:
        for name, part in {**PARTS, LOADING: LOADING}.items():
            module, function = name.rsplit(".", 1)
            patched.enter_context(patch(name, clock.timed(part, getattr(sys.modules[module], function))))
        own = ["--train.max_steps", "1", "--run.dir", str(Path(folder) / "run"), "--compare.num_questions", "0"]
        return run_words([*words, *own], watcher)


def table(row: Mapping[str, Any]) -> str:
    """The parts that took a hundredth of a second or more, the longest first."""
    parts = {name: value for name, value in row.items() if name not in ("run", "seconds", "from_loading")}
    ranked = sorted(parts.items(), key=lambda item: -item[1])
    head = f"{row['run']}: {row['seconds']:.1f} s, {row['from_loading']:.1f} from `loading`"
    return "\n".join([head, *(f"{value:8.2f}  {name}" for name, value in ranked if value >= 0.01)])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        sys.exit(one(sys.argv[2], sys.argv[3:]))
    main()
