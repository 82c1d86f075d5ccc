"""What an audit reads: how each sample begins and ends, the facts of each record, and questions in other words."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from data_tools.encode import special_ids
from data_tools.prepare import DataSplit
from data_tools.similarity import NEAR_SIMILARITY, NUM_MINIMA, sketches

NUM_PLACES = 5  # rows named per finding
SAMPLES_AT_ONCE = 1000
MAX_WORDINGS = 12  # of one question, as many as `handloop glossary` knows; an answer to more prompts is a stock phrase
# What became of a record's end tokens; if there are several, the worst (largest) counts.
NO_TARGET, TRAINED, CUT, MASKED = range(4)


@dataclass
class Finding:
    """How many rows have it, and the first of them as file:line, each with a note if there is one."""

    count: int = 0
    places: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Spoken:
    """The tokens of a record's first sample; empty for a record without samples."""

    prompt: tuple[int, ...]  # what is not trained
    trained: tuple[int, ...]


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


def read_samples(samples: Dataset, num_records: int, tokenizer: Any) -> SampleFacts:
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
    worst, double = np.zeros(num_records, np.uint8), np.zeros(num_records, bool)
    np.maximum.at(worst, records, end)
    double[records[np.concatenate(doubles)]] = True
    sums = [
        np.bincount(records, column(samples, name), num_records) for name in ("num_tokens", "num_supervised_tokens")
    ]
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


class Scan:
    """A split's records: their hashes as arrays, and findings in their samples and texts.

    `rows` are the numbers of its records in the prepared data; those without a sample belong to it where the whole
    data does.
    """

    def __init__(self, split: DataSplit, rows: np.ndarray, tokenizer: Any) -> None:
        facts = split.prepared.facts
        self.split, self.rows, self.table = split, rows, facts
        self.samples = read_samples(split.samples, len(facts), tokenizer)
        self.exact, self.normalised, self.prompts = (
            facts[name].to_numpy()[rows] for name in ("exact", "normalised", "prompt")
        )
        minima = np.frombuffer(b"".join(facts["sketch"].to_pylist()), np.uint32)
        self.sketches = minima.reshape(-1, NUM_MINIMA)[rows]  # [records, NUM_MINIMA]

    def place(self, i: int) -> str:
        """The place of the split's record `i` as file:line."""
        return self.table["place"][int(self.rows[i])].as_py()

    def spoken(self, rows: np.ndarray) -> Iterator[Spoken]:
        """What the split's records of these indices say."""
        records, firsts = np.unique(column(self.split.samples, "record"), return_index=True)
        places = np.searchsorted(records, self.rows[rows])
        has_sample = np.append(records, -1)[places] == self.rows[rows]
        for start in range(0, len(rows), SAMPLES_AT_ONCE):
            which = slice(start, start + SAMPLES_AT_ONCE)
            found: Any = self.split.samples[firsts[places[which][has_sample[which]]].tolist()]
            samples = zip(found["input_ids"], found["trained"], strict=True)
            for has_one in has_sample[which]:
                pairs = list(zip(*next(samples), strict=True)) if has_one else []
                prompt, trained = ([token for token, is_it in pairs if is_it == kind] for kind in (False, True))
                yield Spoken(tuple(prompt), tuple(trained))

    def findings(self) -> dict[str, Finding]:
        """What is wrong with single records: how they were tokenised and cut, and garbage in their texts."""
        facts, rows = self.samples, self.rows
        kept = facts.num_tokens[rows]
        whole, supervised = (self.table[name].to_numpy()[rows] for name in ("num_tokens", "num_supervised_tokens"))
        is_conversation = whole > 0
        ends = facts.ends[rows]
        found = {
            "double_bos_rows": self._found(facts.double_bos[rows]),
            "end_token_untrained_rows": self._found(
                (ends == MASKED) | (ends == CUT), lambda i: "masked" if ends[i] == MASKED else "cut"
            ),
            "rows_without_supervision": self._found(
                (is_conversation & (supervised == 0)) | ((kept > 0) & (facts.num_supervised_tokens[rows] == 0))
            ),
            "truncated_rows": self._found(
                is_conversation & (kept > 0) & (kept < whole), lambda i: f"{kept[i]} of {whole[i]} tokens"
            ),
            "dropped_rows": self._found(
                is_conversation & (kept == 0) & (supervised > 0), lambda i: f"{whole[i]} tokens"
            ),
        }
        for name in ("control_character_rows", "mojibake_rows", "role_order_rows"):
            notes = self.table[name].take(pa.array(rows))
            has_note = notes.to_numpy() != ""
            found[name] = self._found(has_note, lambda i, notes=notes: notes[int(i)].as_py())
        return found

    def _found(self, has_it: np.ndarray, note: Any = None) -> Finding:
        first = np.flatnonzero(has_it)[:NUM_PLACES]
        places = [f"{self.place(i)} ({note(i)})" if note else self.place(i) for i in first]
        return Finding(int(has_it.sum()), places)


def reworded(scan: Scan, asked: np.ndarray, others: Scan, twins: np.ndarray) -> np.ndarray:
    """[rows] bool: which of the `asked` have the answer of their twin to the token, and a prompt in other words.

    Several wordings of a question are no near-duplicates, however long the answer that they share. Prompts are in
    other words where they are not near-duplicates themselves. `twins` are rows of `others`.
    """
    rows = np.flatnonzero(asked)
    pairs = list(zip(scan.spoken(rows), others.spoken(twins[rows]), strict=True))
    same = np.array([bool(one.trained) and one.trained == two.trained for one, two in pairs], bool)
    own, other = (sketches([" ".join(map(str, pair[side].prompt)) for pair in pairs]) for side in (0, 1))
    found = rows[same & ((own == other).mean(axis=1) < NEAR_SIMILARITY)]
    counts = np.bincount(twins[found], minlength=len(others.rows))
    result = np.zeros(len(asked), bool)
    result[found] = counts[twins[found]] < MAX_WORDINGS
    return result
