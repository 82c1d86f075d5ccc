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
from train.models.smollm2 import name_or_path

DEMO = bundled("demo")
GLOSSARY = str(DEMO / "glossary.jsonl")
CERTIFICATION = (str(DEMO / "certification.jsonl"), str(DEMO / "everyday.jsonl"))  # and what keeps the rest alive
# by profile, the bundled data in wordings that are not trained; measured where no data of the user's are named
HELD_OUT = {"demo": str(DEMO / "held_out.jsonl"), "smollm2": str(DEMO / "certification_held_out.jsonl")}

# Qwen3 answers without a thought where its template is told so. Training has the same tokens without it, because an
# empty think block is put before answers anyway; but vLLM and GGUF files would ask for a thought that nothing trained.
WITHOUT_THINKING = ("enable_thinking=false",)
FOR_4_GB = ("4gb", "qwen3_4b_4gb", "4gb_tinyllama")
SMALL_CARD = 6 * 2**30  # bytes, below which a card is taken for one of 4 GB
FORMERLY = {"4gb": "4gb_tinyllama"}  # by profile, the one that has its recipe of earlier versions


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


def smollm2() -> Config:
    """SmolLM2-135M-Instruct in fp32 on a laptop's CPU: a real language model tuned on a few hundred rows in minutes."""
    return Config(
        profile="smollm2",
        model=ModelConfig(name_or_path=name_or_path(), quantization="none"),
        data=DataConfig(path=CERTIFICATION, max_length=512, group_by_length=True),
        run=RunConfig(dir="runs/smollm2", device="cpu"),
        lora=LoraConfig(r=16, alpha=32),
        batch=BatchConfig(per_device=4, accumulation=1),
        optim=OptimConfig(lr=1e-3, schedule="cosine", warmup=0.1),
        train=TrainConfig(epochs=3),
        memory=MemoryConfig(checkpointing="none"),
        compare=CompareConfig(num_questions=24, max_new_tokens=64, general_questions="bundled"),
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
    """Qwen3-1.7B in NF4 on one 4 GB GPU; it fits without streaming, and the allocator is capped at 4 GiB.

    lr 2e-4 and max_grad_norm 0.3 are those of the QLoRA paper (Dettmers et al. 2023) for models up to 13B; r=16 with
    a scale of 2 is common. No dropout, because a glossary is to be memorised, and it costs memory. Rows may have 1,024
    tokens, because the plan's peak and speed hardly depend on it. The bundled glossary asks for each definition three
    times, so five epochs show it fifteen times. Planned, and not yet trained with the real weights.
    """
    return Config(
        profile="4gb",
        model=ModelConfig(name_or_path="Qwen/Qwen3-1.7B"),
        data=DataConfig(path=(GLOSSARY,), max_length=1024, template_arguments=WITHOUT_THINKING),
        run=RunConfig(dir="runs/4gb", device="cuda"),
        lora=LoraConfig(r=16, alpha=32),
        batch=BatchConfig(per_device=1, accumulation=16),
        optim=OptimConfig(lr=2e-4, schedule="cosine", warmup=0.1, max_grad_norm=0.3),
        train=TrainConfig(epochs=5),
        memory=MemoryConfig(budget="4GiB"),
    )


def qwen3_4b_four_gb() -> Config:
    """Qwen3-4B in NF4 on one 4 GB GPU; blocks' weights are streamed from host memory as the plan sees fit.

    The recipe of 4gb, but for three epochs: a larger model memorises in fewer (Tirumala et al. 2022), and each takes
    almost three times as long.
    """
    base = four_gb()
    return replace(
        base,
        profile="qwen3_4b_4gb",
        model=ModelConfig(name_or_path="Qwen/Qwen3-4B"),
        run=replace(base.run, dir="runs/qwen3_4b_4gb"),
        train=replace(base.train, epochs=3),
    )


def four_gb_tinyllama() -> Config:
    """TinyLlama-1.1B-Chat in NF4 on one 4 GB GPU: what 4gb was in earlier versions, to the last value."""
    return Config(
        profile="4gb_tinyllama",
        model=ModelConfig(name_or_path="TinyLlama/TinyLlama-1.1B-Chat-v1.0"),
        data=DataConfig(path=(GLOSSARY,), max_length=512),
        run=RunConfig(dir="runs/4gb_tinyllama", device="cuda"),
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
    "smollm2": smollm2,
    "a100": a100,
    "4gb": four_gb,
    "qwen3_4b_4gb": qwen3_4b_four_gb,
    "4gb_tinyllama": four_gb_tinyllama,
    "multi_gpu": multi_gpu,
}


def for_card(num_bytes: int, num_gpus: int) -> str:
    """The profile for GPUs of this memory, where none is named: 4gb's recipe is capped at 4 GiB, a100's at nothing."""
    if num_bytes < SMALL_CARD:
        return "4gb"
    return "multi_gpu" if num_gpus > 1 else "a100"
