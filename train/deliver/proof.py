"""What the trained model does, to compare with what is made of it, and where that is asked."""

import gc
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from data_tools.report import DataError
from train.data import Splits
from train.deliver.finished import FinishedRun, data_of, load_tuned, tokenizer_of
from train.deliver.merge import Merge, load_merged
from train.deliver.receipt import (
    Behaviour,
    Limits,
    Model,
    Probe,
    Receipt,
    TransformersModel,
    Unlike,
    behaviour,
    probe_of,
)
from train.memory.gpus import free_host_bytes
from train.models.experts import adapts_experts, packed_experts
from train.run.exits import ExitCode, ExitWith

GIB = 2**30
Say = Callable[[str], None]


@dataclass(frozen=True)
class Proof:
    """What a model is asked that is to be what was trained, and what the trained one does."""

    probe: Probe
    trained: Behaviour
    unloaded: Receipt | None  # of what PEFT makes of the quantised weights (merge_and_unload), to compare with

    def receipt(self, name: str, model: Model, limits: Limits) -> Receipt:
        """How the model called `name` differs from the trained one; raises Unlike over a limit."""
        receipt = Receipt.of(self.probe, self.trained, behaviour(model, self.probe))
        if receipt.problems(limits):
            raise Unlike(name, receipt, limits)
        return receipt

    def write_merged(self, merge: Merge, folder: Path, limits: Limits, say: Say) -> Receipt:
        """Writes the merged model into the empty `folder` and asks it, as it will be served.

        Raises Unlike where it is over a limit, ExitWith(BAD_INPUT) where it cannot be written or loaded.
        """
        place = place_for(merge, say)  # before minutes are spent on writing
        say(f"merging onto the {merge.onto} base")
        merge.write(folder)
        say("asking the merged model what the trained one was asked")
        tokenizer, ends = tokenizer_of(merge.run.folder)
        served = TransformersModel(load_merged(folder, merge.dtype, place), tokenizer, ends)
        receipt = self.receipt("the merged model", served, limits)
        del served
        gc.collect()  # modules refer to one another
        return receipt


def data_for_proof(run: FinishedRun, say: Say) -> Splits:
    """The run's data, on whose held-out rows models are asked; raises ExitWith(BAD_INPUT) where it cannot be had."""
    try:
        splits, changes = data_of(run)
    except DataError as error:
        also = " --data.validation_path NEWPLACE" if run.config.data.validation_path else ""
        reason = (
            f"{error}\nThe data is needed for the receipt, which proves on held-out rows that what is written does "
            f"what base and adapter do. If it has moved, write --data.path NEWPLACE{also}."
        )
        raise ExitWith(ExitCode.BAD_INPUT, reason) from None
    for change in changes:
        say(change)
    return splits


def proof_of(run: FinishedRun, splits: Splits, say: Say, unloads: bool) -> Proof:
    """Asks the trained model, which is not in memory afterwards.

    With `unloads` also what PEFT makes of its quantised weights; where none is quantised, and where weights are
    streamed or adapters on packed experts, which PEFT cannot merge, there is no such receipt.
    """
    say(f"loading {run.config.model.name_or_path} with the adapters of {run.folder.final}")
    tuned = load_tuned(run)
    probe, unloaded = probe_of(splits, tuned.tokenizer), None
    unloads = unloads and run.config.model.quantization != "none" and tuned.model.engine is None
    unloads = unloads and not (adapts_experts(tuned.model.adapted) and packed_experts(tuned.model.adapted))
    asked = TransformersModel(tuned.model.causal_lm, tuned.tokenizer, tuned.end_token_ids)
    with tuned.model.generating():
        trained = behaviour(asked, probe)
        if unloads:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that generations may differ: by how much is what is measured
                tuned.model.adapted.merge_adapter()
            unloaded = Receipt.of(probe, trained, behaviour(asked, probe))
    del tuned, asked
    gc.collect()  # modules refer to one another
    return Proof(probe, trained, unloaded)


def place_for(merge: Merge, say: Say) -> torch.device:
    """Where the merged model is asked: the GPU, where it holds it; else the CPU, which is slow.

    Raises ExitWith(BAD_INPUT) where host memory does not hold it either.
    """
    need = int(1.15 * merge.num_bytes) + GIB
    if merge.run.device.type == "cuda":
        torch.cuda.empty_cache()
        if torch.cuda.mem_get_info()[0] > need:
            return merge.run.device
    free = free_host_bytes()
    if free < need:
        reason = f"it needs {need / GIB:.1f} GiB, and {free / GIB:.1f} GiB of host memory are free"
        raise ExitWith(
            ExitCode.BAD_INPUT, f"the merged model is loaded and asked before it is kept: {reason}; free some"
        )
    if merge.run.device.type == "cuda":
        say("the merged model does not fit on the GPU; it is asked on the CPU, which takes minutes")
    return torch.device("cpu")


def limits_of(merge: Merge) -> Limits:
    """How far the merged model may be from the trained one; onto another base than was trained on it may be farther.

    docs/LOG.md has what merges reach.
    """
    is_trained_on = merge.onto == "dequantized" or merge.run.config.model.quantization == "none"
    return Limits(0.02, 0.9) if is_trained_on else Limits(0.5, 0.75)
