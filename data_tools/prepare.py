"""Files -> tokenised samples on disk: Arrow tables in a folder named by the fingerprint of all their inputs."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from datasets.arrow_writer import ArrowWriter
from transformers import PreTrainedTokenizerBase

from data_tools.cache import cache_root, lock_of, unusable_cache
from data_tools.chat_template import ChatTemplate
from data_tools.facts import SCHEMA
from data_tools.making import FEATURES, Made, Maker, MakeSettings, made_in_chunks
from data_tools.progress import Progress
from data_tools.records import read_raw
from data_tools.render import RenderSettings
from data_tools.report import DataError, Report
from data_tools.samples import tokenizer_identity
from data_tools.sources import Source, Survey, survey
from data_tools.truncation import Policy

MAX_NAMED_PATHS = 100
FORMAT_VERSION = 4  # raise it when the same input would give different samples


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
    render: RenderSettings = field(default_factory=RenderSettings)

    def survey(self) -> Survey:
        """The files and data sets that the paths name; raises DataError if any is missing."""
        return survey(self.paths, self.format, self.fields)

    @property
    def make(self) -> MakeSettings:
        """What of it decides a record's samples."""
        return MakeSettings(self.max_length, self.text_overlap, self.truncation, self.render)


@dataclass(frozen=True)
class Statistics:
    """Counts of records, samples and tokens; stored beside the samples."""

    num_records: int
    num_samples: int
    num_tokens: int
    num_supervised_tokens: int
    num_dropped: int  # records that are too long, or have no supervised tokens
    num_cut_answers: int  # records that lost an answer, or a part of one, to truncation
    num_rewritten: int  # records whose earlier answers the template renders otherwise than the last one
    num_history_tokens: int  # tokens in the additional samples that data.history each makes of them
    num_left_out_turns: int  # trained turns that data.history last leaves out
    num_empty_reasonings: int  # answers behind an empty think block
    num_skipped: int  # records that could not be read, with on_error skip
    skipped: list[str]  # the first of them, with their reasons
    end_token_ids: list[int]
    ignored_fields: dict[str, int]  # fields of rows that nothing reads
    unread_keys: dict[str, int]  # keys of turns that nothing reads
    formats: list[str]
    date: str  # that the template was given, if it asks for one


@dataclass(frozen=True)
class Prepared:
    """Memory-mapped samples and facts of the records; two fingerprints are equal exactly when the samples are."""

    fingerprint: str
    dataset: Dataset
    facts: pa.Table
    statistics: Statistics
    notes: tuple[str, ...] = ()  # on the files that were taken and left
    parts: Mapping[str, Any] = field(default_factory=dict)  # what the fingerprint covers beside the settings


@dataclass(frozen=True)
class DataSplit:
    """Training or validation data: some or all samples of prepared data."""

    prepared: Prepared
    samples: Dataset


def prepare(settings: PrepareSettings, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """The samples of `settings.paths`, from the cache or made now; raises DataError listing every problem.

    Bad data leaves nothing in the cache, and an interrupted preparation nothing that looks complete: samples are
    written to a temporary folder, which is renamed at the end.
    """
    found = settings.survey()
    contents = [source.origin.digest() for source in found.sources]
    folder = _folder(settings, found.sources, contents, tokenizer)
    with lock_of(folder.name) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process prepares; others that need the same samples wait
        prepared = _cached(folder, found.notes)
        if prepared is None:
            shutil.rmtree(folder, ignore_errors=True)
            try:
                _make(found.sources, settings, tokenizer, folder)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                    raise
                raise unusable_cache(str(error)) from None
            prepared = _cached(folder, found.notes)
            assert prepared is not None
    return replace(prepared, parts=_parts(settings, found.sources, contents, tokenizer))


def is_prepared(settings: PrepareSettings, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether `prepare` would find these samples in the cache; raises DataError where files are missing."""
    sources = settings.survey().sources
    folder = _folder(settings, sources, [source.origin.digest() for source in sources], tokenizer)
    return _cached(folder, ()) is not None


def _folder(
    settings: PrepareSettings, sources: Sequence[Source], contents: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> Path:
    """Where the samples are kept; places name files, so equal content elsewhere is prepared again."""
    named = hashlib.sha256("\n".join(str(source.origin) for source in sources).encode()).hexdigest()
    return cache_root() / f"{_fingerprint(settings, sources, contents, tokenizer)}-{named[:8]}"


def _cached(folder: Path, notes: Sequence[str]) -> Prepared | None:
    """The samples in the cache; None if there are none, or if they are damaged or of another version."""
    try:
        statistics = Statistics(**json.loads((folder / "statistics.json").read_text(encoding="utf-8")))
        samples = Dataset.from_file(str(folder / "samples.arrow"))
        facts = pa.ipc.open_file(pa.memory_map(str(folder / "records.arrow"))).read_all()
    except (OSError, ValueError, TypeError, KeyError, pa.ArrowException):
        return None
    is_valid = samples.features == FEATURES and len(samples) == statistics.num_samples
    is_valid = is_valid and facts.schema == SCHEMA and len(facts) == statistics.num_records
    fingerprint = folder.name.partition("-")[0]
    return Prepared(fingerprint, samples, facts, statistics, tuple(notes)) if is_valid else None


def _make(sources: Sequence[Source], settings: PrepareSettings, tokenizer: Any, folder: Path) -> None:
    temporary = folder.with_name(f".tmp-{folder.name[:16]}-{uuid.uuid4().hex[:8]}")
    temporary.mkdir(mode=0o700)  # it holds the user's data as text
    try:
        statistics = _write(sources, settings, tokenizer, temporary)
        (temporary / "statistics.json").write_text(json.dumps(asdict(statistics)), encoding="utf-8")
        for file in temporary.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _fingerprint(
    settings: PrepareSettings, sources: Sequence[Source], contents: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> str:
    """sha256 of the content in order, formats, tokenizer, template and settings; the files' paths do not count."""
    digest = hashlib.sha256(tokenizer_identity(tokenizer).encode())
    for source, content in zip(sources, contents, strict=True):
        digest.update(f"{source.path_number} {source.digest(content)}\n".encode())
    render = settings.render
    decisive = (
        settings.max_length,
        settings.text_overlap,
        settings.truncation,
        settings.on_error,
        json.dumps(render.arguments, sort_keys=True),
        render.history,
        render.empty_reasoning,
        render.leave_out,
        _date(settings, tokenizer),
    )
    digest.update(f"{FORMAT_VERSION} {decisive}".encode())
    return digest.hexdigest()


def _parts(
    settings: PrepareSettings, sources: Sequence[Source], contents: Sequence[str], tokenizer: Any
) -> dict[str, object]:
    """What the fingerprint covers, a short hash each: tells what has changed where two fingerprints differ.

    A path's content is one hash however many files are in it, and paths after the first MAX_NAMED_PATHS are one
    together: a checkpoint keeps this.
    """
    of_path: dict[int, list[str]] = {number: [] for number in range(len(settings.paths))}
    for source, content in zip(sources, contents, strict=True):
        of_path[source.path_number].append(content)
    named = [(name, _short("\n".join(of_path[number]))) for number, name in enumerate(settings.paths)]
    if len(named) > MAX_NAMED_PATHS:
        rest = named[MAX_NAMED_PATHS:]
        named = [*named[:MAX_NAMED_PATHS], (f"{len(rest)} more paths", _short(repr(rest)))]
    return {
        "tokenizer": _short(tokenizer_identity(tokenizer, with_template=False)),
        "chat template": _short(str(tokenizer.chat_template)),
        "preparation": FORMAT_VERSION,
        "content": [list(each) for each in named],
    }


def _short(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]


def _date(settings: PrepareSettings, tokenizer: Any) -> str:
    """The date that the template is given; empty if it asks for none."""
    return settings.render.today.isoformat() if ChatTemplate(tokenizer).has_clock else ""


def _write(sources: Sequence[Source], settings: PrepareSettings, tokenizer: Any, folder: Path) -> Statistics:
    """Writes samples.arrow and records.arrow into the folder; raises DataError if the data cannot be used."""
    if tokenizer.eos_token_id is None:
        raise DataError(
            "the tokenizer has no end token, so no model could learn to stop; set eos_token in tokenizer_config.json"
        )
    report = Report()
    total = Made()
    num_bytes = sum(source.num_bytes() for source in sources)
    with (
        ArrowWriter(features=FEATURES, path=str(folder / "samples.arrow")) as samples,
        pa.OSFile(str(folder / "records.arrow"), "wb") as file,
        pa.ipc.new_file(file, SCHEMA) as facts,
        Progress("preparing") as progress,
    ):
        for made in made_in_chunks(read_raw(sources), Maker(tokenizer, settings.make), num_bytes):
            _add(made, total)
            numbers = made.samples["record"].to_numpy() + total.counts["num_records"] - made.counts["num_records"]
            numbered = pa.array(numbers.astype(np.int32))
            if len(made.samples):
                column = made.samples.schema.get_field_index("record")
                samples.write_table(made.samples.set_column(column, made.samples.schema.field(column), numbered))
            facts.write_table(made.facts)
            for problem in made.problems:
                report.add(problem.place, problem.reason)
            progress.show(total.counts["num_records"] + report.total)
        samples.finalize()
    _check(settings, report, total.counts)
    return Statistics(
        **{name: total.counts[name] for name, kind in Statistics.__annotations__.items() if kind is int}
        | {"num_skipped": report.total},
        skipped=report.lines,
        end_token_ids=sorted(total.ends),
        ignored_fields=dict(total.ignored_fields),
        unread_keys=dict(total.unread_keys),
        formats=sorted(total.formats),
        date=_date(settings, tokenizer),
    )


def _add(made: Made, total: Made) -> None:
    total.counts.update(made.counts)
    total.ignored_fields.update(made.ignored_fields)
    total.unread_keys.update(made.unread_keys)
    total.ends |= made.ends
    total.formats |= made.formats


def _check(settings: PrepareSettings, report: Report, counts: Counter[str]) -> None:
    """Raises DataError for problems that are not to be skipped, and where nothing is left."""
    if settings.on_error == "stop" or not counts["num_samples"]:
        is_partly_good = bool(counts["num_samples"])
        report.raise_if_any("--data.on_error skip leaves such rows out" if is_partly_good and not report.unread else "")
    report.raise_if_unread()
    if not counts["num_samples"]:
        raise DataError(
            f"all {counts['num_records']} records are longer than data.max_length = {settings.max_length} tokens; "
            "raise it, or choose another --data.truncation"
        )
