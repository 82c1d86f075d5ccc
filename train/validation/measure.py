"""Validation loss, weighted by token, over held-out samples and a general text."""

import math
import time

import torch
from datasets import Dataset

from train.batching import regroup
from train.collate import collated
from train.metrics import Pace, to_host
from train.run.processes import UNWATCHED, Watch, check_present
from train.step import Dropped, Training
from train.validation.material import Material


@torch.no_grad()
def validate(training: Training, material: Material, watch: Watch = UNWATCHED) -> dict[str, float]:
    """Mean loss per supervised token, and its exponential; the processes share the samples, none counts twice.

    `eval/loss` is over all held-out samples; where they come from several data paths, `eval/path1/loss` and so on are
    each path's own. `eval/general_loss` is the general text's. Empty where there is nothing to measure. Raises Dropped,
    in all processes, if any was asked to stop before its last micro-batch.
    """
    accelerator, started = training.accelerator, time.monotonic()
    texts = material.texts
    if not texts:
        return {}
    training.model.eval()
    # of each text, its summed loss and number of tokens; of processes that were asked to stop, of all processes
    totals = torch.zeros(2 * len(texts) + 2, dtype=torch.float64, device=accelerator.device)
    totals[-1] = 1.0
    pace = Pace(accelerator.device)
    for number, samples in enumerate(texts):
        if not _add(training, samples, totals[2 * number : 2 * number + 2], watch, pace):
            totals[-2] = 1.0
            break
    training.model.train()
    watch.arrive()
    *sums, num_asked, num_present = to_host(*accelerator.reduce(totals, reduction="sum"))
    check_present(accelerator.num_processes, num_present)
    if num_asked:
        raise Dropped
    of_text = list(zip(sums[::2], sums[1::2], strict=True))
    row = _losses(dict(zip(material.parts, of_text, strict=False)))
    if material.general is not None:
        loss_sum, num_tokens = of_text[-1]
        row["eval/general_loss"] = loss_sum / num_tokens
    return row | {"perf/validation_seconds": round(time.monotonic() - started, 3)}


def _add(training: Training, samples: Dataset, sums: torch.Tensor, watch: Watch, pace: Pace) -> bool:
    """Adds this process's share of the samples to (loss, tokens); False if it was asked to stop."""
    data, plan = training.data, training.plan
    cut, is_packed = data.layout, data.is_packed(plan)
    mine = range(cut.rank, len(samples), cut.num_processes)
    configured = [list(mine[start : start + cut.per_device]) for start in range(0, len(mine), cut.per_device)]
    lengths, max_tokens = samples["num_tokens"][:], plan.validation_tokens or plan.micro_batch_tokens
    for members in regroup(configured, lengths, not is_packed, max_tokens):
        if data.part.any_of(watch.is_asked()):
            return False
        micro_batch = collated([samples[i] for i in members], is_packed, data.pad_token_id, data.part)
        batch = micro_batch.to(training.accelerator.device)
        sums[0] += training.model(batch)
        sums[1] += len(batch.targets)
        pace.mark()
    return True


def _losses(of_path: dict[int, tuple[float, float]]) -> dict[str, float]:
    """The loss over all paths, and each path's where there are several; by (loss sum, number of tokens)."""
    if not of_path:
        return {}
    loss_sum, num_tokens = (sum(column) for column in zip(*of_path.values(), strict=True))
    row = {"eval/loss": loss_sum / num_tokens, "eval/perplexity": perplexity(loss_sum / num_tokens)}
    row["eval/tokens"] = int(num_tokens)
    if len(of_path) > 1:
        for number, (loss, count) in of_path.items():
            row |= {f"eval/path{number}/loss": loss / count, f"eval/path{number}/perplexity": perplexity(loss / count)}
    return row


def perplexity(loss: float) -> float:
    """The exponential of a loss per token; as large as a float can be where it would overflow."""
    return math.exp(min(loss, 700.0))
