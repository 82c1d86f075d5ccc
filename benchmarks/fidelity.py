"""How far bf16 training is from fp32: losses, gradients and updates by step, on both engines; and one layer alone.

    python -m benchmarks.fidelity --base FOLDER [--data FILE] [--steps 8] [--seeds 0 1 2] [--rates 1e-4 4e-4]

The same rows in the same order from the same adapters, in fp32 (transformers and PEFT), on the fused engine in fp32 (a
control) and in bf16, and on the reference engine in bf16, on a base in 16 bits and in NF4; without dropout and
clipping, with AdamW in fp32. Gradients and losses are compared twice over: along each run's own way, whose differences
add up, and at the adapters that fp32 has at each step, where only this step's rounding differs. `layer` is one
projection: an adapter's output added to a product that is rounded already, as PEFT does, and the two in one product,
by how large it is beside the product's. Everything behind `--` goes to train/main.py.
"""

import argparse
import gc
import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from benchmarks.interrupted_run import commit
from benchmarks.real_job import ROOT
from benchmarks.speed_workloads import COMMON
from train.assemble import assemble
from train.cli import parse
from train.config import Config
from train.data import TrainingData, read_data
from train.layout import BatchLayout
from train.models.language_model import load_adapters
from train.models.tokenizer import load_tokenizer
from train.report.curves import Curve
from train.report.drawing import NUM_COLOURS, svg
from train.report.figures import Chart, Line, Marks, Table
from train.run.accelerator import start_accelerator
from train.run.devices import device_name
from train.run.versions import versions
from train.step import UNWATCHED, Training, optimizer_step, step_gradient

RESULTS = ROOT / "benchmarks" / "results" / "fidelity.json"
REFERENCE = "fp32, reference"
# (engine.kind, model.dtype); the first is what the others are compared with
SYSTEMS = {
    REFERENCE: ("reference", "fp32"),
    "fp32, fused": ("fused", "fp32"),
    "bf16, fused": ("fused", "bf16"),
    "bf16, reference": ("reference", "bf16"),
}
MEASURES = {
    "loss": "distance of the loss from fp32's, each along its own way",
    "loss_at_fp32": "the same with fp32's adapters at that step",
    "gradient_at_fp32": "distance of the gradient from fp32's, over its norm, with fp32's adapters at that step",
    "update": "distance of what the adapters have moved from fp32's, over its norm, each along its own way",
}
SHARES = (0.3, 0.1, 0.03, 0.01, 0.003, 0.001)  # of an adapter's output beside the product's
INK, QUIET = "#222", "#555"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")


@dataclass(frozen=True)
class Setting:
    """What all systems have alike."""

    quantization: str
    rate: float
    seed: int


@dataclass(frozen=True)
class Trace:
    """A run on the host: fp32 vectors of all adapters, and a loss for each step."""

    losses: list[float]
    adapters: list[dict[str, torch.Tensor]]  # before each step, and behind the last
    gradients: list[torch.Tensor]


def main() -> None:
    """Runs every system at every setting, prints the table, writes JSON and pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="folder or hub id of a base with real weights")
    parser.add_argument("--data", default=str(ROOT / "demo" / "glossary.jsonl"), help="what --data.path takes")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-4, 4e-4], help="learning rates")
    parser.add_argument("--quantizations", nargs="+", default=["none", "nf4"], choices=["none", "nf4"])
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON; pictures are written beside it")
    parser.add_argument("words", nargs="*", help="behind --: further options of train/main.py")
    options = parser.parse_args()
    settings = [
        Setting(quantization, rate, seed)
        for quantization in options.quantizations
        for rate in options.rates
        for seed in options.seeds
    ]
    accelerator = start_accelerator(configured(options, settings[0], REFERENCE))
    rows: list[dict[str, Any]] = []
    for setting in settings:
        for row in compared(options, setting, accelerator):
            rows.append(asdict(setting) | row)
            print(line(rows[-1]), flush=True)
        write(options, rows, accelerator.device)


def configured(options: argparse.Namespace, setting: Setting, system: str) -> Config:
    """The run's configuration: that of a user's command."""
    kind, dtype = SYSTEMS[system]
    words = ["--profile", "a100", *COMMON, "--run.device", "auto", "--model.name_or_path", options.base]
    words += ["--data.path", options.data, "--model.quantization", setting.quantization, "--model.dtype", dtype]
    words += ["--engine.kind", kind, "--train.seed", str(setting.seed)]
    words += ["--optim.lr", str(setting.rate), "--lora.dropout", "0", "--optim.name", "adamw"]
    words += ["--optim.max_grad_norm", "inf", "--train.max_steps", str(options.steps)]
    return parse([*words, *options.words])


def compared(options: argparse.Namespace, setting: Setting, accelerator: Accelerator) -> list[dict[str, Any]]:
    """A row of distances for each system but the first, which is run first."""
    training = assembled(configured(options, setting, REFERENCE), accelerator)
    wanted = traced(training, options.steps)
    del training
    rows = []
    for name in [name for name in SYSTEMS if name != REFERENCE]:
        release()
        training = assembled(configured(options, setting, name), accelerator)
        load_adapters(training.model, wanted.adapters[0])  # PEFT draws them in the base's type: others in bf16
        own = traced(training, options.steps)
        at_fp32 = replayed(training, wanted)
        del training
        rows.append({"system": name, "losses": own.losses, "fp32": wanted.losses, **distances(own, at_fp32, wanted)})
    release()
    return rows


def assembled(config: Config, accelerator: Accelerator) -> Training:
    """Model, data and optimizer as a run puts them together."""
    tokenizer = load_tokenizer(config).backend
    samples = read_data(config, tokenizer, date(2026, 1, 1)).training.samples
    layout = BatchLayout.of(config.batch, accelerator)
    return assemble(config, accelerator, TrainingData(samples, config, layout, tokenizer.pad_token_id))


def traced(training: Training, num_steps: int) -> Trace:
    """Takes the steps."""
    trace = Trace([], [adapters(training)], [])
    for step in range(num_steps):
        trace.losses.append(optimizer_step(training, step).loss)
        trace.gradients.append(gradient(training))
        trace.adapters.append(adapters(training))
    return trace


def replayed(training: Training, wanted: Trace) -> Trace:
    """Losses and gradients with the adapters that `wanted` had before each step."""
    trace = Trace([], wanted.adapters, [])
    for step in range(len(wanted.losses)):
        load_adapters(training.model, wanted.adapters[step])
        batch = training.data.batch(step, training.plan)
        found = step_gradient(training, batch, step, UNWATCHED)
        trace.losses.append(found.loss_sum / batch.num_supervised_tokens)
        trace.gradients.append(gradient(training))
    return trace


def adapters(training: Training) -> dict[str, torch.Tensor]:
    """A copy on the host."""
    return {name: parameter.detach().float().cpu().clone() for name, parameter in training.parameters.items()}


def gradient(training: Training) -> torch.Tensor:
    """The gradient of all adapters as one vector on the host."""
    grads = [parameter.grad for parameter in training.parameters.values()]
    return torch.cat([grad.float().cpu().flatten() for grad in grads if grad is not None])


def distances(own: Trace, at_fp32: Trace, wanted: Trace) -> dict[str, list[float]]:
    """MEASURES, a number for each step."""
    start, places = flat(wanted.adapters[0]), range(1, len(wanted.adapters))
    moved = [(flat(own.adapters[i]), flat(wanted.adapters[i])) for i in places]
    assert torch.equal(flat(own.adapters[0]), start)
    return {
        "loss": [abs(a - b) for a, b in zip(own.losses, wanted.losses, strict=True)],
        "loss_at_fp32": [abs(a - b) for a, b in zip(at_fp32.losses, wanted.losses, strict=True)],
        "gradient_at_fp32": [relative(a, b) for a, b in zip(at_fp32.gradients, wanted.gradients, strict=True)],
        "update": [relative(a - start, b - start) for a, b in moved],
    }


def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """All of them as one vector."""
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The distance of `found` from `wanted` over the norm of `wanted`."""
    return float((found - wanted).norm() / wanted.norm())


def release() -> None:
    """Gives back what the last run held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def layer(device: torch.device, size: int = 1024, rank: int = 16) -> list[dict[str, float]]:
    """The error of one bf16 projection with an adapter, over the norm of the adapter's output, by that output's share.

    Operands are the same bf16 numbers in all three; fp64 is what they are compared with. `rounding` is what rounding
    the exact result once costs, which none can go below.
    """
    torch.manual_seed(0)
    x, weight = (torch.randn(size, size, device=device).bfloat16() for _ in "xw")
    down, up = (torch.randn(shape, device=device).bfloat16() for shape in ((rank, size), (size, rank)))
    product = x.double() @ weight.double().T
    rows = []
    for share in SHARES:
        exact = x.double() @ down.double().T @ up.double().T
        scaled = (up.double() * share * product.norm() / exact.norm()).bfloat16()
        exact = x.double() @ down.double().T @ scaled.double().T
        low_rank = x @ down.T
        wide, both = torch.cat([x, low_rank], 1), torch.cat([weight, scaled], 1)
        found = {
            "rounding": (product + exact).bfloat16(),
            "one product": wide @ both.T,
            "added in fp32": ((x @ weight.T).float() + x.float() @ down.float().T @ scaled.float().T).bfloat16(),
            "added in bf16": x @ weight.T + low_rank @ scaled.T,
        }
        errors = {name: float((each.double() - product - exact).norm() / exact.norm()) for name, each in found.items()}
        rows.append({"share": share, **errors})
    return rows


def write(options: argparse.Namespace, rows: Sequence[dict[str, Any]], device: torch.device) -> None:
    """The JSON, and beside it a picture of each measure."""
    about = {"device": device_name(device), "commit": commit(), "versions": versions(), "base": options.base}
    about |= {"data": options.data, "words": options.words, "measures": MEASURES}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({**about, "rows": list(rows), "layer": layer(device)}, indent=1) + "\n")
    for measure in MEASURES:
        target = options.out.with_name(f"{options.out.stem}_{measure}.svg")
        target.write_text(picture(measure, rows), encoding="utf-8")


def picture(measure: str, rows: Sequence[dict[str, Any]]) -> str:
    """A measure by step, the median over seeds and rates, a line for each system and quantisation, as an SVG file."""
    lines = []
    for kind in dict.fromkeys((row["system"], row["quantization"]) for row in rows):
        found = [row[measure] for row in rows if (row["system"], row["quantization"]) == kind]
        values = tuple(statistics.median(column) for column in zip(*found, strict=True))
        curve = Curve(tuple(range(1, len(values) + 1)), values)
        lines.append(Line(f"{kind[0]}, base {kind[1]}", curve, "points", len(lines)))
    chart = Chart(measure, MEASURES[measure], "", lines, Marks(), len(lines[0].full), "", Table("", (), ()))
    drawn = svg(chart)
    box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', drawn)
    assert box
    texts = [(QUIET, MEASURES[measure]), *((COLOURS[each.series], each.label) for each in lines)]
    bottom = float(box[2])
    legend = [
        f'<text x="12" y="{bottom + 14 * n}" fill="{ink}">{told}</text>' for n, (ink, told) in enumerate(texts, 1)
    ]
    colours = ";".join(f"--s{number}:{COLOURS[number]}" for number in range(NUM_COLOURS))
    style = f"--ink:{INK};--quiet:{QUIET};--line:#ccc;{colours};font:10px sans-serif;background:#fff"
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    head = f'<svg {names} style="{style}" viewBox="0 0 {box[1]} {bottom + 14 * (len(texts) + 1)}">'
    body = drawn[drawn.index(">") + 1 :].removesuffix("</svg>")
    return f"{head}{body}{''.join(legend)}</svg>\n"


def line(row: dict[str, Any]) -> str:
    """A row of the table: each measure at its worst step."""
    worst = ", ".join(f"{measure} {max(row[measure]):.2e}" for measure in MEASURES)
    return f"{row['quantization']:4} lr {row['rate']:g} seed {row['seed']} {row['system']:16} at most: {worst}"


if __name__ == "__main__":
    main()
