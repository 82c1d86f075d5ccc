"""Where the GPU's time goes in optimizer steps of the real job: kernels by kind, and when it waits for the host.

    python -m benchmarks.step_profile [--warmup 20] [--settle 30] [--steps 5] [--out FILE] -- --profile a100 ...
    torchrun --nproc_per_node 2 --no-python python -m benchmarks.step_profile ... -- ...

What stands behind `--` is a run's command line; it ends after the profiled steps, and its folder is kept. Times are of
the first process's GPU, from the end of a step to the end of another, so what lies between steps is in them. A gap is
time without any kernel or copy; it is told by what was on the GPU before and after it. The profiler costs the host some
microseconds a kernel, so gaps are upper bounds where no CUDA graph is replayed.

CUPTI instruments each CUDA graph once, before its first replay under the profiler: a gap of about 4 ms. So --settle
steps run under it before those that count, as the warm-up of torch.profiler's schedules: prepare_trace enables CUPTI's
activities, and what they record before start_trace is not in the trace. A profile before this one would not do: its end
disables them, and the next one begins anew (https://github.com/pytorch/kineto/issues/328). A graph that is replayed for
the first time in a counted step has its gap all the same.
"""

import argparse
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.real_job import run_words, split_words

KINDS = {  # the first whose pattern is in a kernel's name
    "reduction between GPUs": r"nccl",
    "copies": r"Memcpy|Memset|copy_kernel|CatArray",
    "attention": r"flash|fmha|attention|sdpa|bwd_dot_do_o|convert_dq",
    "dequantising": r"[Dd]equantize",
    "optimizer": r"Optimizer|optimizer|adam|multi_tensor",
    "experts' products": r"grouped",
    "products": r"gemm|nvjet|cutlass|cublas|splitK|xmma|matmul",
    "norms, activations, rotary": r"norm|silu|gelu|gate|rotary|triton|_kernel$",
}
SHOWN = 12


@dataclass(frozen=True)
class Work:
    """A kernel or copy on a GPU; microseconds."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Gap:
    """Time in which a GPU has nothing to do, between two kernels."""

    seconds: float
    before: str
    after: str


def gaps(work: Iterable[Work]) -> list[Gap]:
    """The times between the first start and the last end in which no stream works."""
    found, ordered = [], sorted(work, key=lambda each: each.start)
    last = ordered[0]
    for each in ordered[1:]:
        if each.start > last.end:
            found.append(Gap((each.start - last.end) / 1e6, last.name, each.name))
        if each.end > last.end:
            last = each
    return found


def kind_of(name: str) -> str:
    """What a kernel does, by its name."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), "others")


def short(name: str) -> str:
    """A kernel's name without its namespaces, arguments and template parameters."""
    plain = re.sub(r"<.*|\(.*", "", name.removeprefix("void "))
    return (plain.rpartition("::")[2] or plain)[:60]


def summary(work: Sequence[Work], num_steps: int, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Milliseconds a step by kind and by kernel, and its gaps."""
    by_kind, by_kernel = defaultdict[str, float](float), defaultdict[str, float](float)
    for each in work:
        by_kind[kind_of(each.name)] += each.end - each.start
        by_kernel[short(each.name)] += each.end - each.start
    waits, counts = defaultdict[str, float](float), Counter[str]()
    for gap in gaps(work):
        place = f"{short(gap.before)} -> {short(gap.after)}"
        waits[place] += gap.seconds
        counts[place] += 1
    a_step = 1e3 * num_steps
    span = max(each.end for each in work) - min(each.start for each in work)
    idle = sum(waits.values())
    longest = sorted(waits, key=lambda place: -waits[place])[:SHOWN]
    return {
        "steps": num_steps,
        "tokens_a_step": sum(row["data/tokens"] for row in rows) / len(rows),
        "step_ms": round(span / a_step, 3),
        "idle_ms": round(idle * 1e6 / a_step, 3),
        "kernels": len(work) // num_steps,
        "kinds_ms": {kind: round(by_kind[kind] / a_step, 3) for kind in sorted(by_kind, key=lambda k: -by_kind[k])},
        "kernels_ms": {
            name: round(by_kernel[name] / a_step, 3) for name in sorted(by_kernel, key=lambda n: -by_kernel[n])[:SHOWN]
        },
        "gaps_ms": {f"{place}, {counts[place]} times": round(waits[place] * 1e3 / num_steps, 3) for place in longest},
    }


class Window:
    """Profiles steps after `warmup` without the profiler and `settle` under it; called with each step's row."""

    def __init__(self, warmup: int, settle: int, num_steps: int) -> None:
        self.prepared, self.first, self.last = warmup, warmup + settle, warmup + settle + num_steps
        self.rows: list[Mapping[str, Any]] = []
        self.profiler = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])

    def __call__(self, row: Mapping[str, Any]) -> None:
        """Prepares, starts or stops the profiler between two steps."""
        step = row["step"]
        if self.first < step <= self.last:
            self.rows.append(row)
        if step in (self.prepared, self.first, self.last):
            torch.cuda.synchronize()
        if step == self.prepared:
            self.profiler.prepare_trace()
        if step == self.first:
            self.profiler.start_trace()
        if step == self.last:
            self.profiler.stop_trace()

    def work(self) -> list[Work]:
        """What ran on the GPU; names of code, such as torch gives an optimizer's step, lie over it and are none."""
        events: Any = self.profiler.events()
        return [
            Work(event.name, event.time_range.start, event.time_range.end)
            for event in events
            if event.device_type == torch.autograd.DeviceType.CUDA
            and not event.is_user_annotation
            and event.time_range.end > event.time_range.start
        ]


def main() -> None:
    """Runs the job, prints the table, and writes it where that is asked for."""
    own, words = split_words()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--warmup", type=int, default=20, help="steps that are not profiled, at least one")
    parser.add_argument("--settle", type=int, default=30, help="steps under the profiler that do not count")
    parser.add_argument("--steps", type=int, default=5, help="steps that are")
    parser.add_argument("--out", type=Path, help="JSON")
    options = parser.parse_args(own)
    if options.warmup < 1 or options.settle < 0 or options.steps < 1 or not words:
        parser.error("a warm-up step, a profiled one and a run's command line behind `--` are needed")
    if not torch.cuda.is_available():
        parser.error("there is no GPU to profile")
    window = Window(options.warmup, options.settle, options.steps)
    if code := run_words([*words, "--train.max_steps", str(window.last)], lambda _: window):
        sys.exit(code)
    if not window.rows:  # only the first process is told of steps
        return
    found = summary(window.work(), options.steps, window.rows)
    print(table(found), flush=True)
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def table(found: Mapping[str, Any]) -> str:
    """The summary for people."""
    lines = [
        f"{found['tokens_a_step']:,.0f} tokens a step in {found['step_ms']:.2f} ms, of these {found['idle_ms']:.2f} "
        f"without work for the GPU; {found['kernels']:,} kernels and copies"
    ]
    for title in ("kinds_ms", "kernels_ms", "gaps_ms"):
        lines.append(f"{title.removesuffix('_ms')}, ms a step")
        lines += [f"  {milliseconds:9.3f}  {name}" for name, milliseconds in found[title].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
