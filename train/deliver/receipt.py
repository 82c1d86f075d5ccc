"""Whether a model that is handed on behaves like the one that was trained: both asked the same, and compared."""

import inspect
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from datasets import Dataset
from transformers import GenerationConfig, PreTrainedTokenizerBase

from data_tools.samples import Sample
from train.data import Splits
from train.deliver.questions import questions_of
from train.run.exits import ExitCode, ExitWith

MAX_POSITIONS = 1024  # predictions that are compared: their logits are kept, 0.5 GB at 128,000 tokens
MAX_ROWS = 64
NUM_QUESTIONS = 8
MAX_NEW_TOKENS = 64
CHUNK = 64  # positions whose probabilities are compared at once


@dataclass(frozen=True)
class Probe:
    """What the models are asked."""

    rows: list[list[int]]  # token ids of samples
    positions: list[list[int]]  # in each row, those whose next token was, or would have been, trained
    questions: list[list[int]]  # prompts
    kind: str  # held out, or trained

    @property
    def num_positions(self) -> int:
        """Predictions that are compared."""
        return sum(map(len, self.positions))


class Model(Protocol):
    """A model that can be compared, whatever runs it."""

    def logits(self, ids: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        """Ids [T] -> fp32 logits [len(positions), V] in host memory: those of all T are 4 GB for a long row."""
        ...

    def answer(self, prompt: Sequence[int]) -> list[int]:
        """The ids of the greedy answer, up to MAX_NEW_TOKENS, without its end token."""
        ...


@dataclass(frozen=True)
class Behaviour:
    """What a model does on a probe."""

    logits: torch.Tensor  # fp32 [num_positions, V]
    answers: list[list[int]]


@dataclass(frozen=True)
class Limits:
    """How far a model may be from the one that was trained."""

    max_kl: float  # mean over positions, in nats
    min_agreement: float
    are_options: bool = False  # --max-kl and --min-agreement set them

    def allows_kl(self, mean_kl: float) -> bool:
        """Whether a model may differ so; one that is no number it may not."""
        return mean_kl <= self.max_kl

    def allows_agreement(self, agreement: float) -> bool:
        """Whether a model may agree so seldom."""
        return agreement >= self.min_agreement

    def with_options(self, max_kl: float | None, min_agreement: float | None) -> "Limits":
        """With what a user gave in place of these; None: nothing."""
        return Limits(
            self.max_kl if max_kl is None else max_kl,
            self.min_agreement if min_agreement is None else min_agreement,
            are_options=True,
        )


@dataclass(frozen=True)
class Receipt:
    """How a model that is handed on differs from the one that was trained."""

    kind: str  # of the rows: held out, or trained
    num_rows: int
    num_positions: int
    largest_difference: float  # of any logit
    mean_kl: float  # KL(trained || served) in nats, over all positions
    largest_kl: float
    agreement: float  # share of positions with the same most likely token
    loss_trained: float  # per token of the rows
    loss_served: float
    num_questions: int
    equal_answers: int  # greedy answers, token for token

    @classmethod
    def of(cls, probe: Probe, trained: Behaviour, served: Behaviour) -> "Receipt":
        """Compares two models' behaviours on one probe; tokens that only one of them has logits for are left out."""
        size = min(trained.logits.shape[1], served.logits.shape[1])
        targets = torch.tensor(
            [row[i + 1] for row, places in zip(probe.rows, probe.positions, strict=True) for i in places]
        )
        difference, divergences, same, losses = 0.0, [], 0, torch.zeros(2, dtype=torch.float64)
        for start in range(0, len(targets), CHUNK):
            part = slice(start, start + CHUNK)
            one, other = trained.logits[part, :size], served.logits[part, :size]
            difference = max(difference, (one - other).abs().max().item())
            same += int((one.argmax(-1) == other.argmax(-1)).sum())
            log_p, log_q = one.double().log_softmax(-1), other.double().log_softmax(-1)
            divergences.append((log_p.exp() * (log_p - log_q)).sum(-1))
            for i, log in enumerate((log_p, log_q)):
                losses[i] -= log.gather(1, targets[part, None]).sum()
        divergence, pairs = torch.cat(divergences), zip(trained.answers, served.answers, strict=True)
        return cls(
            kind=probe.kind,
            num_rows=len(probe.rows),
            num_positions=len(targets),
            largest_difference=difference,
            mean_kl=divergence.mean().item(),
            largest_kl=divergence.max().item(),
            agreement=same / len(targets),
            loss_trained=losses[0].item() / len(targets),
            loss_served=losses[1].item() / len(targets),
            num_questions=len(probe.questions),
            equal_answers=sum(one == other for one, other in pairs),
        )

    def as_json(self) -> dict[str, Any]:
        """As written beside the model."""
        return asdict(self)

    def problems(self, limits: Limits) -> list[str]:
        """What exceeds the limits; a figure that is no number does."""
        found = []
        if not limits.allows_kl(self.mean_kl):
            found.append(f"mean KL {self.mean_kl:.3g} nats, {limits.max_kl:g} allowed")
        if not limits.allows_agreement(self.agreement):
            found.append(f"top-1 agreement {self.agreement:.1%}, {limits.min_agreement:.1%} wanted")
        return found


class Unlike(ExitWith):
    """The end by a model that differs too much from the trained one; it is not kept."""

    def __init__(self, name: str, receipt: Receipt, limits: Limits) -> None:
        what = f"by {receipt.num_positions:,} {receipt.kind} predictions: {'; '.join(receipt.problems(limits))}"
        way_out = "; --max-kl and --min-agreement say what is allowed" if limits.are_options else ""
        reason = f"{name} does not behave like the trained model, {what}\nnothing was kept{way_out}"
        super().__init__(ExitCode.UNLIKE, reason)
        self.name, self.receipt, self.limits = name, receipt, limits


class TransformersModel:
    """A model that transformers runs."""

    def __init__(self, causal_lm: Any, tokenizer: PreTrainedTokenizerBase, end_token_ids: Sequence[int]) -> None:
        self.causal_lm = causal_lm
        self.settings = GenerationConfig(
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            eos_token_id=list(end_token_ids),
            pad_token_id=tokenizer.pad_token_id,
        )
        self.end_token_ids = set(end_token_ids)
        self.keeps = "logits_to_keep" in inspect.signature(causal_lm.forward).parameters

    @torch.no_grad()
    def logits(self, ids: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        """See Model."""
        row = torch.tensor([list(ids)], device=self.causal_lm.device)
        kept = torch.tensor(list(positions), device=self.causal_lm.device)
        if self.keeps:
            return self.causal_lm(input_ids=row, use_cache=False, logits_to_keep=kept).logits[0].float().cpu()
        return self.causal_lm(input_ids=row, use_cache=False).logits[0, kept].float().cpu()

    @torch.no_grad()
    def answer(self, prompt: Sequence[int]) -> list[int]:
        """See Model."""
        row = torch.tensor([list(prompt)], device=self.causal_lm.device)
        mask = torch.ones_like(row)
        whole = self.causal_lm.generate(input_ids=row, attention_mask=mask, generation_config=self.settings)
        return until_end(whole[0, len(prompt) :].tolist(), self.end_token_ids)


def until_end(ids: list[int], ends: set[int]) -> list[int]:
    """The ids before the first end token."""
    return ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))]


def behaviour(model: Model, probe: Probe) -> Behaviour:
    """Asks the model everything in the probe."""
    logits = [model.logits(row, places) for row, places in zip(probe.rows, probe.positions, strict=True)]
    return Behaviour(torch.cat(logits), [model.answer(prompt) for prompt in probe.questions])


def probe_of(splits: Splits, tokenizer: PreTrainedTokenizerBase) -> Probe:
    """Held-out samples where there are some, else trained ones, up to MAX_POSITIONS predictions, and questions."""
    samples: Dataset = splits.validation.samples if splits.validation else splits.training.samples
    rows, positions, total = [], [], 0
    for i in range(min(MAX_ROWS, len(samples))):
        row: dict[str, Any] = samples[i]
        ids: list[int] = row["input_ids"]
        places = [at - 1 for start, end in Sample("", ids, row["trained"]).runs() for at in range(start, end) if at]
        places = places[: MAX_POSITIONS - total]
        if places:
            rows.append(ids[: places[-1] + 2])
            positions.append(places)
            total += len(places)
    questions = questions_of(samples, range(len(samples)), tokenizer, NUM_QUESTIONS)
    kind = "held out" if splits.validation else "trained"
    return Probe(rows, positions, [question.prompt for question in questions], kind)
