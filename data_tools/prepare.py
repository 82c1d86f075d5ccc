"""Files -> tokenised samples on disk: an Arrow table in a folder named by the fingerprint of all that decides it."""

import hashlib
import json
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

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
from data_tools.render import Sample, end_tokens, render_conversation, render_document, tokenizer_identity

FORMAT_VERSION = 1  # raise it when the same input would give other samples
FEATURES = Features(
    {
        "source": Value("string"),
        "record": Value("int32"),  # running number of the row or text file that the sample comes from
        "input_ids": List(Value("int32")),
        "trained": List(Value("bool")),
        "num_tokens": Value("int32"),
        "num_supervised_tokens": Value("int32"),
    }
)


@dataclass(frozen=True)
class PrepareSettings:
    """What, besides the files and the tokenizer, decides the samples."""

    paths: tuple[str, ...]
    format: str
    max_length: int  # tokens
    text_overlap: int  # tokens


@dataclass(frozen=True)
class Statistics:
    """What became of the records; stored beside the samples."""

    num_records: int
    num_samples: int
    num_tokens: int
    num_supervised_tokens: int
    num_too_long: int
    end_token_ids: list[int]
    ignored_fields: dict[str, int]
    formats: list[str]

    @property
    def is_conversations(self) -> bool:
        """Whether there are questions that can be asked."""
        return "prompt_response" in self.formats


@dataclass(frozen=True)
class Prepared:
    """Samples, memory-mapped; `fingerprint` is equal exactly when the samples are."""

    fingerprint: str
    dataset: Dataset
    statistics: Statistics


def prepare(settings: PrepareSettings, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """The samples of `settings.paths`, from the cache or made now; raises DataError listing all that is wrong.

    Bad data leaves nothing behind, and an interrupted preparation nothing that is taken for whole: samples are
    written to a temporary folder that is renamed when it is complete.
    """
    sources = find_sources(settings.paths, settings.format)
    fingerprint = _fingerprint(settings, sources, tokenizer)
    folder = cache_root() / fingerprint
    if not (folder / "statistics.json").is_file():
        temporary = folder.with_name(f".tmp-{fingerprint[:16]}-{uuid.uuid4().hex[:8]}")
        temporary.mkdir(parents=True)
        try:
            statistics = _write(sources, settings, tokenizer, temporary / "samples.arrow")
            (temporary / "statistics.json").write_text(json.dumps(asdict(statistics)), encoding="utf-8")
            if not folder.exists():  # another process may have been first; both wrote the same
                os.rename(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    statistics = Statistics(**json.loads((folder / "statistics.json").read_text(encoding="utf-8")))
    return Prepared(fingerprint, Dataset.from_file(str(folder / "samples.arrow")), statistics)


def first_conversations(settings: PrepareSettings, count: int) -> list[Conversation]:
    """The first `count` conversations of the files, for asking their questions."""
    records = read_records(find_sources(settings.paths, settings.format), Report())
    return list(islice((record for record in records if isinstance(record, Conversation)), count))


def cache_root() -> Path:
    """Where prepared data lies: HANDLOOP_CACHE, or ~/.cache/handloop; everything in it can be made again."""
    return Path(os.environ.get("HANDLOOP_CACHE") or "~/.cache/handloop").expanduser() / "prepared"


def _fingerprint(settings: PrepareSettings, sources: Sequence[Source], tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 over file bytes in order, formats, tokenizer, template and settings; paths do not count."""
    digest = hashlib.sha256(tokenizer_identity(tokenizer).encode())
    for source in sources:
        with source.path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{source.format} {content}\n".encode())
    digest.update(f"{FORMAT_VERSION} {settings.max_length} {settings.text_overlap}".encode())
    return digest.hexdigest()


def _write(
    sources: Sequence[Source], settings: PrepareSettings, tokenizer: PreTrainedTokenizerBase, path: Path
) -> Statistics:
    report = Report()
    counts: Counter[str] = Counter()
    ends: set[int] = set()
    if tokenizer.eos_token_id is None:
        raise DataError(
            "the tokenizer has no end token (eos_token), so no model could learn to stop; set one in its files"
        )
    with ArrowWriter(features=FEATURES, path=str(path)) as writer:
        for number, record in enumerate(read_records(sources, report)):
            counts["records"] += 1
            for sample in _samples(record, settings, tokenizer, report):
                if len(sample.input_ids) > settings.max_length:
                    counts["too_long"] += 1
                    continue
                counted = {
                    "num_tokens": len(sample.input_ids),
                    "num_supervised_tokens": sample.num_supervised_tokens,
                }
                writer.write({**asdict(sample), "record": number, **counted})
                counts["samples"] += 1
                counts["tokens"] += len(sample.input_ids)
                counts["supervised"] += sample.num_supervised_tokens
                ends |= end_tokens(tokenizer, sample)
        writer.finalize()
    report.raise_if_any()
    if not counts["samples"]:
        raise DataError(
            f"all {counts['records']} records are longer than data.max_length = {settings.max_length} tokens; raise it"
        )
    return Statistics(
        num_records=counts["records"],
        num_samples=counts["samples"],
        num_tokens=counts["tokens"],
        num_supervised_tokens=counts["supervised"],
        num_too_long=counts["too_long"],
        end_token_ids=sorted(ends),
        ignored_fields=dict(report.ignored_fields),
        formats=sorted({source.format for source in sources}),
    )


def _samples(
    record: Record, settings: PrepareSettings, tokenizer: PreTrainedTokenizerBase, report: Report
) -> list[Sample]:
    if isinstance(record, Document):
        return list(render_document(tokenizer, record, settings.max_length, settings.text_overlap))
    try:
        return [render_conversation(tokenizer, record)]
    except ValueError as error:
        report.add(record.source, str(error))
        return []
