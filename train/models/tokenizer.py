"""The base's tokenizer, with what training needs of it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerBase

from data_tools.chat_template import PLAIN_TEMPLATE, ChatTemplate, read_template
from data_tools.encode import CONTROL
from data_tools.template_files import PROCESSOR_FILES
from train.config import Config, ModelConfig, parse_argument
from train.models.hub import NAME_A_BASE, locate, unreadable
from train.models.positions import check_positions
from train.models.shape import BROKEN, auto_class, cannot_read, max_positions, model_shape, text_shape
from train.models.text_part import loaded_shape
from train.run.exits import ExitCode, ExitWith

TOKENIZER_FILES = ("*tokenizer*", "vocab.*", "*.model", "*.tiktoken", "tekken.json")  # of which transformers makes one
# Tokens that models ship for padding: where pad is unset or equals eos, the first one in the vocabulary is used.
PAD_CANDIDATES = ("<|finetune_right_pad_id|>", "<|pad|>", "<pad>", "[PAD]", "<unk>")


@dataclass(frozen=True)
class TrainedTokens:
    """The tokens of lora.trainable_tokens."""

    ids: tuple[int, ...]
    new: frozenset[int]  # those that the tokenizer lacked
    known: int  # tokens that it had
    vocabulary: int  # tokens that it has with them


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer that is ready for training, and notes on what was decided about it, to be printed once."""

    backend: PreTrainedTokenizerBase
    notes: tuple[str, ...]


def tokenizer_in(folder: Path) -> Any:
    """The tokenizer of a model's folder; raises what is in BROKEN where its files cannot be read."""
    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise ValueError(str(error)) from None  # the tokenizers library raises nothing more precise


def _tokenizer_of_base(config: ModelConfig, folder: Path) -> Any:
    try:
        return tokenizer_in(folder)
    except BROKEN as error:
        if not any(file for pattern in TOKENIZER_FILES for file in folder.glob(pattern)):
            raise unreadable(config.name_or_path, f"it has no tokenizer.json\n{NAME_A_BASE}") from None
        raise cannot_read(config, "a tokenizer", error) from None


def load_tokenizer(config: Config) -> Tokenizer:
    """The base's tokenizer with a chat template and a pad token that is not the end token, where it can have one.

    Raises ExitWith(BAD_INPUT) where it cannot be found.
    """
    notes = []
    place = locate(config.model)
    model_shape(config.model)  # which the tokenizer reads, too: what is wrong there is told as such
    if place.note:
        notes.append(place.note)
    tokenizer = _tokenizer_of_base(config.model, place.folder)
    if tokenizer.chat_template is None and not config.data.chat_template:
        tokenizer.chat_template, found_in = _processor_template(place.folder)
        notes += [f"chat template: that of {found_in}"] if found_in else []
    notes += _add_tokens(tokenizer, config.lora.trainable_tokens)
    if config.data.chat_template:
        path = Path(config.data.chat_template)
        try:
            tokenizer.chat_template = read_template(path)
            ChatTemplate(tokenizer, dict(map(parse_argument, config.data.template_arguments))).check(path)
        except (OSError, ValueError, TimeoutError) as error:
            place = "" if str(path) in str(error) else f" {path}:"
            raise ExitWith(ExitCode.BAD_INPUT, f"--data.chat_template{place} {error}") from None
        notes.append(f"chat template: {config.data.chat_template}")
    elif tokenizer.chat_template is None:
        tokenizer.chat_template = PLAIN_TEMPLATE
    unread = ChatTemplate(tokenizer).unread_arguments(dict(map(parse_argument, config.data.template_arguments)))
    if unread:
        reason = f"the chat template reads no {unread[0]!r}; check the spelling"
        raise ExitWith(ExitCode.BAD_INPUT, f"--data.template_arguments {unread[0]}: {reason}")
    if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.eos_token:
        vocabulary = tokenizer.get_vocab()
        candidate = next((token for token in PAD_CANDIDATES if token in vocabulary), None)
        if candidate is not None:
            tokenizer.pad_token = candidate
            notes.append(f"pad token: {candidate} (the tokenizer had none of its own)")
        else:
            tokenizer.pad_token = tokenizer.eos_token
            notes.append(f"pad token: {tokenizer.eos_token}, the end token; harmless, padding is masked by position")
    return Tokenizer(tokenizer, tuple(notes))


def _processor_template(folder: Path) -> tuple[str | None, str]:
    """(the chat template that a multimodal base keeps with its processor, where AutoTokenizer does not look; its file).

    Raises ExitWith(BAD_INPUT) where it cannot be read: another template would be trained instead.
    """
    for name in PROCESSOR_FILES:
        path = folder / name
        if not path.exists():
            continue
        try:
            found = json.loads(path.read_text(encoding="utf-8")).get("chat_template")
            if not isinstance(found, str | None):
                raise ValueError(f"its chat_template is a {type(found).__name__}, not one text")
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            reason = f"the chat template cannot be read: {error}; write --data.chat_template FILE"
            raise ExitWith(ExitCode.BAD_INPUT, f"{path}: {reason}") from None
        if found:
            return found, name
    return None, ""


def _add_tokens(tokenizer: Any, words: Sequence[str]) -> list[str]:
    """Adds those that the tokenizer lacks; one that looks like a control token is one: text that spells it stays text.

    Returns a note on them.
    """
    known = tokenizer.get_vocab()
    new = [word for word in words if word not in known]
    if not new:
        return []
    tokenizer.add_tokens([AddedToken(word, special=bool(CONTROL.fullmatch(word)), normalized=False) for word in new])
    return [f"{len(new)} tokens are new: {' '.join(new)}"]


@lru_cache(maxsize=4)
def trained_tokens(config: Config) -> TrainedTokens:
    """What lora.trainable_tokens names, by the base's tokenizer."""
    if not config.lora.trainable_tokens:
        return TrainedTokens((), frozenset(), 0, 0)
    plain = replace(config, lora=replace(config.lora, trainable_tokens=()))
    before, after = load_tokenizer(plain).backend, load_tokenizer(config).backend
    ids = tuple(after.get_vocab()[word] for word in config.lora.trainable_tokens)
    known = set(before.get_vocab().values())
    return TrainedTokens(ids, frozenset(set(ids) - known), len(before), max(len(after), *(each + 1 for each in ids)))


def unseen_tokens(samples: Dataset, tokens: TrainedTokens) -> list[int]:
    """Places in `tokens.ids` of those that no sample holds."""
    missing = set(tokens.ids)
    ids: Any = samples.select_columns("input_ids")
    for batch in ids.iter(1000) if missing else ():
        missing.difference_update(*batch["input_ids"])
    return [place for place, token in enumerate(tokens.ids) if token in missing]


def check_fits(config: Config, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ExitWith(BAD_INPUT) where the base is no language model that is trained, where samples may be too long for
    it, or hold tokens that it does not embed."""
    auto_class(config.model, loaded_shape(config.model))
    check_length(config)
    shape, tokens = text_shape(model_shape(config.model)), trained_tokens(config)
    num_known = len(tokenizer) - len(tokens.new)
    if num_known > shape.vocab_size:
        raise ExitWith(
            ExitCode.BAD_INPUT,
            f"{config.model.name_or_path}: the tokenizer has {num_known} tokens and the model embeds "
            f"{shape.vocab_size}; use the tokenizer that belongs to it",
        )


def check_length(config: Config) -> None:
    """Raises ExitWith(BAD_INPUT) where samples may be longer than the model was made for, or it cannot be found."""
    check_positions(config.model)
    longest, own = max_positions(config.model), replace(config.model, max_positions=0)
    if longest and config.data.max_length > longest:
        way_out = f"--model.max_positions {config.data.max_length} trains it on longer samples all the same"
        if config.model.max_positions:
            way_out = f"--model.max_positions {longest} allows no more"
        made_for = f"{config.model.name_or_path} was made for {max_positions(own)} at most"
        reason = f"--data.max_length {config.data.max_length}: {made_for}; {way_out}"
        raise ExitWith(ExitCode.BAD_INPUT, reason)
