"""The base's tokenizer, with what training needs of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from data_tools.chat_template import PLAIN_TEMPLATE, ChatTemplate, read_template
from train.config import Config, parse_argument
from train.models.hub import locate
from train.models.shape import BROKEN, cannot_read, model_shape, text_shape
from train.run.exits import ExitCode, ExitWith

# Tokens that models ship for padding: where pad is unset or equals eos, the first one in the vocabulary is used.
PAD_CANDIDATES = ("<|finetune_right_pad_id|>", "<|pad|>", "<pad>", "[PAD]", "<unk>")


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer that is ready for training, and notes on what was decided about it, to be printed once."""

    backend: PreTrainedTokenizerBase
    notes: tuple[str, ...]


def load_tokenizer(config: Config) -> Tokenizer:
    """The base's tokenizer with a chat template and a pad token that is not the end token, where it can have one.

    Raises ExitWith(BAD_INPUT) where it cannot be found.
    """
    notes = []
    place = locate(config.model)
    model_shape(config.model)  # which the tokenizer reads, too: what is wrong there is told as such
    if place.note:
        notes.append(place.note)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(place.folder), trust_remote_code=False)
    except BROKEN as error:
        raise cannot_read(config.model, "a tokenizer", error) from None
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
        notes.append("chat template: the tokenizer has none; '### User: / ### Assistant:' is used and saved with it")
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


def check_fits(config: Config, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ExitWith(BAD_INPUT) where samples may be too long for the model, or hold tokens that it does not embed."""
    check_length(config)
    shape = text_shape(model_shape(config.model))
    if len(tokenizer) > shape.vocab_size:
        raise ExitWith(
            ExitCode.BAD_INPUT,
            f"{config.model.name_or_path}: the tokenizer has {len(tokenizer)} tokens and the model embeds "
            f"{shape.vocab_size}; use the tokenizer that belongs to it",
        )


def check_length(config: Config) -> None:
    """Raises ExitWith(BAD_INPUT) where samples may be longer than the model was made for, or it cannot be found."""
    longest = getattr(text_shape(model_shape(config.model)), "max_position_embeddings", None)
    if longest is not None and config.data.max_length > longest:
        reason = (
            f"--data.max_length {config.data.max_length}: {config.model.name_or_path} was made for {longest} at most"
        )
        raise ExitWith(ExitCode.BAD_INPUT, reason)
