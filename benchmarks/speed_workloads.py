"""What benchmarks.speed trains, by which systems and at which settings."""

from dataclasses import dataclass

FIELDS = ("--data.fields", "prompt=question", "response=answer")
COMMON = ("--track.wandb", "off", "--compare.num-questions", "0", "--optim.schedule", "constant", "--data.gate", "warn")
BIG = ("--profile", "a100", "--lora.r", "16", "--lora.alpha", "32", "--lora.dropout", "0", *COMMON)
SMALL = ("--profile", "4gb_tinyllama", "--lora.r", "16", "--lora.alpha", "32", "--optim.warmup", "0", *COMMON)


@dataclass(frozen=True)
class Run:
    """One system at one setting."""

    system: str
    per_device: int
    accumulation: int
    checkpointing: bool  # of a peer; of ours it is among the words
    words: tuple[str, ...] = ()  # for ours
    note: str = ""


@dataclass(frozen=True)
class Workload:
    """What is trained and by whom; `words` is the part of our command that tells the rows and the recipe."""

    words: tuple[str, ...]
    runs: tuple[Run, ...]
    peer_steps: int
    our_steps: int
    warmup: int
    our_warmup: int
    cap_gib: float = 0.0


NO_MERGE = ("--batch.merge", "off")
FP8 = ("--engine.products", "fp8")
WORKLOADS = {
    "short": Workload(
        (*BIG, *FIELDS),
        (
            Run("handloop", 2, 4, False, note="defaults: one unpadded pass, graphs, bf16 copies of weights"),
            Run("handloop", 2, 4, False, FP8, note="defaults, fp8 products"),
            Run("handloop", 2, 4, False, ("--memory.budget", "16GiB"), note="16 GiB"),
            Run("handloop", 2, 4, False, ("--memory.budget", "6GiB"), note="6 GiB"),
            Run("unsloth", 2, 4, True, note="its defaults"),
            Run("unsloth", 8, 1, False, note="one padded batch, nothing recomputed"),
            Run("trl+liger", 8, 1, False, note="one padded batch, nothing recomputed"),
            Run("seed", 2, 4, True, note="the notebook's recipe"),
        ),
        peer_steps=8, our_steps=40, warmup=3, our_warmup=20,
    ),
    "packed": Workload(
        (*BIG, "--data.max-length", "2048", "--data.text-overlap", "0"),
        (
            Run("handloop", 4, 4, False, ("--memory.budget", "37GiB"), note="37 GiB"),
            Run("handloop", 4, 4, False, ("--memory.budget", "37GiB", *FP8), note="37 GiB, fp8 products"),
            Run("unsloth", 4, 4, False),
            Run("trl+liger", 4, 4, False),
            Run("handloop", 4, 4, True, ("--memory.checkpointing", "full", *NO_MERGE)),
            Run("handloop", 4, 4, True, ("--memory.checkpointing", "full", *NO_MERGE, *FP8), note="fp8 products"),
            Run("handloop", 4, 4, True, ("--memory.budget", "7.5GiB"), note="7.5 GiB"),
            Run("unsloth", 4, 4, True),
        ),
        peer_steps=5, our_steps=8, warmup=2, our_warmup=2,
    ),
    "lines": Workload(
        ("--profile", "a100", *COMMON, "--data.format", "text"),
        (
            Run("handloop", 2, 4, False, note="defaults, with the recipe's dropout of 0.05"),
            Run("seed", 2, 4, True, note="the notebook's recipe"),
        ),
        peer_steps=8, our_steps=50, warmup=3, our_warmup=25,
    ),
    "small": Workload(
        (*SMALL, *FIELDS),
        (
            Run("handloop", 1, 16, True, ("--memory.budget", "2GiB"), note="2 GiB"),
            Run("handloop", 1, 16, False, note="4 GiB"),
            Run("unsloth", 1, 16, True),
        ),
        peer_steps=8, our_steps=40, warmup=3, our_warmup=20, cap_gib=4.0,
    ),
}  # fmt: skip
