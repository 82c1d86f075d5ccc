"""A tokenizer as GGUF has it: tokens, merges or scores, kinds of tokens, and what llama.cpp does around a text.

Two kinds are written. Byte-level BPE splits a text by a regular expression before it merges; llama.cpp knows such
expressions by name. BPE with byte fallback, which SentencePiece makes, merges the whole text by scores. Whether
llama.cpp tokenises as the tokenizer does is not believed but tried (train/deliver/gguf_check.py).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from data_tools.chat_template import ChatTemplate
from train.run.exits import ExitCode, ExitWith

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
START = r"[^\r\n\p{L}\p{N}]?"
TEKKEN = (
    rf"{START}{UPPER}*{LOWER}+|{START}{UPPER}+{LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2 = ("gpt2",)
# How a text is split, and whether a word that is a token is taken without merging -> llama.cpp's name for both.
PRE_TOKENIZERS: dict[tuple[tuple[str, ...], bool], str] = {
    (GPT2, False): "gpt-2",
    (("digits", *GPT2), False): "smollm",
    ((rf"{CONTRACTIONS}{WORDS}\p{{N}}{{1,3}}{REST}",), True): "llama-bpe",
    ((rf"{CONTRACTIONS}{WORDS}\p{{N}}{{1,3}}{REST}",), False): "smaug-bpe",
    ((rf"{CONTRACTIONS}{WORDS}\p{{N}}{REST}",), False): "qwen2",
    ((TEKKEN,), True): "tekken",
}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # gguf.TokenType
LOWEST = -1e9  # score of a token that no merge makes
END_KEYS = ("eos", "eot", "eom")  # tokens at which llama.cpp ends an answer, beside those that it knows by name


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer."""

    model_name: str
    model: str  # gpt2: byte-level BPE; llama: as SentencePiece
    pre: str
    tokens: list[str]
    kinds: list[int]
    merges: list[str]  # of byte-level BPE
    scores: list[float]  # of the other
    special: dict[str, int]  # bos, eos, eot, eom, unk, pad -> id
    adds_bos: bool  # before every prompt
    adds_space: bool  # before every text, and after every special token
    chat_template: str  # Jinja, with the arguments that it was given in training
    chat_prefix: str  # what it puts before a conversation, so that the tokens are those of training
    notes: tuple[str, ...]

    def prompt(self, rendered: str, tokenizer: PreTrainedTokenizerBase) -> str:
        """What llama.cpp tokenises of a rendered conversation: BOS, which it adds, is taken off."""
        bos = str(tokenizer.bos_token or "")
        return self.chat_prefix + (rendered.removeprefix(bos) if self.adds_bos and bos else rendered)

    def write_keys(self, writer: Any) -> None:
        """Adds the tokenizer to a gguf.GGUFWriter."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.kinds)
        if self.model == "llama":
            writer.add_token_scores(self.scores)
            writer.add_add_space_prefix(self.adds_space)
        else:
            writer.add_token_merges(self.merges)
        for role, token in self.special.items():
            getattr(writer, f"add_{role}_token_id")(token)
        writer.add_add_bos_token(self.adds_bos)
        writer.add_add_eos_token(False)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def vocabulary(
    tokenizer: PreTrainedTokenizerBase, end_token_ids: Sequence[int], num_rows: int, template: ChatTemplate, name: str
) -> Vocabulary:
    """The tokenizer of a run, padded to the `num_rows` of the model's embedding.

    Raises ExitWith(BAD_INPUT) where it is of a kind that is not written.
    """
    backend: Any = tokenizer.backend_tokenizer if tokenizer.is_fast else None
    if backend is None:
        raise _refused(f"{type(tokenizer).__name__} has no tokenizer.json")
    told = json.loads(backend.to_str())
    model = told["model"]
    # with a byte-level vocabulary nothing ever falls back, whatever the model says
    is_byte_level = '"ByteLevel"' in json.dumps(told.get("pre_tokenizer"))
    is_spm = model.get("type") == "BPE" and bool(model.get("byte_fallback")) and not is_byte_level
    reason = _unwritten(model) or (_unlike_sentencepiece(told) if is_spm else "")
    if reason:
        raise _refused(reason)
    notes: list[str] = []
    pre = "default" if is_spm else _pre_tokenizer(told, notes)
    tokens, kinds = _tokens(tokenizer, model, num_rows, is_spm)
    merges = [tuple(pair.split(" ", 1)) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    adds_bos, chat = _adds_bos(tokenizer, template, notes)
    adds_space, prefix = _space(tokenizer, told, chat, notes) if is_spm else (False, "")
    return Vocabulary(
        model_name=name,
        model="llama" if is_spm else "gpt2",
        pre=pre,
        tokens=tokens,
        kinds=kinds,
        merges=[" ".join(pair) for pair in merges],
        scores=_scores(tokens, merges) if is_spm else [],
        special=_special(tokenizer, end_token_ids),
        adds_bos=adds_bos,
        adds_space=adds_space,
        chat_template=_with_arguments(template, prefix),
        chat_prefix=prefix,
        notes=tuple(notes),
    )


def _unwritten(model: Mapping[str, Any]) -> str:
    """Why a model of tokenizer.json is not written; empty where it is."""
    if model.get("type") != "BPE":
        return f"its tokenizer is {model.get('type')}, not BPE"
    found = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    return next((f"its BPE has {key} {model[key]!r}" for key in found if model.get(key)), "")


def _pre_tokenizer(told: Mapping[str, Any], notes: list[str]) -> str:
    """llama.cpp's name for how the text is split."""
    normalizer = told.get("normalizer") or {}
    kinds = [part.get("type") for part in normalizer.get("normalizers", [normalizer] if normalizer else [])]
    if kinds == ["NFC"]:
        notes.append("llama.cpp does not compose characters (NFC) as the tokenizer does: send it composed text")
    elif kinds:
        raise _refused(f"its tokenizer normalises text by {', '.join(map(str, kinds))}")
    found = told.get("pre_tokenizer") or {}
    parts = found.get("pretokenizers", [found])
    key = (tuple(word for part in parts for word in _split(part)), bool(told["model"].get("ignore_merges")))
    if key not in PRE_TOKENIZERS:
        how = ", ".join(map(repr, key[0])) or "nothing"
        raise _refused(f"llama.cpp has no name that we know for a tokenizer that splits text by {how}")
    if PRE_TOKENIZERS[key] == "tekken":
        notes.append("llama.cpp splits text with combining marks, as in Devanagari, otherwise than the tokenizer")
    return PRE_TOKENIZERS[key]


def _split(part: Mapping[str, Any]) -> list[str]:
    """A pre-tokenizer as words of PRE_TOKENIZERS."""
    kind = part.get("type")
    if kind == "ByteLevel" and not part.get("add_prefix_space"):
        return ["gpt2"] if part.get("use_regex", True) else []
    if kind == "Digits" and part.get("individual_digits"):
        return ["digits"]
    pattern = (part.get("pattern") or {}).get("Regex")
    if kind == "Split" and pattern and part.get("behavior") == "Isolated" and not part.get("invert"):
        return [pattern]
    return [json.dumps(part, ensure_ascii=False)]


def _unlike_sentencepiece(told: Mapping[str, Any]) -> str:
    """Why a tokenizer with byte fallback is not SentencePiece's kind; empty where it is."""
    normalizer, pre = told.get("normalizer") or {}, told.get("pre_tokenizer") or {}
    parts = normalizer.get("normalizers", [normalizer] if normalizer else [])
    for part in parts:
        is_space = part.get("type") == "Replace" and part.get("pattern") == {"String": " "} and part["content"] == "▁"
        if not is_space and not (part.get("type") == "Prepend" and part.get("prepend") == "▁"):
            return f"its tokenizer normalises text by {part.get('type')}"
    is_metaspace = pre.get("type") == "Metaspace" and pre.get("replacement") == "▁" and not pre.get("split", True)
    return "" if not pre or is_metaspace else f"its tokenizer splits text by {pre.get('type')}"


def _tokens(
    tokenizer: PreTrainedTokenizerBase, model: Mapping[str, Any], num_rows: int, is_spm: bool
) -> tuple[list[str], list[int]]:
    """Text and kind of every row of the embedding; a row that has no token is unused."""
    texts: dict[int, str] = {number: text for text, number in model["vocab"].items()}
    kinds = dict.fromkeys(texts, NORMAL)
    if is_spm:
        kinds |= {number: BYTE for number, text in texts.items() if _is_byte(text)}
    for number, token in tokenizer.added_tokens_decoder.items():
        texts[number], kinds[number] = token.content, CONTROL if token.special else USER_DEFINED
    unknown = tokenizer.convert_tokens_to_ids(model["unk_token"]) if model.get("unk_token") else None
    if is_spm and isinstance(unknown, int):
        kinds[unknown] = UNKNOWN
    if max(texts) >= num_rows:
        raise _refused(f"its tokenizer has a token {max(texts)}, and the model embeds {num_rows}")
    for number in range(num_rows):
        if number not in texts:
            texts[number], kinds[number] = f"[PAD{number}]", UNUSED
    listed = [texts[number] for number in range(num_rows)]
    if len(set(listed)) < num_rows or not all(listed):
        raise _refused("two of its tokens have the same text, or one has none")
    return listed, [kinds[number] for number in range(num_rows)]


def _is_byte(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def _scores(tokens: Sequence[str], merges: Sequence[Sequence[str]]) -> list[float]:
    """The earlier a merge makes a token, the higher its score."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), rank)
    return [float(-ranks[token]) if token in ranks else LOWEST for token in tokens]


def _special(tokenizer: PreTrainedTokenizerBase, end_token_ids: Sequence[int]) -> dict[str, int]:
    """Ids by role. The tokenizer's own EOS comes first: templates ask for it as `eos_token`."""
    ends = dict.fromkeys((*([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []), *end_token_ids))
    found = dict(zip(END_KEYS, ends, strict=False))  # whether llama.cpp knows those beyond three is tried
    for role in ("bos", "unk", "pad"):
        number = getattr(tokenizer, f"{role}_token_id")
        if number is not None:
            found[role] = number
    return found


def _adds_bos(tokenizer: Any, template: ChatTemplate, notes: list[str]) -> tuple[bool, str]:
    """(Whether llama.cpp is to put BOS before every prompt, a rendered conversation).

    llama.cpp takes BOS off a rendered conversation where it adds one by itself, so what counts is whether conversations
    begin with it, as they were trained.
    """
    body = tokenizer("a", add_special_tokens=False)["input_ids"]
    around = tokenizer("a")["input_ids"]
    bos = tokenizer.bos_token_id
    if around not in (body, [bos, *body]):
        raise _refused("its tokenizer puts more than BOS around a text")
    try:
        chat = template.render([{"role": "user", "content": "a"}], add_generation_prompt=True)
    except ValueError:
        return around != body, ""
    if around == body or tokenizer(chat, add_special_tokens=False)["input_ids"][:1] == [bos]:
        return around != body, chat
    notes.append(f"prompts get no {tokenizer.bos_token}: conversations had none in training; plain text has one")
    return False, chat


def _space(tokenizer: Any, told: Mapping[str, Any], chat: str, notes: list[str]) -> tuple[bool, str]:
    """(Whether llama.cpp puts a space before texts and after special tokens, what a conversation begins with)."""
    scheme = (told.get("pre_tokenizer") or {}).get("prepend_scheme", "never")
    normalizer = told.get("normalizer") or {}
    if scheme == "always":
        notes.append("llama.cpp puts a space also before a text that begins with one: begin no text with a space")
        return True, ""
    if any(part.get("type") == "Prepend" for part in normalizer.get("normalizers", [normalizer])):
        return True, ""
    if scheme == "never":
        return False, ""
    # "first": only where the whole text begins, which llama.cpp cannot
    notes.append("llama.cpp puts no space before plain text, as the tokenizer does: begin it with one")
    begins_special = any(chat.startswith(token.content) for token in tokenizer.added_tokens_decoder.values())
    return False, "" if begins_special or chat.startswith(" ") else " "


def _with_arguments(template: ChatTemplate, prefix: str) -> str:
    """The template's source, in which the arguments of the run are set: who serves it does not give them."""
    lines = []
    for name, value in template.arguments.items():
        lines.append(f"{{%- set {name} = {'none' if value is None else json.dumps(value)} -%}}")
    # an expression, because the end of a statement would take the template's first line feed with it
    lines.append(f"{{{{ {json.dumps(prefix)} }}}}" if prefix or lines else "")
    return "".join(lines) + template.source(with_tools=False)


def _refused(reason: str) -> ExitWith:
    return ExitWith(ExitCode.BAD_INPUT, f"not written as GGUF: {reason}")
