"""Files -> tokenised samples on disk: an Arrow table in a folder named by the fingerprint of all its inputs."""

import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import uuid
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
from datasets import Dataset, Features, List, Value
from datasets.arrow_writer import ArrowWriter
from transformers import PreTrainedTokenizerBase

from data_tools.records import (
    Conversation,
    DataError,
    Document,
    Record,
    Report,
    Source,
    find_sources,
    read_records,
)
from data_tools.render import (
    Sample,
    begin_ids,
    end_tokens,
    render_conversation,
    render_document,
    tokenizer_identity,
)
from data_tools.truncation import Fitted, Policy, fit

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # processes divide the records; a call needs no threads
MAX_WORKERS = 16
MIN_PARALLEL_BYTES = 4 * 2**20  # for less, starting processes takes longer than it saves
CHUNK_RECORDS = 128

FORMAT_VERSION = 3  # raise it when the same input would give different samples
FEATURES = Features(
    {
        "source": Value("string"),
        "path_number": Value("int32"),  # which of the user's paths the sample comes from
        "record": Value("int32"),  # number of the row or text file, over all paths
        "input_ids": List(Value("int32")),
        "trained": List(Value("bool")),
        "num_tokens": Value("int32"),
        "num_supervised_tokens": Value("int32"),
    }
)


@dataclass(frozen=True)
class PrepareSettings:
    """The settings that, with the files' content and the tokenizer, determine the samples."""

    paths: tuple[str, ...]
    format: str = "auto"
    max_length: int = 1024  # tokens
    text_overlap: int = 128  # tokens
    truncation: Policy = "drop"
    fields: tuple[str, ...] = ()
    on_error: str = "stop"

    def sources(self) -> list[Source]:
        """The files and hub data sets that the paths name; raises DataError if any is missing."""
        return find_sources(self.paths, self.format, self.fields)


@dataclass(frozen=True)
class Statistics:
    """Counts of records, samples and tokens; stored beside the samples."""

    num_records: int
    num_samples: int
    num_tokens: int
    num_supervised_tokens: int
    num_dropped: int  # records that are too long, or have no supervised tokens
    num_cut_answers: int  # records with an answer that lost tokens to truncation
    num_skipped: int  # records that could not be read, with on_error skip
    skipped: list[str]  # the first of them, with their reasons
    end_token_ids: list[int]
    ignored_fields: dict[str, int]
    formats: list[str]


@dataclass(frozen=True)
class Prepared:
    """Memory-mapped samples; two fingerprints are equal exactly when the samples are."""

    fingerprint: str
    dataset: Dataset
    statistics: Statistics


def prepare(settings: PrepareSettings, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """The samples of `settings.paths`, from the cache or made now; raises DataError listing every problem.

    Bad data leaves nothing in the cache, and an interrupted preparation nothing that looks complete: samples are
    written to a temporary folder, which is renamed at the end.
    """
    sources = settings.sources()
    fingerprint = _fingerprint(settings, sources, tokenizer)
    folder = cache_root() / fingerprint
    locks = cache_root().parent / "locks"
    for parent in (folder.parent, locks):
        parent.mkdir(parents=True, exist_ok=True)
    with (locks / fingerprint[:2]).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process prepares; others that need the same samples wait
        found = _cached(folder)
        if found is None:
            shutil.rmtree(folder, ignore_errors=True)
            _make(sources, settings, tokenizer, folder)
            found = _cached(folder)
            assert found is not None
    return found


def _cached(folder: Path) -> Prepared | None:
    """The samples in the cache; None if there are none, or if they are damaged or of another version."""
    try:
        statistics = Statistics(**json.loads((folder / "statistics.json").read_text(encoding="utf-8")))
        samples = Dataset.from_file(str(folder / "samples.arrow"))
    except (OSError, ValueError, TypeError, KeyError, pyarrow.ArrowException):
        return None
    is_valid = samples.features == FEATURES and len(samples) == statistics.num_samples
    return Prepared(folder.name, samples, statistics) if is_valid else None


def _make(sources: Sequence[Source], settings: PrepareSettings, tokenizer: Any, folder: Path) -> None:
    temporary = folder.with_name(f".tmp-{folder.name[:16]}-{uuid.uuid4().hex[:8]}")
    temporary.mkdir(mode=0o700)  # it holds the user's data as text
    try:
        statistics = _write(sources, settings, tokenizer, temporary / "samples.arrow")
        (temporary / "statistics.json").write_text(json.dumps(asdict(statistics)), encoding="utf-8")
        for file in temporary.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def first_conversations(settings: PrepareSettings, count: int) -> list[Conversation]:
    """The first `count` conversations of the files, whose questions are asked after training."""
    records = read_records(settings.sources(), Report())
    return list(islice((record for record in records if isinstance(record, Conversation)), count))


def cache_root() -> Path:
    """The folder of prepared data in HANDLOOP_CACHE or ~/.cache/handloop; everything in it can be made again."""
    return Path(os.environ.get("HANDLOOP_CACHE") or "~/.cache/handloop").expanduser() / "prepared"


def _fingerprint(settings: PrepareSettings, sources: Sequence[Source], tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of the content in order, formats, tokenizer, template and settings; the files' paths do not count."""
    digest = hashlib.sha256(tokenizer_identity(tokenizer).encode())
    for source in sources:
        digest.update(f"{source.path_number} {source.digest()}\n".encode())
    decisive = (settings.max_length, settings.text_overlap, settings.truncation, settings.on_error)
    digest.update(f"{FORMAT_VERSION} {decisive}".encode())
    return digest.hexdigest()


def _write(sources: Sequence[Source], settings: PrepareSettings, tokenizer: Any, path: Path) -> Statistics:
    if tokenizer.eos_token_id is None:
        raise DataError(
            "the tokenizer has no end token, so no model could learn to stop; set eos_token in tokenizer_config.json"
        )
    report = Report()
    counts: Counter[str] = Counter()
    ends: set[int] = set()
    with ArrowWriter(features=FEATURES, path=str(path)) as writer:
        fitted_records = _fitted(read_records(sources, report), _Renderer(tokenizer, settings), sources)
        for number, (record, fitted) in enumerate(fitted_records):
            counts["records"] += 1
            if isinstance(fitted, str):
                report.add(record.source, fitted)
                continue
            counts["dropped"] += not fitted.samples
            counts["cut"] += fitted.is_answer_cut
            for sample in fitted.samples:
                writer.write(_row(sample, record, number))
                counts["samples"] += 1
                counts["tokens"] += len(sample.input_ids)
                counts["supervised"] += sample.num_supervised_tokens
                ends |= end_tokens(tokenizer, sample)
        writer.finalize()
    if settings.on_error == "stop" or not counts["samples"]:
        report.raise_if_any()
    if not counts["samples"]:
        raise DataError(
            f"all {counts['records']} records are longer than data.max_length = {settings.max_length} tokens; "
            "raise it, or choose another --data.truncation"
        )
    return Statistics(
        num_records=counts["records"],
        num_samples=counts["samples"],
        num_tokens=counts["tokens"],
        num_supervised_tokens=counts["supervised"],
        num_dropped=counts["dropped"],
        num_cut_answers=counts["cut"],
        num_skipped=report.total,
        skipped=report.lines,
        end_token_ids=sorted(ends),
        ignored_fields=dict(report.ignored_fields),
        formats=sorted(report.formats),
    )


def _row(sample: Sample, record: Record, number: int) -> dict[str, object]:
    return {
        "source": sample.source,
        "input_ids": sample.input_ids,
        "trained": sample.trained,
        "path_number": record.path_number,
        "record": number,
        "num_tokens": len(sample.input_ids),
        "num_supervised_tokens": sample.num_supervised_tokens,
    }


@dataclass(frozen=True)
class _Renderer:
    """Turns records into samples of at most data.max_length tokens."""

    tokenizer: Any
    settings: PrepareSettings

    def fit(self, record: Record) -> Fitted | str:
        """The samples of a record, or the reason why it cannot be used."""
        settings = self.settings
        if isinstance(record, Document):
            pieces = render_document(self.tokenizer, record, settings.max_length, settings.text_overlap)
            return Fitted([piece for piece in pieces if piece.num_supervised_tokens])
        try:
            sample = render_conversation(self.tokenizer, record)
        except ValueError as error:
            return str(error)
        except TimeoutError as error:  # the next record would time out too
            raise DataError(f"{record.source}: {error}") from None
        return fit(sample, settings.max_length, settings.truncation, begin_ids(self.tokenizer))


_worker_renderer: list[_Renderer] = []  # in a worker process: its renderer, which is slow to send with each chunk


def _fit_in_worker(records: list[Record]) -> list[Fitted | str]:
    return [_worker_renderer[0].fit(record) for record in records]


def _fitted(
    records: Iterator[Record], renderer: _Renderer, sources: Sequence[Source]
) -> Iterator[tuple[Record, Fitted | str]]:
    """Each record with its samples, in order; the cores divide a large data set, a few chunks at a time."""
    num_workers = min(os.cpu_count() or 1, MAX_WORKERS)
    if num_workers == 1 or sum(source.num_bytes() for source in sources) < MIN_PARALLEL_BYTES:
        yield from ((record, renderer.fit(record)) for record in records)
        return
    # forked workers inherit the renderer; none of them touches a GPU
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(num_workers, fork, initializer=_worker_renderer.append, initargs=(renderer,)) as pool:
        pending: deque[tuple[list[Record], Future[list[Fitted | str]]]] = deque()
        while chunk := list(islice(records, CHUNK_RECORDS)):
            pending.append((chunk, pool.submit(_fit_in_worker, chunk)))
            if len(pending) > 2 * num_workers:
                waiting, future = pending.popleft()
                yield from zip(waiting, future.result(), strict=True)
        for waiting, future in pending:
            yield from zip(waiting, future.result(), strict=True)
