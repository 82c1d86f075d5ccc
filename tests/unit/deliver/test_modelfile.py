"""Modelfiles for Ollama: their templates render what the chat template renders, or there is none."""

from pathlib import Path
from typing import Any

import pytest

from data_tools.chat_template import ChatTemplate
from tests.conftest import SHARED, needs_shared, tokenizer_at
from train.deliver.go_template import evaluate, go_template
from train.deliver.modelfile import modelfile

# what the bundled base renders, written out by hand
BUNDLED = """FROM ./tiny.gguf
TEMPLATE \"\"\"{{ if .System }}<|system|>
{{ .System }}
<|user|>
{{ else }}<|user|>
{{ end }}{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}\
{{ if eq .Role "user" }}{{ .Content }}
<|assistant|>
{{ else if eq .Role "assistant" }}{{ .Content }}{{ if not $last }}<|end|>
<|user|>
{{ end }}{{ end }}{{ end }}\"\"\"
PARAMETER stop "<|end|>"
# for greedy answers, such as a receipt compares:  PARAMETER temperature 0
"""
TURNS = [("system", "S {{ x }}"), ("user", "a"), ("assistant", "b\n"), ("user", "c"), ("assistant", "d"), ("user", "e")]


def template_of(text: str) -> ChatTemplate:
    tokenizer: Any = tokenizer_at()
    tokenizer.chat_template = text
    return ChatTemplate(tokenizer)


def test_the_bundled_template_is_derived() -> None:
    """Text for text, without the BOS that the server adds, and with the trained end token as stop."""
    text, notes = modelfile(
        "tiny.gguf", ChatTemplate(tokenizer_at()), lambda s: s.removeprefix("<|begin|>"), ["<|end|>"]
    )
    assert (text, notes) == (BUNDLED, [])


@needs_shared
@pytest.mark.parametrize("path", sorted((SHARED / "chat_templates").glob("*.jinja")), ids=lambda path: path.stem)
def test_published_templates_are_derived(path: Path) -> None:
    """ChatML, Llama 3, Mistral, Gemma, Qwen 2.5, Zephyr: other conversations than those tried render the same."""
    template = template_of(path.read_text())
    go, _ = go_template(template, lambda text: text)
    assert go
    for turns in (TURNS, TURNS[1:], TURNS[:2], TURNS[1:4]):
        messages = [{"role": role, "content": content.strip()} for role, content in turns]
        wanted = template.render(messages, add_generation_prompt=True)
        assert evaluate(go, [(role, content.strip()) for role, content in turns]) == wanted


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{{ strftime_now('%Y') }}{% for m in messages %}{{ m.content }}{% endfor %}", "asks for the date"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "a user message 2 times"),
        ("{% for m in messages %}[{{ loop.index }}]{{ m.content }}{% endfor %}", "more than a fixed text around each"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "a user message 0 times"),
    ],
)
def test_a_template_of_another_shape_is_left_out(text: str, reason: str) -> None:
    """Dates, repeated, numbered or changed messages: no TEMPLATE, and the reason."""
    made, notes = modelfile("tiny.gguf", template_of(text), lambda rendered: rendered, ["<|end|>"])
    assert 'TEMPLATE "' not in made
    assert 'PARAMETER stop "<|end|>"' in made
    assert reason in notes[0]


def test_what_a_template_does_beside_is_told() -> None:
    """Without system messages they are left out; trimmed messages are not trimmed; both are said."""
    loop = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    text, notes = modelfile(
        "tiny.gguf", template_of(f"{loop}<{{{{ m.content | trim }}}}>{{% endfor %}}"), lambda rendered: rendered, []
    )
    assert 'TEMPLATE """<{{ range' in text
    assert "takes no system message" in notes[0]
    assert "trims" in notes[1]


def test_quotes_cannot_end_the_template() -> None:
    """Three quotes in a chat template leave it out; braces in it are quoted for Go."""
    loop = "{% for m in messages %}%s{{ m.content }}.{% endfor %}"
    made, notes = modelfile("tiny.gguf", template_of(loop.replace("%s", '"""')), lambda rendered: rendered, ['a"b'])
    assert 'TEMPLATE "' not in made
    assert "cannot quote" in notes[0]
    assert 'PARAMETER stop """a"b"""' in made
    go, _ = go_template(template_of(loop.replace("%s", "{{ '{{ x }}' }}")), lambda rendered: rendered)
    assert '{{ "{{" }} x }}' in go
    assert evaluate(go, [("user", "u")]) == "{{ x }}u."
