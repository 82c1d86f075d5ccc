"""Where a model's folder keeps its chat templates, and what they read; without its tokenizer, which takes seconds."""

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

# where a multimodal model keeps one with its processor
PROCESSOR_FILES = ("chat_template.json", "processor_config.json")
USED = ("default", "tool_use")  # of a model with several, those that get_chat_template() takes


def template_texts(folder: Path) -> list[str]:
    """The chat templates in a model's folder: those of the first place that has one, in the order of transformers.

    That is PreTrainedTokenizerBase._from_pretrained, and behind it the processor's files. What cannot be read is left
    out: it is told where the tokenizer is loaded.
    """
    files = [folder / "chat_template.jinja", folder / "additional_chat_templates" / "tool_use.jinja"]
    if found := [text for path in files if (text := _text(path))]:
        return found
    for name in ("tokenizer_config.json", *PROCESSOR_FILES):
        held: Any = None
        with suppress(ValueError, AttributeError, RecursionError):
            held = json.loads(_text(folder / name)).get("chat_template")
        if isinstance(held, list):
            held = {
                each.get("name"): each.get("template")
                for each in held
                if isinstance(each, dict) and each.get("name") in USED
            }
        texts = [held.get(name) for name in USED] if isinstance(held, dict) else [held]
        if found := [text for text in texts if isinstance(text, str) and text]:
            return found
    return []


def has_word(source: str, name: str) -> bool:
    """Whether a template names something; where it does not, it cannot read it."""
    return re.search(rf"\b{re.escape(name)}\b", source) is not None


def _text(path: Path) -> str:
    with suppress(OSError, ValueError):
        return path.read_text(encoding="utf-8-sig")
    return ""
