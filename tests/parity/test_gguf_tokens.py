"""What real llama.cpp makes of texts with the vocabularies that are written, against the tokenizers themselves."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from data_tools.chat_template import PLAIN_TEMPLATE, ChatTemplate
from tests.conftest import SHARED, needs_shared, tokenizer_at
from tests.gguf_models import needs_llama_cpp
from train.deliver.gguf_check import TEXTS, check_tokens, unknown_ends
from train.deliver.gguf_shape import gguf_shape
from train.deliver.gguf_tokenizer import PRE_TOKENIZERS, Vocabulary, vocabulary
from train.deliver.gguf_writer import write_vocabulary
from train.run.exits import ExitCode, ExitWith

pytestmark = needs_llama_cpp
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def byte_level(words: tuple[str, ...], ignores_merges: bool) -> Any:
    """A small tokenizer that splits text so, made of TEXTS."""
    named = {"digits": pre_tokenizers.Digits(individual_digits=True), "gpt2": pre_tokenizers.ByteLevel(False)}
    parts: list[Any] = [
        named[word] if word in named else pre_tokenizers.Split(Regex(word), "isolated") for word in words
    ]
    if words[-1] != "gpt2":
        parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    backend = Tokenizer(models.BPE(ignore_merges=ignores_merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(parts)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        show_progress=False,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator([*TEXTS, *TEXTS], trainer)
    return as_tokenizer(backend)


def sentencepiece(scheme: str) -> Any:
    """A small tokenizer with byte fallback, made of TEXTS, that puts a space before texts by this scheme."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    if scheme == "prepend":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif scheme != "never":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(parts)
    words = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=700, show_progress=False, special_tokens=words)
    backend.train_from_iterator([word for text in TEXTS[:4] for word in text.split(" ")], trainer)
    told = json.loads(backend.to_str())  # bytes are no special tokens; and the trainer keeps no byte_fallback
    told["added_tokens"] = [token for token in told["added_tokens"] if not token["content"].startswith("<0x")]
    return as_tokenizer(Tokenizer.from_str(json.dumps(told)))


def as_tokenizer(backend: Tokenizer) -> Any:
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = CHATML
    return tokenizer


def written(folder: Path, tokenizer: Any) -> tuple[Path, Vocabulary, ChatTemplate]:
    """A file of the vocabulary, and what it says."""
    LlamaConfig(vocab_size=len(tokenizer) + 3, architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    template = ChatTemplate(tokenizer)
    told = vocabulary(tokenizer, [tokenizer.eos_token_id], len(tokenizer) + 3, template, "tiny")
    write_vocabulary(folder / "vocabulary.gguf", gguf_shape(folder), told)
    return folder / "vocabulary.gguf", told, template


@pytest.mark.parametrize(("words", "ignores_merges"), PRE_TOKENIZERS, ids=list(PRE_TOKENIZERS.values()))
def test_every_way_to_split_text_has_its_name(words: tuple[str, ...], ignores_merges: bool, tmp_path: Path) -> None:
    """A tokenizer of each row of PRE_TOKENIZERS is llama.cpp's of that name: texts in many scripts, conversations."""
    tokenizer = byte_level(words, ignores_merges)
    path, told, template = written(tmp_path, tokenizer)
    assert told.pre == PRE_TOKENIZERS[words, ignores_merges]
    assert check_tokens(path, told, tokenizer, template, []) >= len(TEXTS) - (3 if told.pre == "tekken" else 0)


def test_bytes_that_nothing_falls_back_on(tmp_path: Path) -> None:
    """Saved with byte_fallback and an empty list of normalizers, a byte-level tokenizer is one all the same."""
    saved = byte_level(("gpt2",), False).backend_tokenizer
    told = json.loads(saved.to_str())
    told["model"]["byte_fallback"], told["normalizer"] = True, {"type": "Sequence", "normalizers": []}
    tokenizer = as_tokenizer(Tokenizer.from_str(json.dumps(told)))
    assert json.loads(tokenizer.backend_tokenizer.to_str())["model"]["byte_fallback"]
    assert written(tmp_path, tokenizer)[1].pre == PRE_TOKENIZERS[("gpt2",), False]


@pytest.mark.parametrize("scheme", ["prepend", "always", "first", "never"])
def test_text_with_byte_fallback_is_merged_by_scores(scheme: str, tmp_path: Path) -> None:
    """SentencePiece's kind of BPE, with each way to put a space before a text: the same ids, also of bytes."""
    tokenizer = sentencepiece(scheme)
    path, told, template = written(tmp_path, tokenizer)
    assert (told.model, told.adds_space) == ("llama", scheme in ("prepend", "always"))
    assert told.kinds.count(6) == 256  # bytes, which llama.cpp writes as such
    assert check_tokens(path, told, tokenizer, template, [tokenizer("a ب b")["input_ids"]]) > len(TEXTS)


@needs_shared
@pytest.mark.parametrize("name", ["llama31_8b", "tinyllama_1b"])
def test_real_tokenizers_are_read_alike(name: str, tmp_path: Path) -> None:
    """Those of Llama-3.1 and TinyLlama: texts, conversations, and rows of questions with calculations."""
    tokenizer = tokenizer_at(SHARED / name)
    tokenizer.chat_template = tokenizer.chat_template or PLAIN_TEMPLATE
    path, told, template = written(tmp_path, tokenizer)
    assert (told.pre, told.adds_bos) == (("llama-bpe", True) if name == "llama31_8b" else ("default", False))
    lines = (SHARED / "gsm8k" / "test_200.jsonl").read_text().splitlines()[:50]
    rows = [tokenizer(line, add_special_tokens=False)["input_ids"] for line in lines]
    assert check_tokens(path, told, tokenizer, template, rows) == len(TEXTS) + len(rows) + 3


def test_composed_text_is_read_alike(tmp_path: Path) -> None:
    """A tokenizer that composes characters (NFC), as Qwen's, which llama.cpp does not: the same ids, and it is told."""
    words, ignores_merges = next(key for key, name in PRE_TOKENIZERS.items() if name == "qwen2")
    tokenizer = byte_level(words, ignores_merges)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    path, told, template = written(tmp_path, tokenizer)
    assert check_tokens(path, told, tokenizer, template, [tokenizer("e\u0301")["input_ids"]]) == len(TEXTS) + 4
    assert "does not compose" in told.notes[0]


def test_a_text_that_is_read_otherwise_is_named(tmp_path: Path) -> None:
    """Under the name of another way to split text, or with another score, the check ends with 78 and the text."""
    tokenizer = byte_level(("gpt2",), False)
    path, told, template = written(tmp_path, tokenizer)
    shape = gguf_shape(tmp_path)
    write_vocabulary(path, shape, replace(told, pre="llama-bpe"))
    with pytest.raises(ExitWith, match=r"llama.cpp tokenises '1 12 123.* otherwise than .*: token 1 is") as refusal:
        check_tokens(path, told, tokenizer, template, [])
    assert refusal.value.code == ExitCode.BAD_INPUT
    row = tokenizer("of a rare 12345 kind")["input_ids"]
    write_vocabulary(path, shape, replace(told, merges=told.merges[:300]))
    with pytest.raises(ExitWith, match="otherwise than the tokenizer"):
        check_tokens(path, told, tokenizer, template, [row])


def test_answers_end_at_the_trained_tokens(tmp_path: Path) -> None:
    """The tokenizer's EOS and two trained end tokens are llama.cpp's; of further ones it is told that they are not."""
    tokenizer = byte_level(("gpt2",), False)
    tokenizer.add_tokens(["<done>", "<over>"], special_tokens=True)
    done, over = tokenizer.convert_tokens_to_ids(["<done>", "<over>"])
    LlamaConfig(vocab_size=len(tokenizer), architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    ends = [done, tokenizer.convert_tokens_to_ids("<s>"), over]
    told = vocabulary(tokenizer, ends, len(tokenizer), ChatTemplate(tokenizer), "tiny")
    write_vocabulary(tmp_path / "vocabulary.gguf", gguf_shape(tmp_path), told)
    assert told.special["eos"] == tokenizer.eos_token_id
    assert unknown_ends(tmp_path / "vocabulary.gguf", [tokenizer.eos_token_id, *ends]) == [over]
