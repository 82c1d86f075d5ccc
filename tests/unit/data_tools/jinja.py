"""Small chat templates with the bundled tokenizer's special tokens, each with a habit that real ones have."""

from typing import Any

from data_tools.formats import detect
from data_tools.records import Conversation
from data_tools.render import ConversationRenderer, Rendered, RenderSettings
from data_tools.samples import Sample
from tests.conftest import tokenizer_at

_HEAD = "{{ bos_token }}{% if tools %}{{ '<|system|>\n' + (tools | tojson) + '\n' }}{% endif %}"
_PROMPT = "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"

# takes everything: system, reasoning, several calls with objects as arguments, results, tools
WHOLE = (
    _HEAD
    + """{% for m in messages %}{{ '<|user|>\nresult ' if m.role == 'tool' else '<|' + m.role + '|>\n' }}"""
    + """{% if m.reasoning_content %}{{ '[' + m.reasoning_content + ']\n' }}{% endif %}{{ m.content }}"""
    + """{% for c in m.tool_calls or [] %}{{ '\ncall ' + c.function.name + ' ' + (c.function.arguments | tojson) }}"""
    + """{% endfor %}{{ eos_token + '\n' if m.role == 'assistant' else '\n' }}{% endfor %}"""
    + _PROMPT
)
# the same, but joins a call's arguments as text
JOINS_ARGUMENTS = WHOLE.replace("(c.function.arguments | tojson)", "c.function.arguments")
# knows the roles user and assistant alone, and nothing but their content
PLAIN = (
    "{{ bos_token }}{% for m in messages %}{% if m.role in ['user', 'assistant'] %}"
    "{{ '<|' + m.role + '|>\n' + m.content + (eos_token if m.role == 'assistant' else '') + '\n' }}"
    "{% endif %}{% endfor %}"
) + _PROMPT
# as Qwen3: what was thought before the last question is taken away, and an answer without a thought has an empty one
THINKS = (
    "{{ bos_token }}{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}{{ '<|' + m.role + '|>\n' }}"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}"
    "{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}"
    "{{ m.content + (eos_token if m.role == 'assistant' else '') + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% if enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
# as GLM: nothing ends an answer but the token that begins the next turn
UNENDED = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
# as Gemma 4: generation begins behind an empty thought that turns do not show
EMPTY_THOUGHT_IN_PROMPT = PLAIN.replace("'<|assistant|>\n' }}{% endif", "'<|assistant|>\n<think></think>' }}{% endif")
# generation begins within a thought, which no turn has
OPEN_THOUGHT_IN_PROMPT = PLAIN.replace("'<|assistant|>\n' }}{% endif", "'<|assistant|>\n<think>\n' }}{% endif")
DATED = PLAIN.replace("{{ bos_token }}", "{{ bos_token + strftime_now('%d.%m.%Y') + '\n' }}")


def tokenizer_with(template: str) -> Any:
    """The bundled tokenizer with another chat template."""
    tokenizer = tokenizer_at()
    tokenizer.chat_template = template
    return tokenizer


def conversation_of(*turns: dict[str, Any], **fields: Any) -> Conversation:
    """The conversation in a row of these turns."""
    row = {"messages": list(turns), **fields}
    dialogue = detect(row, "auto", {}).read(row)
    assert not isinstance(dialogue, str)
    return Conversation("rows:1", dialogue.messages, 0, dialogue.tools, dialogue.template_arguments)


def rendered(template: str, *turns: dict[str, Any], settings: RenderSettings | None = None, **fields: Any) -> Rendered:
    """The conversation of these turns under a template."""
    renderer = ConversationRenderer(tokenizer_with(template), settings or RenderSettings())
    return renderer.render(conversation_of(*turns, **fields))


def marked(sample: Sample, tokenizer: Any = None) -> str:
    """The text of a sample, with brackets around what is trained."""
    tokenizer = tokenizer or tokenizer_at()
    text, position = "", 0
    for start, end in sample.runs():
        text += tokenizer.decode(sample.input_ids[position:start])
        text += f"⟦{tokenizer.decode(sample.input_ids[start:end])}⟧"
        position = end
    return text + tokenizer.decode(sample.input_ids[position:])


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def call(arguments: Any, name: str = "look_up", **more: Any) -> dict[str, Any]:
    """An assistant turn that calls a tool."""
    calls = [{"type": "function", "function": {"name": name, "arguments": arguments}}]
    return {"role": "assistant", "content": None, "tool_calls": calls, **more}


def result(text: str) -> dict[str, Any]:
    return {"role": "tool", "content": text}


TOOL = {
    "name": "look_up",
    "description": "Looks up a term.",
    "parameters": {"properties": {"term": {"type": "string"}}},
}
