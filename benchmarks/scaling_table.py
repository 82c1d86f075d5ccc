"""Several GPUs: what the plan predicts beside what was measured, as a table and as a picture.

    python -m benchmarks.scaling_table --predict [WORKLOAD ...] [--gpu H100] [--gpus 1 2 4 8 64]
    python -m benchmarks.scaling_table [--gpu H100] [--picture docs/scaling.svg]

Workloads are those of benchmarks.scaling (short, packed, packed-sharded) and of benchmarks.public. --predict asks
`handloop plan` about each and writes results/scaling_predicted.json; no GPU is needed, and nothing measured goes into
that file. Without it the table is printed as Markdown, with what results/scaling.json and results/public.json have; a
workload that nobody has measured is shown on the first --gpu. --picture draws it instead (benchmarks.scaling_picture).
"""

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks import public, scaling
from benchmarks.interrupted_run import commit
from benchmarks.real_job import ROOT, handloop_plan, shape_folder
from benchmarks.scaling_picture import picture
from train.commands.forecast import PROCESS_BYTES
from train.memory.gpus import known_gpu
from train.memory.outlook import GIB

RESULTS = ROOT / "benchmarks" / "results"
PREDICTED, SCALING, PUBLIC = (RESULTS / f"{name}.json" for name in ("scaling_predicted", "scaling", "public"))
SHARDED = "-sharded"
NAMES = ("short", "packed", f"packed{SHARDED}", *public.WORKLOADS)
A_MACHINE, LINK = 8, 400  # GPUs in a machine, where there are more; Gbit/s between machines
NOTE = (
    "computed by handloop plan, not measured; times_one: over one GPU with a whole replica or streamed weights. More "
    "than 8 GPUs are machines of 8 with 400 Gbit/s between them, and a step has samples_a_step there, as many for each "
    "machine as one machine has: a step of 8 rows cannot be shared by 64 GPUs. host_gib: of a machine, pinned_gib and "
    "2.5 GiB for each process"
)
COLUMNS = ("workload", "GPUs", "tokens/s", "times one", "predicted", "off")
COLUMNS += ("a GPU, GiB", "predicted", "host, GiB", "predicted")


@dataclass(frozen=True)
class Asked:
    """A workload's shape and data in a folder, for plans of it."""

    name: str
    shape: Path
    data: Path
    cards: tuple[str, ...]

    @classmethod
    def of(cls, name: str, cards: list[str], shape: Path | None, folder: Path) -> "Asked":
        """Writes both; the data have a step's rows for as many machines as are asked about."""
        workload = public.WORKLOADS.get(name)
        there = shape_folder(public.shape_of(workload.shape if workload else "Llama-3.1-8B", shape), folder / "shape")
        if workload is None:
            return cls(name, there, scaling.synthetic(there, folder / "rows.jsonl"), tuple(cards))
        rows = public.texts(there, workload.tokens, A_MACHINE * workload.rows, folder / "texts.jsonl")
        return cls(name, there, rows, tuple(cards))

    def words(self, samples: int) -> list[str]:
        """The run's command line, its steps with so many samples."""
        if workload := public.WORKLOADS.get(self.name):
            return public.words_of(workload, self.shape, self.data, samples)
        options = argparse.Namespace(warmup=0, steps=1, words=further_words(self.name))
        words = scaling.words_of(replicas_of(self.name), self.shape, self.data, options)
        words[words.index("--batch.samples") + 1] = str(samples)
        return words


def main() -> None:
    """Predicts, or prints the table, or draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help=f"of {', '.join(NAMES)}; all by default")
    parser.add_argument("--predict", action="store_true")
    parser.add_argument("--gpu", nargs="+", choices=("H100", "H200"), default=["H100", "H200"])
    parser.add_argument("--gpus", nargs="+", type=int, default=[1, 2, 4, 8, 64], help="whole machines of 8 above 8")
    parser.add_argument("--shape", type=Path, help="config.json of another shape, with the bundled tokenizer")
    parser.add_argument("--predicted", type=Path, default=PREDICTED)
    parser.add_argument("--measured", nargs="+", type=Path, default=[SCALING, PUBLIC])
    parser.add_argument("--picture", type=Path, help="draw this SVG instead")
    options = parser.parse_args()
    if unknown := [name for name in options.workloads if name not in NAMES]:
        parser.error(f"no workload {', '.join(unknown)}; there are {', '.join(NAMES)}")
    if uneven := [count for count in options.gpus if count < 1 or (count > A_MACHINE and count % A_MACHINE)]:
        parser.error(f"--gpus {uneven[0]}: at most {A_MACHINE}, or a multiple of it")
    if options.predict:
        for name in options.workloads or NAMES:
            predict(name, options)
        return
    found = {name: beside(name, options) for name in options.workloads or NAMES}
    found = {name: rows for name, rows in found.items() if rows}
    if options.picture:
        options.picture.write_text(picture(found), encoding="utf-8")
    else:
        print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
        print("\n".join(line(name, row) for name, rows in found.items() for row in rows))


def predict(name: str, options: argparse.Namespace) -> None:
    """Replaces the workload's rows in the file by what the plan says of each number of GPUs."""
    with tempfile.TemporaryDirectory() as folder:
        asked = Asked.of(name, options.gpu, options.shape, Path(folder))
        counts = [count for count in options.gpus if count > 1 or not name.endswith(SHARDED)]
        rows = [row for count in counts for row in predicted(asked, count)]
        words = asked.words(samples_of(name, 1))
    words = words[: words.index("--model.name_or_path")] + words[words.index("--data.path") + 2 :]
    known = json.loads(options.predicted.read_text()) if options.predicted.exists() else {"workloads": {}}
    shape = f"{options.shape}" if options.shape else public.WORKLOADS[name].shape if name in public.WORKLOADS else ""
    told = {"date": f"{date.today()}", "commit": commit(), "shape": shape or "Llama-3.1-8B"}
    known = {"note": NOTE, "workloads": known["workloads"] | {name: {**told, "words": " ".join(words), "rows": rows}}}
    options.predicted.parent.mkdir(parents=True, exist_ok=True)
    options.predicted.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


def predicted(asked: Asked, count: int) -> list[dict[str, Any]]:
    """A row for each card."""
    replicas = Asked(replicas_of(asked.name), asked.shape, asked.data, asked.cards)
    one, these = planned(replicas, 1), planned(asked, count)
    rows = []
    for card in asked.cards:
        row = {"gpu": card, "gpus": count, "samples_a_step": samples_of(asked.name, count)}
        if isinstance(these, str):
            row |= {"fits": False, "refused": these}
        else:
            row |= figures(asked.name, count, these[card], one[card]["predicted_tokens_per_second"])
        rows.append(row)
        print(f"{asked.name:18} {json.dumps(row)}", flush=True)
    return rows


@cache
def planned(asked: Asked, count: int) -> Any:
    """The plan's document for each card, from a `handloop plan` of its own; its message where it refuses."""
    nodes = max(1, count // A_MACHINE)
    words = ["--json", "--gpu", asked.cards[0], "--gpus", f"{count // nodes}"]
    words += ["--nodes", f"{nodes}", "--link", f"{LINK}"] if nodes > 1 else []
    words += asked.words(samples_of(asked.name, count))
    done = handloop_plan(words)
    if not done.stdout:  # a plan that does not fit has a document, too
        if done.returncode != 78:
            raise RuntimeError(f"handloop plan {' '.join(words)} ended with {done.returncode}:\n{done.stderr}")
        return done.stderr.strip().splitlines()[-1].removeprefix("handloop: ")
    document = json.loads(done.stdout)
    return {each["gpu"]: each for each in (document, *document["gpus"])}


def figures(name: str, count: int, plan: dict[str, Any], of_one: float | None) -> dict[str, Any]:
    """What a row has of a plan; speeds are null where it does not fit."""
    speed, step = plan["predicted_tokens_per_second"], plan["predicted_step_seconds"]
    row = {
        "fits": plan["fits"],
        "tokens_per_second": speed,
        "times_one": round(speed / of_one, 3) if speed and of_one else None,
        "step_seconds": step,
        "gradient_seconds": max(0.0, round(step - plan["plan"]["seconds"], 4)) if step else None,
        "gib_a_gpu": plan["predicted_peak_gib"],
        "host_gib": round(plan["host_gib"] + min(count, A_MACHINE) * PROCESS_BYTES / GIB, 3),
        "pinned_gib": plan["host_gib"],
        "streamed_blocks": len(plan["plan"]["streamed"]),
        "kept_blocks": plan["plan"]["num_kept"],
    }
    workload = public.WORKLOADS.get(name)
    if workload and workload.published is public.OF_MLPERF:
        seconds = public.MLPERF_ROWS * workload.tokens / speed if speed else None
        row["seconds_for_384_sequences"] = seconds and round(seconds, 1)
    return row


def replicas_of(name: str) -> str:
    """The same work with whole replicas, which runs on one GPU as well."""
    return name.removesuffix(SHARDED)


def samples_of(name: str, count: int) -> int:
    """Samples, or rows, of a step: the workload's for each machine."""
    own = public.WORKLOADS[name].rows if name in public.WORKLOADS else None
    return max(1, count // A_MACHINE) * (own or int(scaling.WORKLOADS[replicas_of(name)].split()[1]))


def beside(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The workload by numbers of GPUs: what was measured, and predicted of the same card; null where there is none."""
    every: dict[str, Any] = {}
    for path in options.measured:
        every |= json.loads(path.read_text()) if path.exists() else {}
    own, base = every.get(key_of(name), {}), every.get(key_of(replicas_of(name)), {})
    gpu = known_gpu(own["device"].partition(",")[0]) if own else None
    card = gpu.name if gpu else options.gpu[0]
    plans = json.loads(options.predicted.read_text())["workloads"].get(name, {}).get("rows", [])
    plans = {row["gpus"]: row for row in plans if row["gpu"] == card}
    runs = {row["processes"]: row for row in own.get("rows", []) if is_like(name, row)}
    is_same = own.get("device") == base.get("device")
    alone = [row["tokens_per_second"] for row in base.get("rows", []) if row["processes"] == 1 and is_like(name, row)]
    rows = []
    for count in sorted({*plans, *runs}):
        run = runs.get(count, {})
        times = run["tokens_per_second"] / alone[0] if run and alone and is_same else None
        rows.append(
            {"gpu": card, "gpus": count, "measured": run, "predicted": plans.get(count, {}), "times_one": times}
        )
    return rows


def key_of(name: str) -> str:
    """The workload's in the results of benchmarks.scaling and benchmarks.public."""
    return name if name in public.WORKLOADS else scaling.key_of(replicas_of(name), further_words(name))


def further_words(name: str) -> list[str]:
    """The options of a workload of benchmarks.scaling beside those that are its own."""
    return scaling.SHARD if name.endswith(SHARDED) else []


def is_like(name: str, row: dict[str, Any]) -> bool:
    """Whether a run has been measured with the workload's step; says so where it was with another."""
    count, rows = row["processes"], row.get("rows_a_step")
    if "failed" in row or rows in (None, samples_of(name, count)):
        return "failed" not in row
    print(f"{name} on {count} GPUs is left out: {rows} rows a step, not {samples_of(name, count)}", file=sys.stderr)
    return False


def line(name: str, row: dict[str, Any]) -> str:
    """A row of the table."""
    run, plan = row["measured"], row["predicted"]
    speed, planned_speed = run.get("tokens_per_second"), plan.get("tokens_per_second")
    off = f"{planned_speed / speed - 1:+.0%}" if speed and planned_speed else "-"
    times = f"{row['times_one']:.2f}" if row["times_one"] else "-"
    told = "refused" if "refused" in plan else shown(planned_speed) if plan.get("fits", True) else "does not fit"
    if planned_speed and plan["times_one"]:
        told += f" ({plan['times_one']:.2f})"
    cells = [f"{name}, {row['gpu']}", f"{row['gpus']}", shown(speed), times, told, off]
    cells += [shown(run.get("peak_gib"), 1), shown(plan.get("gib_a_gpu"), 1)]
    return f"| {' | '.join([*cells, shown(run.get('host_gib')), shown(plan.get('host_gib'))])} |"


def shown(value: float | None, digits: int = 0) -> str:
    """A number, or a dash where there is none."""
    return "-" if value is None else f"{value:,.{digits}f}"


if __name__ == "__main__":
    main()
