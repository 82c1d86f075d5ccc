"""What fp8 products do in each layer: outliers of what they round, their errors, and adapters' gradients.

    python -m benchmarks.fp8_layers [--model FOLDER] [--data ROWS] [--steps 40] [--out FILE]

A base in NF4 is trained in bf16, so that its adapters are not zero. The gradient of the last of --steps is then
computed at these adapters by the fused engine in fp32, bf16 and fp8. A row of the JSON is a group of layers that read
one input, in one block; FIGURES says what of it. On a CPU fp8 is emulated. Everything behind `--` goes to
train/main.py.
"""

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import Accelerator

from benchmarks.fidelity_runs import Adapters, Setting, assembled, begun, configured, drawn, release
from benchmarks.fidelity_trace import cosine, put_into, relative
from benchmarks.interrupted_run import commit
from benchmarks.real_job import ROOT, digest
from train.engine.fp8 import Form, Fp8Group, Fp8Matrix
from train.engine.lora_linear import LoraGroup, frozen_matrix
from train.models.smollm2 import name_or_path
from train.run.accelerator import start_accelerator
from train.run.devices import device_name
from train.run.durable import write_atomically
from train.run.versions import versions
from train.step import UNWATCHED, Training, optimizer_step, step_gradient

RESULTS = ROOT / "benchmarks" / "results" / "fp8_layers.json"
LAYERS = ("q, k, v", "o", "gate, up", "down")  # the groups of a block
SETTING = Setting("nf4", 2e-4, 0)
BATCH = ["--batch.per_device", "8", "--batch.accumulation", "1"]
WORST = 5  # layers that are told by name
FIGURES = {
    "input_peak": "largest element of a token's input over its root mean square, median of tokens",
    "input_peak_most": "the same, of the token where it is largest",
    "product_error": "of the product with that input: distance from fp32's of the same numbers, over its norm",
    "gradient_peak": "as input_peak, of the gradient of the output",
    "gradient_peak_most": "likewise",
    "input_gradient_error": "as product_error, of the input's gradient; None where none is made",
    "bf16_cosine": "of the adapters' gradient in bf16 and in fp32",
    "fp8_cosine": "of the adapters' gradient in fp8 and in fp32",
    "fp8_distance": "of these two, over the norm of fp32's",
}
Place = tuple[int, str]  # a block's number, and which of LAYERS
Gradients = dict[Place, torch.Tensor]


@dataclass
class Seen:
    """What a group has rounded, and what came of it, summed over a step's passes."""

    peaks: list[torch.Tensor] = field(default_factory=list)  # of tokens that are not zeros
    wrong: float = 0.0  # squared norm of what products are off
    whole: float = 0.0  # and of what they should be

    def note(self, read: torch.Tensor, found: torch.Tensor | None, exact: torch.Tensor) -> None:
        """One product; `found` is None where it was not made."""
        largest = read.float().abs().amax(1, keepdim=True)
        has_any = largest[:, 0] > 0  # gradients of tokens that nothing depends on are zeros
        self.peaks.append((read[has_any].float() / largest[has_any]).square().mean(1).rsqrt())
        if found is not None:
            self.wrong += float((found.float() - exact).square().sum())
            self.whole += float(exact.square().sum())

    def told(self, peak: str, error: str) -> dict[str, float | None]:
        """Its figures by these names."""
        peaks = torch.cat(self.peaks)
        share = (self.wrong / self.whole) ** 0.5 if self.whole else None
        return {peak: float(peaks.median()), f"{peak}_most": float(peaks.max()), error: share}


def main() -> None:
    """Computes the three gradients, writes the JSON and prints the tables."""
    options = parsed()
    accelerator = start_accelerator(configured(options, SETTING, "fused"))
    start = trained(options, accelerator)
    gradients, losses, seen = {}, {}, {}
    for system in ("fused-fp32", "fused", "fused-fp8"):
        gradients[system], losses[system], found = gradient(options, accelerator, system, start)
        seen |= found
    rows = list(rows_of(gradients, seen))
    about = {"model": Path(options.model).name, "data": Path(options.data).name, "steps": options.steps}
    about |= {"data_sha256": digest(Path(options.data)), "words": options.words, "commit": commit()}
    about |= {"device": device_name(accelerator.device), "versions": versions(), "losses": losses, "figures": FIGURES}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(options.out, json.dumps({**about, "rows": rows}, indent=1) + "\n")
    print("\n".join(tables(rows)))


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=name_or_path(), help="folder or hub id of a base with real weights")
    parser.add_argument("--data", default=str(ROOT / "demo" / "glossary.jsonl"), help="what --data.path takes")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("words", nargs="*", default=BATCH, help="behind --: other options of train/main.py")
    return parser.parse_args()


def training_of(options: argparse.Namespace, accelerator: Accelerator, system: str) -> Training:
    """At the beginning of a run of all steps."""
    config = configured(options, SETTING, system)
    return begun(assembled(config, accelerator), config)


def trained(options: argparse.Namespace, accelerator: Accelerator) -> Adapters:
    """The adapters that bf16 has before the last step, on the host."""
    training = training_of(options, accelerator, "fused")
    put_into(training.parameters, drawn(training.parameters, SETTING.seed))
    for step in range(options.steps - 1):
        optimizer_step(training, step)
    adapters = {name: parameter.detach().cpu().clone() for name, parameter in training.parameters.items()}
    del training
    release()
    return adapters


def gradient(
    options: argparse.Namespace, accelerator: Accelerator, system: str, start: Adapters
) -> tuple[Gradients, float, dict[str, dict[Place, Seen]]]:
    """Each group's adapters' gradients of the last step, its loss, and in fp8 what groups have seen."""
    training = training_of(options, accelerator, system)
    put_into(training.parameters, start)
    number = options.steps - 1
    batch = training.data.batch(number, training.plan)
    places = {id(group): place for place, group in groups_of(training)}
    with watched(places) as seen:
        found = step_gradient(training, batch, number, UNWATCHED)
    gradients = {
        place: torch.cat([p.grad.flatten().float().cpu() for p in group.parameters if p.grad is not None])
        for place, group in groups_of(training)
        if group.parameters
    }
    del training
    release()
    return gradients, found.loss_sum / batch.num_supervised_tokens, seen


def groups_of(training: Training) -> Iterator[tuple[Place, LoraGroup]]:
    """All groups of the engine's blocks, in order."""
    assert training.model.engine is not None
    for block in training.model.engine.stack.blocks:
        names = LAYERS if len(block.groups) == len(LAYERS) else [str(n) for n in range(len(block.groups))]
        for name, group in zip(names, block.groups, strict=True):
            assert isinstance(group, LoraGroup), "fp8 knows no experts"
            yield (block.number, name), group


@contextmanager
def watched(places: Mapping[int, Place]) -> Iterator[dict[str, dict[Place, Seen]]]:
    """While entered, each fp8 product of these groups, by their ids, is noted beside the same one in fp32."""
    seen: dict[str, dict[Place, Seen]] = {"forward": defaultdict(Seen), "backward": defaultdict(Seen)}
    own_forward, own_gradient = Fp8Group.forward, Fp8Group.input_gradient

    def forward(self: Fp8Group, matrix: Fp8Matrix, x: Any, low_rank: Any, out: Any, drop: Any) -> None:
        is_fp8 = matrix.read(0)[0] is not Form.WIDE
        own_forward(self, matrix, x, low_rank, out, drop)
        if is_fp8 and id(self) in places:
            seen["forward"][places[id(self)]].note(x, out, exact_product(self, matrix, x, low_rank))

    def input_gradient(self: Fp8Group, matrix: Fp8Matrix, grad_out: Any, drop: Any, grad_x: Any) -> None:
        given = grad_out[:, : self.num_outputs].clone()
        own_gradient(self, matrix, grad_out, drop, grad_x)
        if id(self) in places:
            low_rank = grad_out[:, self.num_outputs :]
            seen["backward"][places[id(self)]].note(given, grad_x, exact_gradient(self, matrix, given, low_rank))

    with patch.object(Fp8Group, "forward", forward), patch.object(Fp8Group, "input_gradient", input_gradient):
        yield seen


def exact_product(group: LoraGroup, matrix: Any, x: torch.Tensor, low_rank: torch.Tensor) -> torch.Tensor:
    """[T, N] in fp32, of the weights that NF4 stands for."""
    out = x.float() @ _wide(group).T + low_rank.float() @ group.up(matrix).float().T
    return out if group.bias is None else out + group.bias.float()


def exact_gradient(group: LoraGroup, matrix: Any, grad: torch.Tensor, low_rank: torch.Tensor) -> torch.Tensor:
    """[T, K] in fp32 likewise."""
    return grad.float() @ _wide(group) + low_rank.float() @ group.down(matrix).float()


def _wide(group: LoraGroup) -> torch.Tensor:
    return torch.cat([frozen_matrix(base, torch.float32) for base in group.bases])


def rows_of(gradients: Mapping[str, Gradients], seen: Mapping[str, Mapping[Place, Seen]]) -> Iterator[dict[str, Any]]:
    """The figures of each group."""
    wanted, bf16, fp8 = (gradients[system] for system in ("fused-fp32", "fused", "fused-fp8"))
    for place, one in seen["forward"].items():
        row: dict[str, Any] = {"block": place[0], "layers": place[1]}
        row |= one.told("input_peak", "product_error")
        row |= seen["backward"][place].told("gradient_peak", "input_gradient_error")
        if place in wanted:
            row |= {
                "bf16_cosine": cosine(bf16[place], wanted[place]),
                "fp8_cosine": cosine(fp8[place], wanted[place]),
                "fp8_distance": relative(fp8[place], wanted[place]),
            }
        yield {name: value if isinstance(value, int | str | None) else round(value, 5) for name, value in row.items()}


def tables(rows: list[dict[str, Any]]) -> list[str]:
    """Medians and worst of each kind of layer, and the layers whose gradients are furthest off."""
    lines = [f"| layers, {len(rows)} groups | " + " | ".join(FIGURES) + " |"]
    for name in dict.fromkeys(row["layers"] for row in rows):
        of_kind = [row for row in rows if row["layers"] == name]
        cells = []
        for figure in FIGURES:
            values = [row[figure] for row in of_kind if row.get(figure) is not None]
            worst = min if "cosine" in figure else max
            cells.append(f"{statistics.median(values):.4g}, {worst(values):.4g}" if values else "")
        lines.append(f"| {name}: median, worst | " + " | ".join(cells) + " |")
    known = sorted((row for row in rows if "fp8_cosine" in row), key=lambda row: row["fp8_cosine"])
    lines += [
        f"block {row['block']}, {row['layers']}: cosine {row['fp8_cosine']:.4f} (bf16 {row['bf16_cosine']:.4f}), "
        f"input's peak {row['input_peak_most']:.0f}, gradient's {row['gradient_peak_most']:.0f}"
        for row in known[:WORST]
    ]
    return lines


if __name__ == "__main__":
    main()
