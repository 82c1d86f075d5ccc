"""Trains given rows with another program and writes its Traces; run by benchmarks.fidelity in a process of its own.

    python -m benchmarks.fidelity_peers JOB.json

Needs what the job names: trl or unsloth. The model is read anew for each run.
"""

import gc
import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.peers import Padded, build


def main() -> None:
    """Does the job's runs one after another, and says when each one's Trace is there."""
    job = json.loads(Path(sys.argv[1]).read_text())
    unsloth = import_module("unsloth") if job["system"] == "unsloth" else None  # before transformers, which it patches
    import torch

    for run in job["runs"]:
        train(job | run, unsloth)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        print(f"{job['written']}{run['out']}", flush=True)


def train(job: dict[str, Any], unsloth: Any) -> None:
    """One run from the given adapters, and behind it a step of the last one's rows at fp32's adapters before that."""
    import datasets
    import torch
    import transformers
    from safetensors.torch import load_file

    from benchmarks.fidelity_trace import Recorder, put_into

    rows = datasets.Dataset.from_list(job["rows"])
    trainer = build(job, rows, Padded(job["pad_token_id"]), unsloth)
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(rows)
    trained = {name: parameter for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    last, sums = job["steps"] - 1, [torch.zeros(())]
    record = Recorder({name.replace(".default.", "."): parameter for name, parameter in trained.items()}, last)
    put_into(record.parameters, load_file(job["start"]))
    record.note_adapters()

    class Watch(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            sums[0] = torch.zeros(())
            if state.global_step == last:
                put_into(record.parameters, load_file(job["point"]))

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step in (0, last):
                record.note_gradient()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            record.losses.append(float(sums[0]))
            if state.global_step <= last:
                record.note_adapters()

    step = trainer.training_step

    def counted(*args: Any, **options: Any) -> Any:
        loss = step(*args, **options)  # this micro-batch's share of the step's mean; logged losses have four digits
        sums[0] = sums[0] + loss.detach().float().cpu()
        return loss

    trainer.training_step = counted
    trainer.add_callback(Watch)
    trainer.train()
    record.trace().save(Path(job["out"]))


if __name__ == "__main__":
    main()
