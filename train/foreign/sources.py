"""Where another trainer's configuration takes its data from -> our data.path, and what of it has no counterpart."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from train.foreign.reasons import why
from train.foreign.values import words

ROW_FIELDS = {"messages", "conversations", "None", ""}
MAPPINGS = ({"role": "role", "content": "content"}, {"role": "from", "content": "value"})
TURN_FIELDS = {"message_field_role": ("role", "from"), "message_field_content": ("content", "value")}
# what the datasets library calls the kinds of files that it reads, and their names' ends
KINDS = {"json": {".json", ".jsonl"}, "csv": {".csv"}, "parquet": {".parquet"}, "text": {".txt", ".md"}, "arrow": set()}
ENDS = {end for ends in KINDS.values() for end in ends}
SLICE = re.compile(r"\[[^\]]*\](\([^)]*\))?")  # the second half of train[:10%](closest)
Told = tuple[str, Any, str]  # key, value, what is to be said of it: empty where it is done
IS_READ = "rows are recognised by their fields"
IN_COMMAND = ("path", "data_files", "name", "split")  # of a data set: where they are done, data.path has them
# why a part of a data set is not what is trained on
ALL_ROWS = "all rows of a split are read; --data.weights 0.1 takes a tenth of a path's samples, but not the first ones"
NO_SPLITS = "files and folders have no splits: all rows are read; name those of the split alone in --data.path"
NO_SUBSETS = "files and folders have no subsets: name those that are meant in --data.path"
NO_SUCH_NAME = "--data.path owner/name:subset:split has no such name"
OF_REPOSITORY = (
    "files of a data set on the hub are not fetched one by one: `hf download {0} --repo-type dataset --local-dir {0}` "
    "puts them where the command looks for them"
)


def is_local(path: str) -> bool:
    """Whether a data set is a file or folder, and no name on the hub."""
    is_named_so = path.startswith((".", "/", "~")) or path.count("/") > 1
    return is_named_so or bool(ENDS & set(Path(path).suffixes)) or Path(path).exists()


def located(path: str, subset: Any, split: Any) -> tuple[str, str, str]:
    """(data.path, what is to be said of the subset, what of the split): a file, or `owner/name:subset:split`.

    Nothing is said of what the path has, or what is so anyway.
    """
    if is_local(path):
        return path, NO_SUBSETS if subset else "", NO_SPLITS if str(split or "train") != "train" else ""
    whole = "+".join(dict.fromkeys(SLICE.sub("", str(split or "train")).split("+")))
    of_split = "" if whole == str(split or "train") else ALL_ROWS
    if not re.fullmatch(r"[\w.-]+(\+[\w.-]+)*", whole):
        whole, of_split = "train", NO_SUCH_NAME
    of_subset = "" if not subset or re.fullmatch(r"[\w.+-]+", str(subset)) else NO_SUCH_NAME
    named = str(subset) if subset and not of_subset else ""
    parts = [path, named, whole] if named or whole != "train" else [path]
    return ":".join(filter(None, parts)), of_subset, of_split


def axolotl_paths(entries: Sequence[Any], key: str, fields: Sequence[str]) -> tuple[list[str], list[str], list[Told]]:
    """(paths, data.fields, what is said of each key) of axolotl's `datasets`.

    `fields` are the data.fields that there are already: one pair of names is for all paths.
    """
    paths: list[str] = []
    fields = list(fields)
    told: list[Told] = []
    for number, entry in enumerate(entries):
        if not isinstance(entry, Mapping):
            told.append((f"{key}[{number}]", entry, "expected path and type"))
            continue
        found, said = _paths_of(entry)
        if not found:
            told.append((f"{key}[{number}]", entry, "it names no data"))
            continue
        paths += found
        for name, value in entry.items():
            place = f"{key}[{number}].{name}"
            if name == "type" and isinstance(value, Mapping):
                of_type, told_of_type = _custom_type(value, place, fields)
                fields = fields or of_type
                told += told_of_type
            elif name == "ds_type":
                told.append((place, value, _kind_reason(str(value), found)))
            elif name in IN_COMMAND:
                told.append((place, value, said.get(name, "")))
            else:
                told.append((place, value, _axolotl_reason(str(name), value)))
    return paths, fields, told


def _paths_of(entry: Mapping[str, Any]) -> tuple[Sequence[str], dict[str, str]]:
    """The paths of one of axolotl's data sets, and what is to be said of its keys."""
    path, files, split = str(entry.get("path") or ""), entry.get("data_files"), entry.get("split")
    if not files:
        where, of_subset, of_split = located(path, entry.get("name"), split)
        return [where] if path else [], {"name": of_subset, "split": of_split}
    said = {"name": NO_SUBSETS if entry.get("name") else ""}
    of_splits = files if isinstance(files, Mapping) else {"train": files}
    wanted = SLICE.sub("", str(split or "train"))
    if wanted in of_splits:
        said["split"] = "" if wanted == str(split or "train") else ALL_ROWS
    else:
        said["split"] = NO_SPLITS
        wanted = next(iter(of_splits))
    if len(of_splits) > 1:
        said["data_files"] = f"those of {wanted} are taken, and no others"
    names = words(of_splits[wanted]) or ()
    if path in KINDS or not path:
        return names, said
    if not is_local(path):
        said["data_files"] = OF_REPOSITORY.format(path)
    elif ENDS & set(Path(path).suffixes):
        return [path], {**said, "data_files": "the path is a file already"}
    return [str(Path(path) / name) for name in names], said


def _kind_reason(kind: str, paths: Sequence[str]) -> str:
    """What is to be said of the kind of files that a data set is said to have; empty where their names say so."""
    ends = [ENDS & set(Path(path).suffixes) for path in paths]
    is_so = all(not each or each & KINDS.get(kind, set()) for each in ends)
    return "" if is_so else "a file is what the end of its name says: rename it"


def _axolotl_reason(name: str, value: Any) -> str:
    """What is to be said of one key of a data set; empty where nothing is lost."""
    if value is None or value is False:
        return ""
    if name == "type":
        is_so = value in ("alpaca", "chat_template", "sharegpt", "completion", "alpaca_chat", "gpteacher")
        return "" if is_so else f"{IS_READ} (docs/FORMATS.md); handloop preview shows how"
    if name in ("field_messages", "field"):
        return "" if str(value) in {*ROW_FIELDS, "text"} else f"{IS_READ}: rename the column to messages, or text"
    if name == "message_property_mappings":
        return "" if value in MAPPINGS else "turns have role and content, or from and value"
    if name in TURN_FIELDS:
        return "" if str(value) in TURN_FIELDS[name] else "turns have role and content, or from, value"
    if name in ("roles_to_train", "train_on_eos", "train_on_eot"):
        reason = why(name, value)
        return "" if reason and reason.is_so_anyway else reason.text if reason else IS_READ
    if name == "roles":
        return "roles are recognised in the common spellings (docs/FORMATS.md)"
    if name == "chat_template":
        return "the tokenizer's own template is taken; --data.chat_template FILE names another"
    if name == "revision":
        return "the newest revision is read"
    return "all of a data set is read, by its fields"


def _custom_type(kind: Mapping[str, Any], place: str, fields: Sequence[str]) -> tuple[list[str], list[Told]]:
    """`data.fields` for a type that names its columns, and what is said of its keys; `fields`: those of the others."""
    asked, answered = kind.get("field_instruction"), kind.get("field_output")
    pair = [f"prompt={asked}", f"response={answered}"] if asked and answered and not kind.get("field_input") else []
    reason = "columns become turns of the chat template: --data.fields"
    if pair and fields and pair != list(fields):
        pair, reason = [], f"--data.fields has one pair of names for all paths, {' '.join(fields)}: rename the columns"
    known = {"field_instruction", "field_output"} if pair else set()
    told = [(f"{place}.{name}", value, "" if name in known or not value else reason) for name, value in kind.items()]
    return pair, told


def llama_factory_paths(names: Any, folder: Path) -> tuple[list[str], list[Told]]:
    """(paths, what is said) of data sets by name, which dataset_info.json in `folder` leads to files or the hub."""
    entries: Any = {}
    with suppress(OSError, ValueError):
        entries = json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))
    paths, told = [], []
    for name in words(names) or ():
        entry = entries.get(name) if isinstance(entries, Mapping) else None
        if not isinstance(entry, Mapping):
            paths.append(name)
            looked = folder / "dataset_info.json"
            told.append(("dataset", name, f"write the file that {looked} has for it: --data.path FILE"))
            continue
        hub, file = entry.get("hf_hub_url"), entry.get("file_name")
        if not (hub or file):
            told.append((f"dataset {name}", entry, "it names neither a file nor a data set on the Hugging Face hub"))
            continue
        where, of_subset, of_split = located(
            str(hub) if hub else str(folder / str(file)), entry.get("subset"), entry.get("split")
        )
        paths.append(where)
        told += _info_told(name, entry, {"subset": of_subset, "split": of_split})
    return paths, told


def _info_told(name: str, entry: Mapping[str, Any], said: Mapping[str, str]) -> Iterator[Told]:
    for key, value in entry.items():
        reason = f"{IS_READ}; handloop preview shows how, --data.fields names columns"
        if key in ("hf_hub_url", "file_name") or not value or value in ("alpaca", "sharegpt", "openai"):
            reason = ""
        elif key == "ranking":
            reason = "supervised fine-tuning alone; no preference or reward training"
        elif key in ("num_samples", "folder"):
            reason = "all of a data set is read; --train.max_steps ends early"
        yield f"dataset {name}: {key}", value, said.get(key, reason)
