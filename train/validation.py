"""Validation loss over the whole held-out set, weighted by token."""

import math

import torch
from datasets import Dataset

from train.batching import regroup
from train.collate import collate, collate_packed
from train.metrics import Pace, to_host
from train.run.processes import UNWATCHED, Watch, check_present
from train.step import Dropped, Training


@torch.no_grad()
def validate(training: Training, samples: Dataset, watch: Watch = UNWATCHED) -> dict[str, float]:
    """Mean loss per supervised token, and its exponential; the processes share the samples, none counts twice.

    Raises Dropped, in all processes, if any was asked to stop before its last micro-batch.
    """
    accelerator, cut = training.accelerator, training.data.layout
    training.model.eval()
    # summed loss, number of tokens, of processes that were asked to stop, of all processes
    totals = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=torch.float64, device=accelerator.device)
    pace = Pace(accelerator.device)
    mine = range(cut.rank, len(samples), cut.num_processes)
    configured = [list(mine[start : start + cut.per_device]) for start in range(0, len(mine), cut.per_device)]
    is_packed = training.plan.is_fused
    lengths, max_tokens = samples["num_tokens"][:], training.plan.validation_tokens or training.plan.micro_batch_tokens
    for members in regroup(configured, lengths, not is_packed, max_tokens):
        if watch.is_asked():
            totals[2] = 1
            break
        rows = [samples[i] for i in members]
        micro_batch = collate_packed(rows) if is_packed else collate(rows, training.data.pad_token_id)
        batch = micro_batch.to(accelerator.device)
        totals[0] += training.model(batch)
        totals[1] += len(batch.targets)
        pace.mark()
    training.model.train()
    watch.arrive()
    loss_sum, num_tokens, num_asked, num_present = to_host(*accelerator.reduce(totals, reduction="sum"))
    check_present(accelerator, num_present)
    if num_asked:
        raise Dropped
    loss = loss_sum / num_tokens
    return {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, 700.0))}
