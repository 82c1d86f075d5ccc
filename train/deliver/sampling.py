"""How the next token of an answer is chosen."""

import math
from dataclasses import dataclass, fields, replace

from transformers import GenerationConfig


@dataclass(frozen=True)
class Sampling:
    """Greedy by default; the names are those of transformers' GenerationConfig."""

    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0  # nucleus sampling (Holtzman et al. 2020); 1: off
    top_k: int = 0  # 0: off
    repetition_penalty: float = 1.0  # Keskar et al. 2019; 1: off
    max_new_tokens: int = 512
    seed: int = -1  # of every answer; -1: another one each time

    def with_value(self, name: str, text: str) -> "Sampling":
        """The same with one value replaced; raises ValueError saying what would work."""
        known = {field.name: field.type for field in fields(self)}
        name = name.replace("-", "_")
        if name not in known:
            raise ValueError(f"{name!r} is no setting; there are {', '.join(known)}")
        try:
            value: float = int(text) if known[name] is int else float(text)
        except ValueError:
            kind = "an integer" if known[name] is int else "a number"
            raise ValueError(f"{name} {text}: must be {kind}") from None
        if not _is_valid(name, value):
            raise ValueError(f"{name} {text}: must be {RANGES[name]}")
        return replace(self, **{name: value})

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken, so that top_p, top_k and seed change nothing."""
        return self.temperature == 0

    def settings(self, max_new_tokens: int, end_token_ids: list[int], pad_token_id: int) -> GenerationConfig:
        """For transformers' generate."""
        sampled = {} if self.is_greedy else {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=not self.is_greedy,
            repetition_penalty=self.repetition_penalty,
            eos_token_id=end_token_ids,
            pad_token_id=pad_token_id,
            use_cache=True,
            **sampled,
        )


RANGES = {
    "temperature": "0 (greedy) or greater, 100 at most",
    "top_p": "greater than 0 and at most 1",
    "top_k": "0 (off) or greater",
    "repetition_penalty": "greater than 0, 100 at most",
    "max_new_tokens": "1 or greater",
    "seed": "0 or greater, or -1 for another one each time",
}
SAMPLED = ("top_p", "top_k", "seed")  # without effect on a greedy answer


def _is_valid(name: str, value: float) -> bool:
    if not math.isfinite(value):
        return False
    return {
        "temperature": 0 <= value <= 100,
        "top_p": 0 < value <= 1,
        "top_k": value >= 0,
        "repetition_penalty": 0 < value <= 100,
        "max_new_tokens": value >= 1,
        "seed": -1 <= value < 2**63,
    }[name]
