"""Records -> samples and facts, chunk by chunk; the cores divide a large data set among them."""

import gc
import multiprocessing
import os
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import pyarrow as pa
from datasets import Features, List, Value

from data_tools.documents import render_document
from data_tools.facts import SCHEMA, facts_of
from data_tools.records import Document, Problem, Raw, Record, read_one
from data_tools.render import ConversationRenderer, RenderSettings
from data_tools.report import DataError
from data_tools.samples import Sample, begin_ids, end_tokens
from data_tools.similarity import sketches
from data_tools.truncation import Policy, fit

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # processes divide the records; a call needs no threads
MAX_WORKERS = 64
MIN_PARALLEL_BYTES = 2**20  # for less, starting processes takes longer than it saves
CHUNK_ROWS = 256

FEATURES = Features(
    {
        "source": Value("string"),
        "path_number": Value("int32"),  # which of the user's paths the sample comes from
        "record": Value("int32"),  # number of the row or text file, over all paths
        "input_ids": List(Value("int32")),
        "trained": List(Value("bool")),
        "num_tokens": Value("int32"),
        "num_supervised_tokens": Value("int32"),
        "question": Value("string"),  # what was said before the last trained answer; empty if it cannot be asked
    }
)


@dataclass(frozen=True)
class MakeSettings:
    """What decides a record's samples, beside its tokenizer."""

    max_length: int  # tokens
    text_overlap: int  # tokens
    truncation: Policy
    render: RenderSettings


@dataclass
class Made:
    """What became of some rows: samples, facts of the records, problems, and counts of Statistics' fields."""

    samples: pa.Table = field(default_factory=FEATURES.arrow_schema.empty_table)
    facts: pa.Table = field(default_factory=SCHEMA.empty_table)
    problems: list[Problem] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    ends: set[int] = field(default_factory=set)
    formats: set[str] = field(default_factory=set)
    ignored_fields: Counter[str] = field(default_factory=Counter)
    unread_keys: Counter[str] = field(default_factory=Counter)


class Maker:
    """Turns rows into samples of at most max_length tokens."""

    def __init__(self, tokenizer: Any, settings: MakeSettings) -> None:
        self.tokenizer, self.settings = tokenizer, settings
        self.begin = begin_ids(tokenizer)
        self.renderer = ConversationRenderer(tokenizer, settings.render)

    def make(self, rows: Sequence[Raw]) -> Made:
        """What becomes of these rows; `record` numbers the records from 0."""
        made = Made()
        samples: list[dict[str, Any]] = []
        facts: list[dict[str, Any]] = []
        for raw in rows:
            record = read_one(raw, made.formats, made.ignored_fields)
            if isinstance(record, Problem):
                made.problems.append(record)
                continue
            try:
                whole, kept = self._samples(record, made)
            except DataError:
                raise
            except (ValueError, RecursionError) as error:
                made.problems.append(Problem(record.source, str(error)))
                continue
            samples += [self._row(sample, record, len(facts), made) for sample in kept]
            facts.append(
                {
                    **facts_of(record),
                    "num_tokens": sum(len(sample.input_ids) for sample in whole),
                    "num_supervised_tokens": sum(sample.num_supervised_tokens for sample in whole),
                }
            )
        for row, minima in zip(facts, sketches([row.pop("spoken") for row in facts]), strict=True):
            row["sketch"] = minima.tobytes()
        made.samples = _table(samples, FEATURES.arrow_schema)
        made.facts = _table(facts, SCHEMA)
        made.counts["num_records"] = len(facts)
        made.counts["num_samples"] = len(samples)
        return made

    def _samples(self, record: Record, made: Made) -> tuple[list[Sample], list[Sample]]:
        """A record's samples as rendered and as kept; the first are empty for a document, which is cut anyway."""
        settings, counts = self.settings, made.counts
        if isinstance(record, Document):
            pieces = render_document(self.renderer.encoder, record, settings.max_length, settings.text_overlap)
            return [], [piece for piece in pieces if piece.num_supervised_tokens]
        try:
            rendered = self.renderer.render(record)
        except TimeoutError as error:  # the next record would time out too
            raise DataError(f"{record.source}: {error}") from None
        fitted = [fit(sample, settings.max_length, settings.truncation, self.begin) for sample in rendered.samples]
        kept = [sample for each in fitted for sample in each.samples if sample.num_supervised_tokens]
        made.unread_keys.update(rendered.unread)
        counts["num_dropped"] += not kept
        counts["num_cut_answers"] += bool(kept) and any(each.is_answer_cut or not each.samples for each in fitted)
        counts["num_left_out_turns"] += rendered.num_left_out
        counts["num_empty_reasonings"] += rendered.num_empty_reasonings
        counts["num_rewritten"] += len(rendered.samples) > 1 or bool(rendered.num_left_out)
        counts["num_history_tokens"] += sum(len(sample.input_ids) for sample in rendered.samples[:-1])
        return rendered.samples, kept

    def _row(self, sample: Sample, record: Record, number: int, made: Made) -> dict[str, Any]:
        supervised = sample.num_supervised_tokens
        made.counts["num_tokens"] += len(sample.input_ids)
        made.counts["num_supervised_tokens"] += supervised
        made.ends |= end_tokens(self.tokenizer, sample)
        return {
            "source": sample.source,
            "path_number": record.path_number,
            "record": number,
            "input_ids": sample.input_ids,
            "trained": sample.trained,
            "num_tokens": len(sample.input_ids),
            "num_supervised_tokens": supervised,
            "question": sample.questions[-1] if sample.questions else "",
        }


def _table(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """The rows as columns, which is faster than row by row."""
    return pa.Table.from_pydict({name: [row[name] for row in rows] for name in schema.names}, schema=schema)


_worker_maker: list[Maker] = []  # in a worker process: its maker, which is slow to send with each chunk


def _begin_work(maker: Maker) -> None:
    gc.freeze()  # what was inherited is not looked through again and again
    _worker_maker.append(maker)


def _make_in_worker(rows: list[Raw]) -> Made:
    return _worker_maker[0].make(rows)


def made_in_chunks(rows: Iterator[Raw], maker: Maker, num_bytes: int) -> Iterator[Made]:
    """What becomes of all rows, in order; the cores divide a large data set, a few chunks at a time."""
    num_workers = min(len(os.sched_getaffinity(0)), MAX_WORKERS)
    chunks = iter(lambda: list(islice(rows, CHUNK_ROWS)), [])
    if num_workers == 1 or num_bytes < MIN_PARALLEL_BYTES:
        for chunk in chunks:
            yield maker.make(chunk)
        return
    # forked workers inherit the maker; none of them touches a GPU
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(num_workers, fork, initializer=_begin_work, initargs=(maker,)) as pool:
        pending: deque[Future[Made]] = deque()
        for chunk in chunks:
            pending.append(pool.submit(_make_in_worker, chunk))
            if len(pending) > 2 * num_workers:
                yield pending.popleft().result()
        for future in pending:
            yield future.result()
