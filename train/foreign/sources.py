"""Where another trainer's configuration takes its data from -> our data.path, and what of it has no counterpart."""

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from train.foreign.values import words

ROW_FIELDS = {"messages", "conversations", "None", ""}
MAPPINGS = ({"role": "role", "content": "content"}, {"role": "from", "content": "value"})
Told = tuple[str, Any, str]  # key, value, what is to be said of it: empty where it is done
IS_READ = "rows are recognised by their fields"


def is_local(path: str) -> bool:
    """Whether a data set is a file or folder, and no name on the hub."""
    is_named_so = path.startswith((".", "/", "~")) or path.count("/") > 1
    return is_named_so or Path(path).suffix in (".jsonl", ".json", ".csv", ".parquet", ".txt") or Path(path).exists()


def hub_name(path: str, subset: Any, split: Any) -> str:
    """`owner/name:subset:split`; a file stays as it is."""
    if is_local(path) or not (subset or (split and split != "train")):
        return path
    return ":".join(str(part) for part in (path, subset, split or "train") if part)


def axolotl_paths(entries: Any, key: str) -> tuple[list[str], list[str], list[Told]]:
    """(paths, data.fields, what is said of each key) of axolotl's `datasets`."""
    paths: list[str] = []
    fields: list[str] = []
    told: list[Told] = []
    for number, entry in enumerate(entries if isinstance(entries, list) else [entries]):
        if not isinstance(entry, Mapping):
            told.append((f"{key}[{number}]", entry, "expected path and type"))
            continue
        files = entry.get("data_files")
        if files or entry.get("path"):
            named = words(files) if files else (hub_name(str(entry["path"]), entry.get("name"), entry.get("split")),)
            paths += named or ()
        for name, value in entry.items():
            place = f"{key}[{number}].{name}"
            if name == "type" and isinstance(value, Mapping):
                fields, of_type = _custom_type(value, place)
                told += of_type
            else:
                told.append((place, value, _axolotl_reason(str(name), value)))
    return paths, fields, told


def _axolotl_reason(name: str, value: Any) -> str:
    """What is to be said of one key of a data set; empty where nothing is lost."""
    if name in ("path", "data_files", "name", "split", "ds_type"):
        return ""
    if name == "type":
        kind = str(value).partition(".")[0].partition(":")[0]
        if kind in ("alpaca", "chat_template", "sharegpt", "completion", "alpaca_chat", "gpteacher"):
            return ""
        return f"{IS_READ} (docs/FORMATS.md); handloop preview shows how"
    if name in ("field_messages", "field"):
        return "" if str(value) in {*ROW_FIELDS, "text"} else f"{IS_READ}: rename the column to messages, or text"
    if name == "message_property_mappings":
        return "" if value in MAPPINGS else "turns have role and content, or from and value"
    if name in ("message_field_role", "message_field_content"):
        is_so = str(value) in ("role", "from", "content", "value")
        return "" if is_so else "turns have role and content, or from, value"
    if name in ("roles_to_train", "train_on_eos"):
        is_so = value in (["assistant"], ["gpt"], ["assistant", "gpt"], ["gpt", "assistant"], "turn", "all")
        return "" if is_so else "the assistant's turns are trained, with their end; `train: false` leaves a turn out"
    if name == "roles":
        return "roles are recognised in the common spellings (docs/FORMATS.md)"
    if name == "chat_template":
        return "the tokenizer's own template is taken; --data.chat_template FILE names another"
    return "all of a data set is read, by its fields"


def _custom_type(kind: Mapping[str, Any], place: str) -> tuple[list[str], list[Told]]:
    """`data.fields` for a type that names its columns."""
    asked, answered = kind.get("field_instruction"), kind.get("field_output")
    is_pair = bool(asked and answered and not kind.get("field_input"))
    known = {"field_instruction", "field_output"} if is_pair else set()
    told = [
        (f"{place}.{name}", value, "" if name in known else "columns become turns of the chat template: --data.fields")
        for name, value in kind.items()
    ]
    return ([f"prompt={asked}", f"response={answered}"] if is_pair else []), told


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
        hub = entry.get("hf_hub_url")
        file = entry.get("file_name")
        paths.append(str(hub) if hub else str(folder / str(file)))
        told += _info_told(name, entry)
    return paths, told


def _info_told(name: str, entry: Mapping[str, Any]) -> Iterator[Told]:
    for key, value in entry.items():
        if key not in ("hf_hub_url", "file_name", "formatting"):
            yield f"dataset {name}: {key}", value, f"{IS_READ}; handloop preview shows how, --data.fields names columns"
