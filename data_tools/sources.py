"""Paths -> the files and data sets that they name; what was taken, and what was left in a folder, is said."""

import glob
import os
import re
from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path

from data_tools.compressed import COMPRESSIONS, kind_of, open_bytes
from data_tools.data_sets import HubData, SavedData
from data_tools.delimiters import NAMES
from data_tools.places import not_found
from data_tools.readers import READERS, RowFile, column_delimiter, file_digest
from data_tools.report import Report
from data_tools.terminal import escaped

TEXT_EXTENSIONS = (".txt", ".md")
KNOWN_EXTENSIONS = (*TEXT_EXTENSIONS, *READERS)
KNOWN = f"{', '.join(KNOWN_EXTENSIONS)}, also with {', '.join(COMPRESSIONS)}"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.\[\]%:+-]+){0,2}")  # owner/name, :split or :subset:split
NUM_NAMED = 3  # files named of each kind

LEFT_ALONE = ("__MACOSX", "__pycache__")  # what archives and Python put into a folder
ABOUT = re.compile(r"(readme|license|licence|notice|changelog|citation|copying)\b.*", re.IGNORECASE)
# names of splits, as the first or last word of a file of rows, or the whole name of a text or folder
TRAINED = {"train", "training"}
HELD_OUT = {"test", "testing", "valid", "validation", "val", "dev", "eval", "evaluation", "heldout", "holdout"}


@dataclass(frozen=True)
class TextFile:
    """A file that is one document."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def read(self) -> bytes:
        """The file's content, decompressed as its name says."""
        with open_bytes(self.path) as file:
            return file.read()

    def digest(self) -> str:
        """sha256 of the file's bytes."""
        return file_digest(self.path)


Origin = TextFile | RowFile | HubData | SavedData


@dataclass(frozen=True)
class Source:
    """A file or data set, its format, and which of the user's paths it came from."""

    origin: Origin
    format: str  # auto, or the name of a format
    path_number: int
    field_map: tuple[tuple[str, str], ...] = ()

    def num_bytes(self) -> int:
        """Size of the file; a data set counts as large."""
        return self.origin.path.stat().st_size if isinstance(self.origin, TextFile | RowFile) else 2**40

    def digest(self, content: str) -> str:
        """A digest of the content, given as that of the origin, the format and the field names."""
        return f"{self.format} {self.field_map} {content}"


@dataclass
class Survey:
    """The sources that paths name, in order, and lines on what was taken from folders and what was left there."""

    sources: list[Source] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def survey(paths: Sequence[str], data_format: str, fields: Sequence[str] = ()) -> Survey:
    """The files and data sets of `paths`, folders and globs in name order; raises DataError if any is missing.

    `fields` are `prompt=NAME` and `response=NAME`.
    """
    report, found = Report(), Survey()
    field_map = tuple(sorted((name, column) for name, _, column in (field.partition("=") for field in fields)))
    for number, name in enumerate(paths):
        for origin in _origins(name, report, found.notes):
            found.sources.append(Source(origin, data_format, number, field_map))
            if isinstance(origin, RowFile) and origin.path.is_file() and kind_of(origin.path) == ".csv":
                delimiter = column_delimiter(origin.path)
                if delimiter != ",":
                    found.notes.append(escaped(f"{origin}: its columns are separated by {NAMES[delimiter]}"))
            try:
                str(origin).encode()
            except UnicodeEncodeError:
                report.add(str(origin), "its name is not UTF-8; rename it")
            if isinstance(origin, TextFile) and data_format not in ("auto", "text"):
                report.add(str(origin), f"is plain text; data.format {data_format} needs a file of rows")
    report.raise_if_any()
    return found


def is_hub_name(name: str) -> bool:
    """Whether a name that is no file or folder here may be that of a data set on the hub."""
    return bool(HUB_NAME.fullmatch(name)) and kind_of(Path(name.partition(":")[0])) not in KNOWN_EXTENSIONS


def _origins(name: str, report: Report, notes: list[str]) -> list[Origin]:
    path = Path(name)
    if path.is_dir():
        return _in_folder(path, report, notes)
    if path.is_file():
        if kind_of(path) not in KNOWN_EXTENSIONS:
            report.add(name, f"unknown file extension; known: {KNOWN}")
            return []
        return [_file(path)]
    if any(character in name for character in "*?["):
        matching = [file for file in sorted(map(Path, glob.glob(str(path), recursive=True))) if file.is_file()]
        files = [file for file in matching if kind_of(file) in KNOWN_EXTENSIONS]
        if not files:
            report.add(name, f"no {KNOWN} file matches")
        # what the pattern names is no split, such as the folder test in test/*.jsonl
        shared = Path(os.path.commonpath([file.parent for file in matching])) if matching else Path()
        _refuse_both_splits(name, files, shared, report)
        others = [file for file in matching if file not in files]
        notes.append(_said(name, files, {"of another kind": others}, shared))
        return [_file(file) for file in files]
    if is_hub_name(name):
        return [HubData(name)]
    report.add(name, not_found(name))
    return []


def _in_folder(folder: Path, report: Report, notes: list[str]) -> list[Origin]:
    if (folder / "state.json").is_file() and any(folder.glob("*.arrow")):
        return [SavedData(folder)]
    if (folder / "dataset_dict.json").is_file():
        return _saved_splits(folder, report)
    present = sorted(file for file in folder.rglob("*") if file.is_file())
    hidden = [file for file in present if _is_hidden(file.relative_to(folder))]
    files = [file for file in present if file not in set(hidden) and kind_of(file) in KNOWN_EXTENSIONS]
    rows = [file for file in files if kind_of(file) not in TEXT_EXTENSIONS]
    about = [file for file in files if file not in set(rows) and ABOUT.fullmatch(file.name)] if rows else []
    files = [file for file in files if file not in set(about)]
    if rows and len(rows) < len(files):
        reason = "contains both text and row files; choose with a glob, such as --data.path 'folder/*.txt'"
        report.add(str(folder), reason)
    elif not files:
        report.add(str(folder), f"contains no {KNOWN} file")
    for file in files:  # a downloaded folder must not pull in other files of the user
        if file.is_symlink() and not file.resolve().is_relative_to(folder.resolve()):
            report.add(str(file), "is a link to a file outside the folder; to use that file, give its own path")
    _refuse_both_splits(str(folder), files, folder, report)
    others = [file for file in present if file not in {*hidden, *files, *about}]
    links = sorted(path for path in folder.rglob("*") if path.is_symlink() and path.is_dir())
    left = {"hidden": hidden, "about the data": about, "of another kind": others, "in a linked folder": links}
    notes.append(_said(f"{folder}/", files, left, folder))
    return [_file(file) for file in files]


def _saved_splits(folder: Path, report: Report) -> list[Origin]:
    """The one split of a folder that `DatasetDict.save_to_disk` wrote; where there are several, one must be named."""
    splits = sorted(path.parent for path in folder.glob("*/state.json"))
    if len(splits) == 1:
        return [SavedData(splits[0])]
    names = ", ".join(split.name for split in splits) or "none"
    example = next((split for split in splits if split.name.lower() in TRAINED), folder / "train")
    report.add(str(folder), f"holds several splits ({names}); name the one to train on, such as --data.path {example}")
    return []


def _is_hidden(relative: Path) -> bool:
    return any(part.startswith((".", "~$")) or part in LEFT_ALONE for part in relative.parts)


def _refuse_both_splits(name: str, files: Sequence[Path], folder: Path, report: Report) -> None:
    """Reports files of a training split that stand beside those of a test or validation split."""
    trained, held_out = (
        [file for file in files if _is_of_split(_relative(file, folder), names)] for names in (TRAINED, HELD_OUT)
    )
    if trained and held_out:
        report.add(
            name,
            f"has a training split ({_names(trained, folder)}) and one that is held out ({_names(held_out, folder)}): "
            f"name what to train on, --data.path {trained[0]}, and, to validate on the other, "
            f"--data.validation_path {held_out[0]}",
        )


def _is_of_split(relative: Path, names: Set[str]) -> bool:
    """By the folders' names, and by the file's own; a text's title may begin with any word."""
    words = re.findall(r"[a-z]+", relative.name.partition(".")[0].lower().replace("held_out", "heldout"))
    own = {words[0], words[-1]} if words and (len(words) == 1 or kind_of(relative) not in TEXT_EXTENSIONS) else set()
    return bool(names & (own | {part.lower() for part in relative.parts[:-1]}))


def _said(name: str, taken: Sequence[Path], left: dict[str, list[Path]], folder: Path) -> str:
    """One line: the files that were taken and, by reason, those that were left."""
    count = f"{len(taken):,} file{'s' if len(taken) != 1 else ''}"
    line = f"{name}: {count} taken ({_names(taken, folder)})"
    reasons = [f"{len(files):,} {reason} ({_names(files, folder)})" for reason, files in left.items() if files]
    return escaped(f"{line}; left: {', '.join(reasons)}" if reasons else line)


def _names(files: Sequence[Path], folder: Path) -> str:
    named = [str(_relative(file, folder)) for file in files[:NUM_NAMED]]
    return ", ".join(named) + (", ..." if len(files) > NUM_NAMED else "")


def _relative(file: Path, folder: Path) -> Path:
    return file.relative_to(folder) if file.is_relative_to(folder) else file


def _file(path: Path) -> TextFile | RowFile:
    return TextFile(path) if kind_of(path) in TEXT_EXTENSIONS else RowFile(path)
