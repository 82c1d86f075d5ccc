"""Tiny models, the bundled tokenizer, and runs of the real command, without network or GPU."""

import json
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"
BUNDLED_BASE = ROOT / "demo" / "base"
TODAY = date(2026, 1, 31)

os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="offline", TOKENIZERS_PARALLELISM="false")
# tests run in parallel, and OpenMP's spinning threads slow each other down if there are more of them than cores
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402  (after the thread count)
from accelerate import Accelerator  # noqa: E402
from transformers import AutoTokenizer, LlamaConfig  # noqa: E402

from train.assemble import assemble  # noqa: E402
from train.config import (  # noqa: E402
    BatchConfig,
    CompareConfig,
    Config,
    DataConfig,
    LoraConfig,
    MemoryConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrackConfig,
    TrainConfig,
    ValidateConfig,
)
from train.data import Splits, TrainingData, read_data  # noqa: E402
from train.deliver.questions import Question, questions_of  # noqa: E402
from train.layout import BatchLayout  # noqa: E402
from train.models.tokenizer import load_tokenizer  # noqa: E402
from train.step import Training  # noqa: E402

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest test comes first, or one process would wait for it alone at the end."""
    items.sort(key=lambda item: "test_demo.py" not in item.nodeid)


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Puts prepared data into a temporary folder."""
    os.environ["HANDLOOP_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def shape(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the config.json of a two-layer Llama and the bundled tokenizer, without weights."""
    folder = tmp_path_factory.mktemp("shape")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(BUNDLED_BASE / name, folder / name)
    vocab_size = json.loads((BUNDLED_BASE / "config.json").read_text())["vocab_size"]
    write_shape(folder, vocab_size)
    return folder


def write_shape(folder: Path, vocab_size: int) -> None:
    """The config.json of a tiny Llama with grouped key/value heads."""
    LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        tie_word_embeddings=False,
    ).save_pretrained(folder)


@pytest.fixture(scope="session")
def llama31_8b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the published shape of Llama-3.1-8B as config.json: no tokenizer, no weights."""
    return published_llama(
        tmp_path_factory.mktemp("llama31_8b"),
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        bos_token_id=128000,
        eos_token_id=128001,
    )


@pytest.fixture(scope="session")
def tinyllama_1b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same for TinyLlama-1.1B-Chat."""
    return published_llama(
        tmp_path_factory.mktemp("tinyllama_1b"),
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=2048,
    )


def published_llama(folder: Path, **settings: Any) -> Path:
    """The folder, with config.json as Llama's checkpoints have it."""
    LlamaConfig(
        **settings,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nineteen question/answer rows of very different lengths; 19 is no multiple of a batch size used here."""
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [
        {"prompt": f"What is part {i}?", "response": "a bolt " * (1 + (7 * i) % 23) + f"number {i}."} for i in range(19)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def config(shape: Path, pairs: Path, tmp_path: Path) -> Config:
    """`tiny_run` in the test's own folder."""
    return tiny_run(shape, pairs, tmp_path / "run")


def tiny_run(shape: Path, pairs: Path, run_dir: Path) -> Config:
    """A complete configuration of a run that takes a second: random NF4 base, 8-bit AdamW, batch 2 x 4."""
    return Config(
        profile="test",
        model=ModelConfig(name_or_path=str(shape), random_init=True),
        data=DataConfig(path=(str(pairs),), max_length=128),
        run=RunConfig(dir=str(run_dir), device="cpu"),
        lora=LoraConfig(r=4, alpha=8),
        batch=BatchConfig(per_device=2, accumulation=4),
        optim=OptimConfig(lr=1e-2, warmup=2),
        train=TrainConfig(epochs=2),
        memory=MemoryConfig(checkpointing="none"),
        validate=ValidateConfig(at_start=False, general_text="off", num_questions=0),
        track=TrackConfig(wandb="off"),
        compare=CompareConfig(num_questions=0),
    )


def tokenizer_at(folder: Path = BUNDLED_BASE) -> Any:
    """The tokenizer in `folder`."""
    return AutoTokenizer.from_pretrained(folder)


def with_batch(config: Config, per_device: int, accumulation: int) -> Config:
    """The same run with another per-device batch and accumulation."""
    return replace(config, batch=replace(config.batch, per_device=per_device, accumulation=accumulation))


def arguments(config: Config, profile: str = "demo") -> list[str]:
    """The command line whose configuration is `config`, with `profile` as its profile."""
    words = ["--profile", profile]
    for section, fields in vars(config).items():
        for name, value in vars(fields).items() if section != "profile" else ():
            values = list(value) if isinstance(value, tuple) else [str(value)]
            if values and values != [""]:
                words += [f"--{section}.{name}", *map(str, values)]
    return words


def splits_of(config: Config) -> Splits:
    """The training and validation data of `config`, prepared."""
    return read_data(config, load_tokenizer(config).backend, TODAY)


def asked_in(config: Config, count: int) -> list[Question]:
    """The questions of the first `count` training samples."""
    samples = splits_of(config).training.samples
    return questions_of(samples, range(len(samples)), load_tokenizer(config).backend, count)


def training_of(config: Config, accelerator: Accelerator) -> Training:
    """What train/main.py assembles for `config`."""
    tokenizer = load_tokenizer(config).backend
    samples, layout = splits_of(config).training.samples, BatchLayout.of(config.batch, accelerator)
    data = TrainingData(samples, config, layout, tokenizer.pad_token_id)
    return assemble(config, accelerator, data)


@dataclass(frozen=True)
class Outcome:
    """How a run ended; a negative returncode is the number of the signal that killed it."""

    returncode: int | None
    stdout: str
    stderr: str


class Run:
    """`train/main.py WORDS` in a process forked from one that has already imported everything, which takes 5 s.

    `fault` is called in it before anything else (tests/injections.py). An empty value removes an environment variable.
    """

    def __init__(self, words: Sequence[str], fault: Callable[[], None] | None = None, **environment: str) -> None:
        self.folder = Path(tempfile.mkdtemp())
        setting = {**os.environ, **environment}
        self.process = _FORKS.Process(target=_child, args=(list(words), str(self.folder), fault, setting))
        self.process.start()

    def is_alive(self) -> bool:
        return self.process.is_alive()

    def said(self) -> str:
        """The output so far."""
        return (self.folder / "stdout").read_text() if (self.folder / "stdout").exists() else ""

    def signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def wait(self) -> Outcome:
        self.process.join(300)
        assert not self.process.is_alive(), "the run hangs"
        texts = [path.read_text() if path.exists() else "" for path in (self.folder / n for n in ("stdout", "stderr"))]
        return Outcome(self.process.exitcode, *texts)  # a run that is killed at once has no output files


# CUDA cannot be used in a fork of a process that has initialised it, as some imports do
_FORKS: Any = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
_FORKS.set_forkserver_preload(["train.main", "torch._dynamo", "transformers.models.llama.modeling_llama"])


def _child(words: list[str], folder: str, fault: Callable[[], None] | None, environment: dict[str, str]) -> None:
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT, 0o600), descriptor)
    os.environ.clear()
    os.environ.update({name: value for name, value in environment.items() if value})
    os.chdir(ROOT)
    if fault is not None:
        fault()
    from train.main import main

    sys.exit(main(words))


def run_command(words: Sequence[str], fault: Callable[[], None] | None = None, **environment: str) -> Outcome:
    """Runs `train/main.py WORDS` to its end."""
    return Run(words, fault, **environment).wait()


def losses(run_dir: Path) -> list[tuple[int, str, str]]:
    """(step, loss bits, gradient norm bits) of every step in metrics.jsonl; nan where a step was skipped."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], _bits(row, "train/loss"), _bits(row, "train/grad_norm")) for row in rows]


def _bits(row: dict[str, float], name: str) -> str:
    return row.get(name, float("nan")).hex()


thorough: Any = pytest.mark.skipif(
    os.environ.get("HANDLOOP_TESTS") != "thorough" and os.environ.get("HANDLOOP_FAULTS") != "full",
    reason="a further variant of a test beside it: bash launch/test.sh --thorough",
)
needs_shared: Callable = pytest.mark.skipif(
    not SHARED.is_dir(),
    reason=f"needs real tokenizers, chat templates or data sets, which are not bundled; none at {SHARED}",
)
