"""What an audit reads: how each sample begins and ends, and each record's text, of which only hashes are kept."""

import re
from array import array
from collections import defaultdict
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from data_tools.prepare import PrepareSettings
from data_tools.records import Conversation, Message, Record, Report, read_records
from data_tools.render import render_conversation, special_ids
from data_tools.similarity import NUM_MINIMA, fingerprint, normalise, sketch

NUM_PLACES = 5  # rows named per finding
SAMPLES_AT_ONCE = 1000
# What became of a record's end tokens; if there are several, the worst (largest) counts.
NO_TARGET, TRAINED, CUT, MASKED = range(4)

CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def _misread(low: int, high: int) -> str:
    """A `re` character set: what the bytes in range(low, high) become when read as Latin-1 or Windows-1252."""
    data = bytes(range(low, high))
    return f"[{re.escape(data.decode('latin-1') + data.decode('cp1252', 'ignore'))}]"


_NEXT = _misread(0x80, 0xC0)  # every byte of a UTF-8 character except its first
# UTF-8 that was decoded wrongly, told by its first bytes (Latin letters, punctuation, emoji, two letters of Cyrillic),
# and the replacement character. After an upper-case letter Ã is not counted: IRMÃ» is a word in capitals and a quote.
MOJIBAKE = re.compile(
    rf"\ufffd|ï¿½|(?<![A-ZÀ-Þ])Ã{_NEXT}|Â[\u0080-\u00bf]|â{_misread(0x80, 0x85)}{_NEXT}|ð[Ÿ\u009f]|(?:[ÐÑ]{_NEXT}){{2}}"
)
LEADING_ROLES = ("system", "developer")
FOLLOWS = {("user", "assistant"), ("assistant", "user"), ("assistant", "tool"), ("tool", "tool"), ("tool", "assistant")}


@dataclass
class Finding:
    """How many rows have it, and the first of them as file:line, each with a note if there is one."""

    count: int = 0
    places: list[str] = field(default_factory=list)

    def add(self, place: str, note: str = "") -> None:
        """Counts one more row."""
        self.count += 1
        if len(self.places) < NUM_PLACES:
            self.places.append(f"{place} ({note})" if note else place)


@dataclass(frozen=True)
class SampleFacts:
    """What each record's samples add up to; arrays are indexed by record number, 0 for a record without samples."""

    num_tokens: np.ndarray  # int64
    num_supervised_tokens: np.ndarray  # int64
    ends: np.ndarray  # uint8: NO_TARGET, TRAINED, CUT or MASKED
    double_bos: np.ndarray  # bool

    def end_fraction(self, state: int) -> float:
        """Of the records with supervised tokens, the share whose end tokens are in this state."""
        return float((self.ends == state).sum() / max((self.ends != NO_TARGET).sum(), 1))


def read_samples(samples: Dataset, tokenizer: Any) -> SampleFacts:
    """Reads all tokens, `SAMPLES_AT_ONCE` samples at a time."""
    special = np.array(sorted(special_ids(tokenizer)))
    records = column(samples, "record")
    ends, reaches_end, doubles = [], [], []
    batches: Any = samples.with_format("arrow")
    for table in batches.iter(batch_size=SAMPLES_AT_ONCE):
        ids, offsets = _flat(table["input_ids"])
        trained, _ = _flat(table["trained"])
        state, at_end = _ends(ids, trained, offsets, special)
        ends.append(state)
        reaches_end.append(at_end)
        doubles.append(_double_bos(ids, offsets, tokenizer.bos_token_id, tokenizer.eos_token_id))
    end, at_end = np.concatenate(ends), np.concatenate(reaches_end)
    # a record that continues in the next sample is not cut
    continued = np.append(records[1:] == records[:-1], False)
    end = np.where(at_end & ~continued, np.maximum(end, CUT), end)
    size = int(records.max()) + 1
    worst, double = np.zeros(size, np.uint8), np.zeros(size, bool)
    np.maximum.at(worst, records, end)
    double[records[np.concatenate(doubles)]] = True
    sums = [np.bincount(records, column(samples, name), size) for name in ("num_tokens", "num_supervised_tokens")]
    return SampleFacts(sums[0].astype(np.int64), sums[1].astype(np.int64), worst, double)


def column(samples: Dataset, name: str) -> np.ndarray:
    """A column of numbers."""
    return np.asarray(samples[name][:])


def _flat(lists: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """The items of all lists in one array, and Arrow's offsets: list i is items offsets[i] to offsets[i + 1]."""
    combined: Any = lists.combine_chunks()
    offsets = np.concatenate([[0], np.cumsum(combined.value_lengths().to_numpy())])
    return combined.flatten().to_numpy(zero_copy_only=False), offsets


def _ends(
    ids: np.ndarray, trained: np.ndarray, offsets: np.ndarray, special: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """For each sample: the worst state of its trained spans, and whether one reaches the last token without an end."""
    last = np.zeros(len(ids), bool)
    last[offsets[1:][np.diff(offsets) > 0] - 1] = True
    closes = np.flatnonzero(trained & (last | ~np.append(trained[1:], False)))
    sample = np.searchsorted(offsets, closes, side="right") - 1
    ends_well = np.isin(ids[closes], special)
    states = np.zeros(len(offsets) - 1, np.uint8)
    runs_out = np.zeros(len(offsets) - 1, bool)
    np.maximum.at(states, sample, np.where(ends_well | last[closes], TRAINED, MASKED).astype(np.uint8))
    runs_out[sample[last[closes] & ~ends_well]] = True
    return states, runs_out


def _double_bos(ids: np.ndarray, offsets: np.ndarray, bos: int | None, eos: int | None) -> np.ndarray:
    """Which samples have two BOS tokens in a row; if BOS is also EOS, only at the beginning of the sample."""
    double = np.zeros(len(offsets) - 1, bool)
    if bos is None:
        return double
    pairs = np.flatnonzero((ids[:-1] == bos) & (ids[1:] == bos))
    sample = np.searchsorted(offsets, pairs, side="right") - 1
    inside = (pairs + 1 < offsets[sample + 1]) & ((bos != eos) | (pairs == offsets[sample]))
    double[sample[inside]] = True
    return double


class Places:
    """The place of each record as file:line, in 16 bytes per record; each file's name is kept once."""

    def __init__(self) -> None:
        self._names: dict[str, int] = {}
        self._files, self._lines = array("q"), array("q")

    def add(self, source: str) -> None:
        """Appends the place of the next record."""
        name, _, line = source.rpartition(":")
        if not (name and line.isdecimal()):
            name, line = source, "-1"
        self._files.append(self._names.setdefault(name, len(self._names)))
        self._lines.append(int(line))

    def __getitem__(self, number: int) -> str:
        name = list(self._names)[self._files[number]]
        return name if self._lines[number] < 0 else f"{name}:{self._lines[number]}"


class RecordScan:
    """Hashes of every record of a split (about 180 bytes each) and what is odd about each record, from one reading.

    Records in `held_out` belong to the validation data: they are hashed, but not checked.
    """

    def __init__(self, settings: PrepareSettings, tokenizer: Any, facts: SampleFacts, held_out: Set[int]) -> None:
        self.settings, self.tokenizer, self.facts = settings, tokenizer, facts
        self.places = Places()
        self.findings: defaultdict[str, Finding] = defaultdict(Finding)
        report = Report(limit=NUM_PLACES)
        exact, normalised, prompts, sketches = array("Q"), array("Q"), array("Q"), array("I")
        for number, record in enumerate(read_records(settings.sources(), report)):
            turns = record.messages if isinstance(record, Conversation) else (Message("text", record.text, train=True),)
            spoken = normalise("\n".join(turn.content for turn in turns if turn.role not in LEADING_ROLES))
            prompt = turns[: next((i for i, turn in enumerate(turns) if turn.train), 0)]
            self.places.add(record.source)
            exact.append(_hash(turns, str))
            # texts of punctuation alone would all be equal, so they are not normalised
            normalised.append(_hash(turns, normalise) if spoken else exact[-1])
            prompts.append(_hash(prompt, normalise) if prompt else 0)
            sketches.frombytes(sketch(spoken).tobytes())
            if number not in held_out:
                self._check_samples(number, record)
                self._check_text(record)
        for line in report.lines:
            self.findings["skipped_rows"].add(line)
        self.findings["skipped_rows"].count += report.total - len(report.lines)
        self.exact, self.normalised, self.prompts = (np.array(hashes) for hashes in (exact, normalised, prompts))
        self.sketches = np.array(sketches).reshape(-1, NUM_MINIMA)  # [records, NUM_MINIMA]

    def _check_samples(self, number: int, record: Record) -> None:
        """Whether the record became samples, untruncated, with supervised tokens and a trained end token."""
        facts, place = self.facts, record.source
        num_tokens = int(facts.num_tokens[number]) if number < len(facts.num_tokens) else 0
        if num_tokens and facts.double_bos[number]:
            self.findings["double_bos_rows"].add(place)
        if num_tokens and facts.ends[number] in (MASKED, CUT):
            note = "masked" if facts.ends[number] == MASKED else "cut"
            self.findings["end_token_untrained_rows"].add(place, note)
        if num_tokens and not facts.num_supervised_tokens[number]:
            self.findings["rows_without_supervision"].add(place)
        # with `drop` a record is in the samples whole or not at all, so it is rendered only if it is missing
        if isinstance(record, Conversation) and (not num_tokens or self.settings.truncation != "drop"):
            self._check_length(record, num_tokens)

    def _check_length(self, record: Conversation, num_tokens: int) -> None:
        try:
            whole = render_conversation(self.tokenizer, record)
        except ValueError as error:
            self.findings["skipped_rows"].add(record.source, str(error))
            return
        length = len(whole.input_ids)
        if num_tokens and num_tokens < length:
            self.findings["truncated_rows"].add(record.source, f"{num_tokens} of {length} tokens")
        elif not num_tokens and whole.num_supervised_tokens:
            self.findings["dropped_rows"].add(record.source, f"{length} tokens")
        elif not num_tokens:
            self.findings["rows_without_supervision"].add(record.source)

    def _check_text(self, record: Record) -> None:
        """Garbage in any turn, and turns in an unusual order."""
        texts = [turn.content for turn in record.messages] if isinstance(record, Conversation) else [record.text]
        for name, pattern in (("control_character_rows", CONTROL), ("mojibake_rows", MOJIBAKE)):
            matches = ((text, match) for text in texts if (match := pattern.search(text)))
            text, match = next(matches, ("", None))
            if match is not None:
                spelled = " ".join(f"U+{ord(character):04X}" for character in match[0])
                self.findings[name].add(record.source, f"{spelled} in line {text.count(chr(10), 0, match.start()) + 1}")
        problem = role_problem([turn.role for turn in record.messages]) if isinstance(record, Conversation) else ""
        if problem:
            self.findings["role_order_rows"].add(record.source, problem)


def _hash(turns: Sequence[Message], spelling: Callable[[str], str]) -> int:
    parts = [f"{turn.role}\x1f{spelling(turn.content)}\x1f{turn.extra or ''}" for turn in turns]
    return fingerprint("\x1e".join(parts))


def role_problem(roles: Sequence[str]) -> str:
    """What is unusual about the order of a conversation's roles; empty if nothing is."""
    turns = list(roles[1:] if roles[:1] and roles[0] in LEADING_ROLES else roles)
    if turns[:1] != ["user"]:
        return f"begins with {turns[0]}" if turns else "nothing follows the system turn"
    for before, after in pairwise(turns):
        if (before, after) not in FOLLOWS:
            return f"{after} after {before}"
    return f"ends with {turns[-1]}" if turns[-1] != "assistant" else ""
