"""What is right for a conversation under a chat template, by transformers' own rendering and by hand."""

import json
import re
from collections.abc import Iterator
from typing import Any

from data_tools.samples import Sample

PRINTED = re.compile(r"""'room': '|['"]type['"]: ?['"](text|thinking)['"]""")  # an object where text was meant
FOLLOWING = {
    False: {"role": "user", "content": "Next?"},
    True: {"role": "tool", "name": "room_warmth", "tool_call_id": "a1b2c3d4e", "content": "14 units"},
}


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
            following = FOLLOWING["tool_calls" in self.turns[number]]
            longer = self.texts([*self.turns[: number + 1], following]) + self.texts(self.turns)
            if not any(
                re.search(re.escape(self.said(number)[-1]) + r"[^A-Z]*" + re.escape(stop), text) for text in longer
            ):
                yield f"turn {number + 1} ends with {stop!r}, which nothing follows"
        is_direct = unended.endswith(self.said(number)[-1]) or "tool_calls" in self.turns[number]
        if not is_direct and any(prompt.rstrip().endswith(stop) for prompt in prompts):
            yield f"turn {number + 1} ends with {stop!r}, behind which an answer begins"
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
        asked = [self._one(each[: number + 1], add_generation_prompt=True) for each in spellings(self.turns)]
        if all(text in asked for text, _ in pairs):
            return "no end"  # another answer begins behind it
        following = FOLLOWING["tool_calls" in self.turns[number]]
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
            "tool_calls": [_as_text(call) for call in turn["tool_calls"]],
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


def _as_text(call: Any) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"])}}


def _words(call: dict[str, Any]) -> list[str]:
    function = call["function"]
    return [function["name"], *function["arguments"].keys(), *function["arguments"].values()]


def _holds(text: str, said: str) -> bool:
    return said in text
