"""Whether llama.cpp tokenises as the tokenizer does: tried on texts of many kinds, conversations, and the data."""

import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from data_tools.chat_template import ChatTemplate
from data_tools.terminal import printable
from train.deliver.gguf_tokenizer import Vocabulary
from train.deliver.llama_cpp_runner import LlamaCppVocabulary
from train.run.exits import ExitCode, ExitWith

SHOWN = 60  # characters of a text that is named
TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "I'm sure they'll say it's what we've DON'T'VE had; you'd 'S 'Ll agree",
    "1 12 123 1234 12345 3.14159 1,000,000 0x1F 2026-01-31 ½ ² ٣٤٥",
    "  two  spaces   three\\ttab\t\ttabs \n\n two lines\r\n\r\nof Windows\n \n end ",
    'def f(x: int) -> str:\n    return f"{x!r:>10}\\n"  # a comment\n\n\nclass A_b(C): ...',
    "<div class='a'>&amp;</div> {\"key\": [1, null, true]} https://a.example/b?c=d&e=%20#f",
    "Grüße, façade, naïve, Ærøskøbing, İstanbul, ĳ, ŉ, Łódź, Ελληνικά, Русский текст, ქართული",
    "日本語のテキスト、中文文本。한국어 텍스트 ไทย ภาษา हिन्दी में पाठ தமிழ் বাংলা",
    "العربية نص עברית טקסט فارسی ‏RTL‎",
    "emoji 🙂👩‍👩‍👧‍👦🏳️‍🌈👍🏽 ☃️ ∑∫√ → ⇒ ™ € £ ¥ … — “quotes” \u2018single\u2019",
    "a\u00a0b\u2003c\u200bd\u3000e\ufefff",
    "ALL CAPS camelCase snake_case kebab-case CamelCASEMix iPhone15Pro",
    "!!! ??? ... --- *** ((nested [brackets] {here})) ~~~ ``` $100 50% #1 @me a/b\\c",
    "x" * 40 + " " * 17 + "\n" * 5 + "\t" * 3 + "-" * 30,
    "\U0001d49c\U0001d4c1 𐍈 𠜎 \U0001f9ff",
)
TURNS = (
    [("user", "Hi there!")],
    [("system", "Be brief."), ("user", "What is\n2 + 2?")],
    [("user", "  a b"), ("assistant", "It is c.\n\nOr d."), ("user", "123?")],
)


def check_tokens(
    path: Path,
    written: Vocabulary,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    rows: Iterable[Sequence[int]],
) -> int:
    """The number of texts that llama.cpp, with the file at `path`, tokenises as the tokenizer does; all must be.

    Raises ExitWith(BAD_INPUT) with the first text that it tokenises otherwise. `rows` are token ids of samples.
    """
    count = 0
    asked: Any = tokenizer
    with LlamaCppVocabulary(path) as vocabulary:
        # where a text's beginning is treated specially it stands behind a token, as a prompt's does
        begin = str(tokenizer.bos_token or "") if written.model == "llama" and not written.adds_space else ""
        texts = [text for text in TEXTS if written.pre != "tekken" or not _has_marks(text)]
        texts += [str(tokenizer.decode(list(row))) for row in rows]
        for text in (text.lstrip(" ") if written.adds_space else text for text in texts):
            _compare(path, text, asked(begin + text, add_special_tokens=False), vocabulary.tokenize(begin + text))
            count += 1
        for turns in TURNS:
            text = _rendered(template, turns)
            if text is not None:
                found = vocabulary.tokenize(written.prompt(text, tokenizer), is_prompt=True)
                _compare(path, text, asked(text, add_special_tokens=False), found)
                count += 1
    return count


def unknown_ends(path: Path, end_token_ids: Sequence[int]) -> list[int]:
    """Those of the trained end tokens at which llama.cpp does not end an answer by itself."""
    with LlamaCppVocabulary(path) as vocabulary:
        return [token for token in end_token_ids if not vocabulary.ends_answers(token)]


def _has_marks(text: str) -> bool:
    """Whether it has combining marks, as Devanagari has."""
    return any(unicodedata.category(character).startswith("M") for character in text)


def _rendered(template: ChatTemplate, turns: Sequence[tuple[str, str]]) -> str | None:
    """The conversation with the beginning of an answer; None where the template takes no such one."""
    try:
        return template.render([{"role": role, "content": text} for role, text in turns], add_generation_prompt=True)
    except ValueError:
        return None


def _compare(path: Path, text: str, wanted: Any, found: list[int]) -> None:
    ids = list(wanted["input_ids"])
    if ids == found:
        return
    pairs = enumerate(zip(ids, found, strict=False))
    at = next((i for i, (one, other) in pairs if one != other), min(len(ids), len(found)))
    shown = printable(text if len(text) <= SHOWN else f"{text[:SHOWN]}...")
    reason = f"llama.cpp tokenises {shown!r} otherwise than the tokenizer: token {at} is "
    reason += f"{found[at] if at < len(found) else 'missing'}, not {ids[at] if at < len(ids) else 'the end'}"
    raise ExitWith(ExitCode.BAD_INPUT, f"{path.name}: {reason}; it is not exported, because it would be served wrongly")
