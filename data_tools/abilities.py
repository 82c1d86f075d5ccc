"""What a chat template can say, found out by rendering small conversations with it."""

from dataclasses import asdict, dataclass
from typing import Any

from data_tools.chat_template import PLAIN_TEMPLATE, ChatTemplate
from data_tools.messages import Message
from data_tools.records import Conversation
from data_tools.render import ConversationRenderer, RenderSettings

_TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Looks up a term.",
        "parameters": {"type": "object", "properties": {"term": {"type": "string"}}, "required": ["term"]},
    },
}


def _call(term: str, identifier: str) -> dict[str, Any]:
    return {"id": identifier, "type": "function", "function": {"name": "look_up", "arguments": {"term": term}}}


_ASKED, _ANSWERED = Message("user", "What is AOG?"), Message("assistant", "Aircraft on ground.", train=True)
_THOUGHT = Message("assistant", "Aircraft on ground.", train=True, reasoning="An abbreviation.")
_CALLED = Message("assistant", tool_calls=(_call("AOG", "a1b2c3d4e"),), train=True)
_CALLED_TWICE = Message("assistant", tool_calls=(_call("AOG", "a1b2c3d4e"), _call("BER", "f5g6h7i8j")), train=True)
_RESULT = Message("tool", "Aircraft on ground", name="look_up", tool_call_id="a1b2c3d4e")
_SECOND_RESULT = Message("tool", "Beyond economical repair", name="look_up", tool_call_id="f5g6h7i8j")
# what is asked -> the turns that show it, and whether they come with a tool's definition
CONVERSATIONS: dict[str, tuple[tuple[Message, ...], bool]] = {
    "an answer": ((_ASKED, _ANSWERED), False),
    "several turns": ((_ASKED, _ANSWERED, _ASKED, _ANSWERED), False),
    "a system turn": ((Message("system", "Be brief."), _ASKED, _ANSWERED), False),
    "reasoning": ((_ASKED, _THOUGHT), False),
    "reasoning in every turn": ((_ASKED, _THOUGHT, _ASKED, _THOUGHT), False),
    "a tool call": ((_ASKED, _CALLED, _RESULT, _ANSWERED), True),
    "two tool calls in a turn": ((_ASKED, _CALLED_TWICE, _RESULT, _SECOND_RESULT, _ANSWERED), True),
}


@dataclass(frozen=True)
class Abilities:
    """What a template can say: for each of CONVERSATIONS an empty text, or the reason why it is refused."""

    refusals: dict[str, str]
    num_samples: dict[str, int]  # samples that such a conversation becomes
    prompt: str  # the text between a question and its answer
    end: str  # the text after an answer, with the token at which generation stops
    has_clock: bool
    switches: tuple[str, ...]  # arguments for thinking that it names
    is_plain: bool  # it is ours, because the tokenizer has none

    def as_json(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)

    def lines(self) -> list[str]:
        """What it can, what it cannot and why, and what stands around an answer."""
        can = [
            f"{name} ({self.num_samples[name]} samples)" if self.num_samples.get(name, 1) > 1 else name
            for name, refusal in self.refusals.items()
            if not refusal
        ]
        lines = [f"takes {', '.join(can) or 'nothing'}"]
        lines += [f"not {name}: {refusal}" for name, refusal in self.refusals.items() if refusal]
        if self.end:
            lines.append(f"an answer stands between {self.prompt!r} and {self.end!r}")
        return lines


def abilities_of(tokenizer: Any, settings: RenderSettings) -> Abilities:
    """Asks the tokenizer's template about each of CONVERSATIONS."""
    renderer = ConversationRenderer(tokenizer, settings)
    refusals: dict[str, str] = {}
    num_samples: dict[str, int] = {}
    prompt = end = ""
    for name, (messages, has_tools) in CONVERSATIONS.items():
        try:
            samples = renderer.render(Conversation("", messages, tools=(_TOOL,) if has_tools else ())).samples
        except ValueError as error:
            refusals[name] = str(error).partition("; ")[0]
            continue
        refusals[name], num_samples[name] = "", len(samples)
        if name == "an answer":
            ids, (start, stop) = samples[0].input_ids, samples[0].runs()[0]
            prompt = tokenizer.decode(ids[:start]).rpartition(_ASKED.content)[2]
            end = tokenizer.decode(ids[start:stop]).rpartition(_ANSWERED.content)[2]
    template = ChatTemplate(tokenizer)
    is_plain, switches = tokenizer.chat_template == PLAIN_TEMPLATE, tuple(template.switches(False, {}))
    return Abilities(refusals, num_samples, prompt, end, template.has_clock, switches, is_plain)
