"""What the trained model does, to compare with what is made of it, and where that is asked."""

import gc
import warnings
from collections.abc import Callable

import torch

from train.data import Splits
from train.deliver.finished import FinishedRun, load_tuned
from train.deliver.merge import Merge
from train.deliver.receipt import Behaviour, Limits, Probe, TransformersModel, behaviour, probe_of
from train.memory.gpus import free_host_bytes
from train.run.exits import ExitCode, ExitWith

GIB = 2**30
Say = Callable[[str], None]


def trained_behaviour(run: FinishedRun, splits: Splits, say: Say) -> tuple[Probe, Behaviour]:
    """What is asked, and what the trained model does; it is not in memory afterwards."""
    probe, trained, _ = _behaviours(run, splits, say, unloads=False)
    return probe, trained


def trained_and_unloaded(run: FinishedRun, splits: Splits, say: Say) -> tuple[Probe, Behaviour, Behaviour | None]:
    """Likewise, and what the model does once PEFT has merged it in its quantised weights.

    None for the last where nothing is quantised, or weights are streamed, which PEFT cannot merge.
    """
    return _behaviours(run, splits, say, unloads=run.config.model.quantization != "none")


def _behaviours(run: FinishedRun, splits: Splits, say: Say, unloads: bool) -> tuple[Probe, Behaviour, Behaviour | None]:
    say(f"loading {run.config.model.name_or_path} with the adapters of {run.folder.final}")
    tuned = load_tuned(run)
    probe, unloaded = probe_of(splits, tuned.tokenizer), None
    asked = TransformersModel(tuned.model.causal_lm, tuned.tokenizer, tuned.end_token_ids)
    with tuned.model.generating():
        trained = behaviour(asked, probe)
        if unloads and tuned.model.engine is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that generations may differ: by how much is what is measured
                tuned.model.adapted.merge_adapter()
            unloaded = behaviour(asked, probe)
    del tuned, asked
    gc.collect()  # modules refer to one another
    return probe, trained, unloaded


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


def limits_of(merge: Merge, max_kl: float | None = None, min_agreement: float | None = None) -> Limits:
    """How far the merged model may be from the trained one; onto another base than was trained on it may be farther.

    docs/LOG.md has what merges reach.
    """
    is_trained_on = merge.onto == "dequantized" or merge.run.config.model.quantization == "none"
    usual = Limits(0.02, 0.9) if is_trained_on else Limits(0.5, 0.75)
    return Limits(
        usual.max_kl if max_kl is None else max_kl, usual.min_agreement if min_agreement is None else min_agreement
    )
