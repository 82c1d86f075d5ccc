"""How far ways to train in bf16 are from fp32: losses, gradients and updates by step, ours and other programs'.

    python -m benchmarks.fidelity [--model FOLDER] [--seeds 0 1 2] [--rates 2e-4 1e-3] [--bases nf4 none]
                                  [--systems fused-fp32 fused reference trl unsloth] [--steps 40]

All take the same rows in the same order from the same adapters, with torch's AdamW, a constant learning rate, without
dropout and clipping. `fp32` is transformers and PEFT in fp32 on the same base, run once for each seed, rate and base;
`fused-fp32` is a control: how far a second program in fp32 is. So is `seed`, where it is asked for, on a base in 16
bits: transformers' Trainer behind PEFT's prepare_model_for_kbit_training, which makes such a base fp32, and of an NF4
base all that is not packed. A peer that is not installed is named and left out; HANDLOOP_PEERS_PATH is a folder of
packages for them. `layer` in the JSON is one projection, see fidelity_layer.py. `--picture FILE` draws the losses'
distances from the JSON. `--keep FOLDER` keeps fp32's traces for further calls, which take those that were made with the
same base, rows, steps, options, commit, packages and device: of SmolLM2-135M and 40 steps 0.9 GB for each seed, rate
and base. Everything behind `--` goes to train/main.py, in the place of `BATCH`.
"""

import argparse
import importlib.util
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

from benchmarks.fidelity_kept import Kept, keep, kept
from benchmarks.fidelity_layer import layer
from benchmarks.fidelity_picture import picture
from benchmarks.fidelity_runs import FP32, OURS, PEERS, Job, Setting, Trace, configured, our_traces, peer_traces
from benchmarks.fidelity_trace import MEASURES, distances, rounded
from benchmarks.interrupted_run import commit
from benchmarks.real_job import ROOT, digest
from benchmarks.speed import installed, needs
from train.models.fingerprint import base_fingerprint
from train.models.smollm2 import name_or_path
from train.run.accelerator import start_accelerator
from train.run.devices import device_name
from train.run.versions import versions

RESULTS = ROOT / "benchmarks" / "results" / "fidelity.json"
SYSTEMS = (*[name for name in OURS if name != FP32], *PEERS)
BATCH = ["--batch.per_device", "8", "--batch.accumulation", "1"]  # peers take it as one padded batch
ASKED_FOR = ("seed", "fused-fp8")  # left out by default
KEYS = ("system", "base", "rate", "seed")
MADE_WITH = ("data_sha256", "steps", "words", "device", "commit")  # of the JSON: what decides a trace of fp32
FAR = 0.02  # of the first loss, which all systems compute of the same numbers


def main() -> None:
    """Runs every system at every setting, adds its rows to the JSON and prints the table; or draws the picture."""
    options = parsed()
    if options.picture:
        options.picture.write_text(picture(json.loads(options.out.read_text())), encoding="utf-8")
        return
    settings = [Setting(base, rate, seed) for base in options.bases for rate in options.rates for seed in options.seeds]
    accelerator = start_accelerator(configured(options, settings[0]))
    job = Job(options, accelerator, {}, {})
    found = started(options, job)
    own = fp32_rows(job, settings, {name: found[name] for name in MADE_WITH})
    for row in chain(own, *(rows_of(job, system, settings) for system in options.systems)):
        found["rows"] = [each for each in found["rows"] if any(each[key] != row[key] for key in KEYS)] + [row]
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table(found["rows"]))


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=name_or_path(), help="folder or hub id of a base with real weights")
    parser.add_argument("--data", default=str(ROOT / "demo" / "glossary.jsonl"), help="what --data.path takes")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rates", nargs="+", type=float, default=[2e-4, 1e-3], help="learning rates")
    parser.add_argument("--bases", nargs="+", default=["nf4", "none"], choices=["nf4", "none"])
    parser.add_argument(
        "--systems", nargs="+", default=[name for name in SYSTEMS if name not in ASKED_FOR], choices=SYSTEMS
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="of fp32's traces, for further calls")
    parser.add_argument("--picture", type=Path, help="draw this SVG instead")
    parser.add_argument("words", nargs="*", default=BATCH, help="behind --: other options of train/main.py")
    return parser.parse_args()


def started(options: argparse.Namespace, job: Job) -> dict[str, Any]:
    """What the JSON holds beside rows, and the rows of an earlier run of the same program, files, steps and device."""
    about: dict[str, Any] = {"model": Path(options.model).name, "data": Path(options.data).name, "steps": options.steps}
    about |= {"words": options.words, "device": device_name(job.accelerator.device)}
    about |= {"data_sha256": digest(Path(options.data)), "commit": commit()}
    about["versions"] = versions() | {name: installed(name) for name in PEERS}
    found: dict[str, Any] = {**about, "measures": MEASURES}
    known = json.loads(options.out.read_text()) if options.out.exists() else {}
    is_same = about.items() <= known.items()
    found["rows"] = known["rows"] if is_same else []
    options.out.parent.mkdir(parents=True, exist_ok=True)
    return found | {"layer": known["layer"] if is_same else layer(job.accelerator.device)}


def fp32_rows(job: Job, settings: Sequence[Setting], made_with: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """fp32's row for each setting: of the runs that --keep has, then of the others, which it has from then on."""
    folder = job.options.keep
    if folder:
        made_with |= {"versions": versions(), "base_sha256": base_fingerprint(configured(job.options, settings[0]))}
    for setting in settings if folder else ():
        if of := kept(folder, made_with, setting):
            job.starts[setting.seed] = of.start
            told = {"system": FP32, **asdict(setting), "seconds": of.seconds}
            yield told | compared(job, FP32, setting, of.trace)
    for row in rows_of(job, FP32, [setting for setting in settings if setting not in job.wanted]):
        if folder:
            setting = Setting(row["base"], row["rate"], row["seed"])
            keep(folder, made_with, setting, Kept(job.wanted[setting], job.starts[setting.seed], row["seconds"]))
        yield row


def rows_of(job: Job, system: str, settings: Sequence[Setting]) -> Iterator[dict[str, Any]]:
    """A row for each setting; fp32's traces stay in the job for the others. A peer that fails is told and left."""
    missing = [] if system in OURS else [name for name in needs(system) if importlib.util.find_spec(name) is None]
    if missing:
        print(f"{system}: not installed ({', '.join(missing)}), left out", flush=True)
        return
    settings = [each for each in settings if each.base == "nf4" or system != "fused-fp8"]
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        try:
            for setting, trace in traces(job, system, settings, Path(folder)):
                seconds = round(time.perf_counter() - began, 1)
                row = {"system": system, **asdict(setting), "seconds": seconds, **compared(job, system, setting, trace)}
                print(line(row), flush=True)
                yield row
                began = time.perf_counter()
        except RuntimeError as error:
            if system in OURS:
                raise
            print(error, flush=True)


def traces(job: Job, system: str, settings: Sequence[Setting], folder: Path) -> Iterator[tuple[Setting, Trace]]:
    """By whichever program the system is."""
    return our_traces(job, system, settings) if system in OURS else peer_traces(job, system, settings, folder)


def compared(job: Job, system: str, setting: Setting, trace: Trace) -> dict[str, Any]:
    """A row's numbers; raises RuntimeError where the first loss is so far from fp32's that it is of other rows."""
    losses = {"losses": rounded(trace.losses[:-1].tolist())}
    if system == FP32:
        job.wanted[setting] = trace
        return losses
    one, other = float(job.wanted[setting].losses[0]), float(trace.losses[0])
    if not abs(one - other) <= FAR * one:  # also NaN
        raise RuntimeError(f"{system}: the first loss is {other:.4f}, fp32's {one:.4f}")
    return losses | distances(trace, job.wanted[setting])


def line(row: dict[str, Any]) -> str:
    """A run's row for people."""
    told = f"{row['system']:11} base {row['base']:4} lr {row['rate']:g} seed {row['seed']} {row['seconds']:6.1f} s"
    if row["system"] == FP32:
        return f"{told}  loss {row['losses'][0]:.4f} to {row['losses'][-1]:.4f}"
    return (
        f"{told}  loss off by {statistics.median(row['loss_distance']):.2e}, "
        f"update by {row['update_distance'][-1]:.2%}, last gradient by {row['last_gradient_distance']:.2%}"
    )


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Medians over seeds, in Markdown."""
    lines = [
        "| base | learning rate | system | loss, median over steps | higher on average | update, last step "
        "| cosine, first gradient | cosine, last gradient at fp32's adapters |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for base, rate in dict.fromkeys((row["base"], row["rate"]) for row in rows):
        for system in SYSTEMS:
            of = [row for row in rows if (row["base"], row["rate"], row["system"]) == (base, rate, system)]
            if of:
                loss = statistics.median(statistics.median(row["loss_distance"]) for row in of)
                update = statistics.median(row["update_distance"][-1] for row in of)
                names = ("loss_excess", "first_gradient_cosine", "last_gradient_cosine")
                excess, first, last = (statistics.median(row[name] for row in of) for name in names)
                told = f"| {base} | {rate:g} | {system} | {loss:.2e} | {excess:+.2e} | {update:.1%} "
                lines.append(f"{told}| {first:.6f} | {last:.6f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
