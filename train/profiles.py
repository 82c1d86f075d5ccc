"""The recipes: one function per profile, which returns a complete configuration."""

from collections.abc import Callable
from dataclasses import replace

from train.bundled import bundled
from train.config import (
    BatchConfig,
    CompareConfig,
    Config,
    DataConfig,
    LoraConfig,
    MemoryConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)

DEMO = bundled("demo")
GLOSSARY = str(DEMO / "glossary.jsonl")


def demo() -> Config:
    """The bundled tiny base memorises the bundled glossary: on a CPU, in three minutes, without network or account."""
    return Config(
        profile="demo",
        model=ModelConfig(name_or_path=str(DEMO / "base")),
        data=DataConfig(path=(GLOSSARY,), max_length=256, group_by_length=True),
        run=RunConfig(dir="runs/demo", device="cpu"),
        lora=LoraConfig(r=32, alpha=64),
        batch=BatchConfig(per_device=8, accumulation=1),
        optim=OptimConfig(lr=3e-3, schedule="cosine", warmup=0.1),
        train=TrainConfig(epochs=12),
        memory=MemoryConfig(checkpointing="none"),
        compare=CompareConfig(num_questions=220, max_new_tokens=96),
    )


def data_alone() -> Config:
    """No profile: what the data commands look at files with, the bundled base's tokenizer unless another is named."""
    return Config(
        profile="none",
        model=ModelConfig(name_or_path=str(DEMO / "base")),
        data=DataConfig(path=(GLOSSARY,)),
        run=RunConfig(dir="runs/none"),
    )


def a100() -> Config:
    """Llama-3.1-8B in NF4 on one GPU with 40 or 80 GB: batch 2 x accumulation 4."""
    return Config(
        profile="a100",
        model=ModelConfig(name_or_path="meta-llama/Llama-3.1-8B"),
        data=DataConfig(path=(GLOSSARY,)),
        run=RunConfig(dir="runs/a100", device="cuda"),
        lora=LoraConfig(r=8, alpha=64, dropout=0.05),
        batch=BatchConfig(per_device=2, accumulation=4),
        optim=OptimConfig(lr=1e-4),
        train=TrainConfig(epochs=3),
    )


def four_gb() -> Config:
    """TinyLlama-1.1B-Chat in NF4 on one 4 GB GPU; it fits without offload, and the allocator is capped at 4 GiB."""
    return Config(
        profile="4gb",
        model=ModelConfig(name_or_path="TinyLlama/TinyLlama-1.1B-Chat-v1.0"),
        data=DataConfig(path=(GLOSSARY,), max_length=512),
        run=RunConfig(dir="runs/4gb", device="cuda"),
        lora=LoraConfig(r=8, alpha=32),
        batch=BatchConfig(per_device=1, accumulation=16),
        optim=OptimConfig(lr=2e-4, schedule="cosine", warmup=0.1, max_grad_norm=0.3),
        train=TrainConfig(epochs=10),
        memory=MemoryConfig(budget="4GiB"),
    )


def multi_gpu() -> Config:
    """The a100 recipe on every GPU of the accelerate configuration, with one replica each (DDP)."""
    base = a100()
    return replace(base, profile="multi_gpu", run=replace(base.run, dir="runs/multi_gpu"))


PROFILES: dict[str, Callable[[], Config]] = {
    "demo": demo,
    "a100": a100,
    "4gb": four_gb,
    "multi_gpu": multi_gpu,
}
