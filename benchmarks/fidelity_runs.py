"""The runs that benchmarks.fidelity compares: our engines in this process, other programs each in one of its own."""

import argparse
import gc
import json
import math
import os
import subprocess
import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from benchmarks.fidelity_trace import Recorder, Trace, put_into, unflattened
from benchmarks.real_job import ROOT
from benchmarks.speed import PEERS_PATH
from benchmarks.speed_workloads import BIG
from train.assemble import assemble
from train.cli import parse
from train.config import Config
from train.data import TrainingData, read_data
from train.layout import BatchLayout
from train.learning_rate import Schedule
from train.models.tokenizer import load_tokenizer
from train.optim import build_optimizer
from train.run.exits import ExitCode, ExitWith
from train.step import UNWATCHED, Training, optimizer_step, step_gradient

FP32 = "fp32"
# (engine.kind, model.dtype, engine.products); the first is what all others are compared with
OURS = {
    FP32: ("reference", "fp32", "bf16"),
    "fused-fp32": ("fused", "fp32", "bf16"),
    "fused": ("fused", "bf16", "bf16"),
    "fused-fp8": ("fused", "bf16", "fp8"),  # of NF4 alone
    "reference": ("reference", "bf16", "bf16"),
}
PEERS = ("seed", "trl", "unsloth")
WRITTEN = "trace written: "  # what a peer's process says before the file's path
Adapters = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Setting:
    """What all systems have alike."""

    base: str  # nf4 or none
    rate: float
    seed: int


@dataclass(frozen=True)
class Job:
    """What is asked for, and what all systems share: where adapters begin, by seed, and fp32's traces once they are."""

    options: argparse.Namespace
    accelerator: Accelerator
    starts: dict[int, Adapters]
    wanted: dict[Setting, Trace]

    def point(self, setting: Setting) -> Adapters:
        """The adapters that fp32 has before its last step."""
        return unflattened(self.wanted[setting].adapters[-2], self.starts[setting.seed])


def configured(options: argparse.Namespace, setting: Setting, system: str = FP32) -> Config:
    """The configuration of our run: that of a user's command."""
    kind, dtype, products = OURS[system]
    words = [*BIG, "--run.device", "auto", "--model.name_or_path", options.model, "--data.path", options.data]
    words += ["--model.quantization", setting.base, "--model.dtype", dtype, "--engine.kind", kind]
    words += ["--engine.products", products]
    words += ["--optim.name", "adamw", "--optim.lr", str(setting.rate), "--optim.max_grad_norm", "inf"]
    words += ["--train.seed", str(setting.seed), "--train.max_steps", str(options.steps)]
    return parse([*words, *options.words])


def our_traces(job: Job, system: str, settings: Sequence[Setting]) -> Iterator[tuple[Setting, Trace]]:
    """A Trace for each setting; the model is assembled once for each base."""
    for base in dict.fromkeys(setting.base for setting in settings):
        of_base = [setting for setting in settings if setting.base == base]
        training = assembled(configured(job.options, of_base[0], system), job.accelerator)
        for setting in of_base:
            training = begun(training, configured(job.options, setting, system))
            if setting.seed not in job.starts:
                job.starts[setting.seed] = drawn(training.parameters, setting.seed)
            yield setting, traced(training, job, setting)
        del training
        release()


def assembled(config: Config, accelerator: Accelerator) -> Training:
    """Model, data and optimizer as a run puts them together; raises ExitWith where an epoch has fewer steps."""
    tokenizer = load_tokenizer(config).backend
    samples = read_data(config, tokenizer, date(2026, 1, 1)).training.samples
    data = TrainingData(samples, config, BatchLayout.of(config.batch, accelerator), tokenizer.pad_token_id)
    whole_steps = len(data.rows) // data.layout.samples_per_step
    if config.train.max_steps > whole_steps:
        reason = f"--steps {config.train.max_steps}: the data have rows for {whole_steps} whole steps; take fewer"
        raise ExitWith(ExitCode.BAD_INPUT, reason)
    return assemble(config, accelerator, data)


def begun(training: Training, config: Config) -> Training:
    """The same model at the beginning of another run: its rows' order, learning rate and a new optimizer."""
    old = training.data
    data = TrainingData(old.samples, config, old.layout, old.pad_token_id)
    data.part = old.part
    schedule = Schedule.of(config.optim, data.total_steps(config.train))
    optimizer = build_optimizer(training.flat, config.optim)
    return replace(training, config=config, data=data, schedule=schedule, optimizer=optimizer)


def drawn(parameters: Mapping[str, torch.Tensor], seed: int) -> Adapters:
    """Adapters as PEFT begins them, drawn apart from any model and exact in bf16, so that no system rounds them."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name in sorted(parameters):
        shape = parameters[name].shape
        bound = 0.0 if "lora_B" in name else 1 / math.sqrt(shape[1])  # kaiming_uniform_(a=sqrt(5)), LoraLayer of PEFT
        tensors[name] = torch.empty(shape).uniform_(-bound, bound, generator=generator).bfloat16().float()
    return tensors


def traced(training: Training, job: Job, setting: Setting) -> Trace:
    """Takes the steps, then the last one's gradient at fp32's adapters; fp32's own Trace is kept in the job."""
    num_steps = job.options.steps
    record = Recorder(training.parameters, num_steps)
    put_into(training.parameters, job.starts[setting.seed])
    record.note_adapters()
    for step in range(num_steps):
        record.losses.append(optimizer_step(training, step).loss)
        if step == 0:
            record.note_gradient()
        record.note_adapters()
    before = job.wanted[setting].adapters[-2] if setting in job.wanted else record.adapters[-2]
    put_into(training.parameters, unflattened(before, training.parameters))
    batch = training.data.batch(num_steps - 1, training.plan)
    found = step_gradient(training, batch, num_steps - 1, UNWATCHED)
    record.losses.append(found.loss_sum / batch.num_supervised_tokens)
    record.note_gradient()
    return record.trace()


def release() -> None:
    """Gives back what the last model held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peer_traces(job: Job, system: str, settings: Sequence[Setting], folder: Path) -> Iterator[tuple[Setting, Trace]]:
    """A Trace for each setting by another program: one process for each base, which reads rows and adapters of files.

    Raises RuntimeError where it fails; what it has done by then has been given.
    """
    for base in dict.fromkeys(setting.base for setting in settings):
        of_base = {str(folder / f"trace-{n}.safetensors"): s for n, s in enumerate(settings) if s.base == base}
        path = folder / "job.json"
        path.write_text(json.dumps(peer_job(job, system, of_base, folder)))
        environment = {**os.environ, "PYTHONPATH": f"{PEERS_PATH}:{os.environ.get('PYTHONPATH', '')}".strip(":")}
        environment.pop("PYTORCH_ALLOC_CONF", None)  # train sets it; PYTORCH_CUDA_ALLOC_CONF would reach both
        command = [sys.executable, "-m", "benchmarks.fidelity_peers", str(path)]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as process:
            try:
                said = yield from written(process, of_base)
            except BaseException:  # also where no more is wanted: the other runs would be waited for
                process.kill()
                raise
        if process.returncode:
            raise RuntimeError(f"{system} on base {base} ended with {process.returncode}:\n{''.join(said)[-3000:]}")


def written(process: Any, of_base: Mapping[str, Setting]) -> Generator[tuple[Setting, Trace], None, list[str]]:
    """Each Trace as the process says that it is there; returns all lines that it has said."""
    said = []
    for line in process.stdout:
        said.append(line)
        if line.startswith(WRITTEN):
            out = line.removeprefix(WRITTEN).strip()
            yield of_base[out], Trace.load(Path(out))
            Path(out).unlink()
    return said


def peer_job(job: Job, system: str, of_base: Mapping[str, Setting], folder: Path) -> dict[str, Any]:
    """What benchmarks.fidelity_peers reads, with the files of adapters beside it; `of_base`: a setting by Trace."""
    runs = []
    for number, (out, setting) in enumerate(of_base.items()):
        start, point = folder / f"start-{setting.seed}.safetensors", folder / f"point-{number}.safetensors"
        save_file(job.starts[setting.seed], start)
        save_file(job.point(setting), point)
        rows = step_rows(job, setting)
        runs.append({"rows": rows, "lr": setting.rate, "start": str(start), "point": str(point), "out": out})
    config = configured(job.options, next(iter(of_base.values())))
    is_gpu = job.accelerator.device.type == "cuda"
    # AdamW as torch's in ours, and 0 is how transformers spells no clipping
    optim = "adamw_torch_fused" if is_gpu else "adamw_torch"
    arguments = {"optim": optim, "max_grad_norm": 0.0, "weight_decay": 0.0, "use_cpu": not is_gpu}
    modules = "all-linear" if "all-linear" in config.lora.target_modules else list(config.lora.target_modules)
    return {
        "system": system,
        "model": config.model.name_or_path,
        "pad_token_id": load_tokenizer(config).backend.pad_token_id,
        "per_device": config.batch.per_device,
        "accumulation": config.batch.accumulation,
        "checkpointing": False,
        "steps": job.options.steps + 1,
        "r": config.lora.r,
        "alpha": config.lora.alpha,
        "dropout": config.lora.dropout,
        "modules": modules,
        "quantization": config.model.quantization,
        "arguments": arguments,
        "scratch": str(folder / "scratch"),
        "written": WRITTEN,
        "runs": runs,
    }


def step_rows(job: Job, setting: Setting) -> list[dict[str, Any]]:
    """The rows of all steps in their order, the last one's twice."""
    config = configured(job.options, setting)
    tokenizer = load_tokenizer(config).backend
    samples = read_data(config, tokenizer, date(2026, 1, 1)).training.samples
    data = TrainingData(samples, config, BatchLayout.of(config.batch, job.accelerator), tokenizer.pad_token_id)
    rows = []
    for step in [*range(job.options.steps), job.options.steps - 1]:
        for sample in (data.samples[i] for i in data.sample_ids(step)):
            labels = [t if on else -100 for t, on in zip(sample["input_ids"], sample["trained"], strict=True)]
            rows.append({"input_ids": sample["input_ids"], "labels": labels})
    return rows
