"""Where another trainer's data comes from: what is trained on is in the command, or it is told what is not."""

import json
from pathlib import Path

import pytest

from tests.unit.commands.test_import_config import translated
from train.foreign.translation import Translation

AXOLOTL = "base_model: m\nadapter: lora\ntokenizer_type: x\n"


def axolotl(tmp_path: Path, *entries: object) -> tuple[tuple[str, ...], dict[str, str], Translation]:
    """The paths, and the reason of each lost key without its list's name, of axolotl's data sets."""
    _, result = translated(tmp_path, AXOLOTL + "datasets: " + json.dumps(entries))
    lost = {key.removeprefix("datasets"): reason for key, _, reason in result.missing}
    return result.options["data.path"], lost, result


@pytest.mark.parametrize(
    ("entry", "path", "lost"),
    [
        ({"path": "json", "data_files": "local.jsonl", "split": "train[:10%]"}, "local.jsonl", ["split"]),
        ({"path": "json", "data_files": ["local.jsonl"], "split": "train"}, "local.jsonl", []),
        ({"path": "csv", "data_files": {"train": "a.csv", "test": "b.csv"}, "split": "test"}, "b.csv", ["data_files"]),
        ({"path": "csv", "data_files": {"train": "a.csv"}, "split": "test"}, "a.csv", ["split"]),
        ({"path": "o/n", "data_files": ["x.jsonl"], "split": "dev"}, "o/n/x.jsonl", ["data_files", "split"]),
        ({"path": "o/n", "data_files": "x.jsonl"}, "o/n/x.jsonl", ["data_files"]),
        ({"path": "./folder", "data_files": "x.jsonl"}, "folder/x.jsonl", []),
        ({"path": "./folder", "split": "test"}, "./folder", ["split"]),
        ({"path": "a.jsonl", "split": "validation", "name": "sub"}, "a.jsonl", ["split", "name"]),
        ({"path": "a.jsonl", "split": "train"}, "a.jsonl", []),
        ({"path": "data/a.jsonl.gz", "split": "test"}, "data/a.jsonl.gz", ["split"]),
        ({"path": "o/n", "split": "validation"}, "o/n:validation", []),
        ({"path": "o/n", "name": "sub", "split": "train+test"}, "o/n:sub:train+test", []),
        ({"path": "o/n", "name": "sub", "split": "train[:5%]"}, "o/n:sub:train", ["split"]),
        ({"path": "o/n", "split": "test[:50]+test[-50:](closest)"}, "o/n:test", ["split"]),
        ({"path": "o/n", "split": "a b", "name": "c/d"}, "o/n", ["split", "name"]),
        ({"path": "a.csv", "ds_type": "json"}, "a.csv", ["ds_type"]),
        ({"path": "a.jsonl", "ds_type": "json", "shards": None, "type": "alpaca"}, "a.jsonl", []),
        ({"path": "a.jsonl", "type": "alpaca.load_no_prompt", "revision": "x"}, "a.jsonl", ["type", "revision"]),
        ({"path": "a.jsonl", "roles_to_train": "all", "train_on_eos": "all"}, "a.jsonl",
         ["roles_to_train", "train_on_eos"]),
        ({"path": "a.jsonl", "roles_to_train": ["turn"], "train_on_eos": "assistant"}, "a.jsonl",
         ["roles_to_train", "train_on_eos"]),
        ({"path": "a.jsonl", "roles_to_train": ["gpt", "assistant"], "train_on_eos": "turn"}, "a.jsonl", []),
        ({"path": "a.jsonl", "message_field_role": "content", "message_field_content": "value"}, "a.jsonl",
         ["message_field_role"]),
    ],
)  # fmt: skip
def test_a_data_set_of_axolotl(entry: dict[str, object], path: str, lost: list[str], tmp_path: Path) -> None:
    """Its rows are those of the path, or the key that says otherwise has no counterpart; nothing more is told."""
    paths, said, result = axolotl(tmp_path, entry)
    assert paths == (path,)
    assert set(said) == {f"[0].{name}" for name in lost}
    assert all(said.values())
    told = {key for key, _ in result.anyway} | set(result.taken)
    assert {f"datasets[0].{name}" for name in entry if name not in lost} <= told


def test_columns_of_several_data_sets(tmp_path: Path) -> None:
    """One pair of names is for all paths: the first data set's is taken, and others are told."""
    first = {"path": "a.jsonl", "type": {"field_instruction": "q", "field_output": "a"}}
    other = {"path": "b.jsonl", "type": {"field_instruction": "question", "field_output": "answer"}}
    for entries, lost in (((first, other), True), ((first, {**first, "path": "c.jsonl"}), False)):
        paths, said, result = axolotl(tmp_path, *entries)
        assert paths == ("a.jsonl", entries[1]["path"])
        assert result.options["data.fields"] == ("prompt=q", "response=a")
        names = {"[1].type.field_instruction", "[1].type.field_output"}
        assert set(said) == (names if lost else set())
        assert all("prompt=q response=a" in reason for reason in said.values())
    text = f"{AXOLOTL}datasets: {json.dumps([first])}\ntest_datasets: {json.dumps([other])}\n"
    _, result = translated(tmp_path, text)
    assert result.options["data.fields"] == ("prompt=q", "response=a")
    assert {key for key, *_ in result.missing} == {
        "test_datasets[0].type.field_instruction",
        "test_datasets[0].type.field_output",
    }


def test_a_list_without_data(tmp_path: Path) -> None:
    """An entry that names no data is told, and none of its keys is called done."""
    paths, said, result = axolotl(tmp_path, {"type": "alpaca"}, {"path": "a.jsonl"})
    assert (paths, said) == (("a.jsonl",), {"[0]": "it names no data"})
    assert not any(key.startswith("datasets[0]") for key, _ in result.anyway)


def test_splits_of_trl(tmp_path: Path) -> None:
    """They stand behind the name of a data set on the hub; a slice, and a split of a file, are told."""
    for name, split, path, is_lost in (
        ("o/n", "train[:10%]", "o/n", True),
        ("o/n", "train_sft", "o/n:train_sft", False),
        ("a.jsonl", "train[:10%]", "a.jsonl", True),
        ("a.jsonl", "train", "a.jsonl", False),
    ):
        text = f"loss_type: nll\ndataset_name: {name}\ndataset_train_split: '{split}'\ndataset_test_split: test\n"
        _, result = translated(tmp_path, text)
        assert result.options["data.path"] == (path,)
        assert ("dataset_train_split" in {key for key, *_ in result.missing}) == is_lost
        assert "dataset_test_split" in dict(result.anyway)
    _, result = translated(tmp_path, text.replace(": test", ": dev") + "eval_strategy: epoch\ndataset_config: c\n")
    lost = {key: reason for key, _, reason in result.missing}
    assert "--data.validation_path" in lost["dataset_test_split"]
    assert "no subsets" in lost["dataset_config"]


def test_data_sets_of_llama_factory(tmp_path: Path) -> None:
    """Subset and split stand behind the hub's name; what a file has none of is told, as is what names no data."""
    about = {
        "one": {"hf_hub_url": "o/n", "subset": "s", "split": "dev", "formatting": "sharegpt", "ranking": False},
        "two": {"file_name": "b.json", "split": "test", "formatting": "odd", "ranking": True, "num_samples": 5},
        "three": {"ms_hub_url": "o/other"},
    }
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(about))
    _, result = translated(tmp_path, f"stage: sft\ndataset_dir: {tmp_path / 'data'}\ndataset: one,two,three\n")
    assert result.options["data.path"] == ("o/n:s:dev", str(tmp_path / "data" / "b.json"))
    lost = {key.removeprefix("dataset "): reason for key, _, reason in result.missing}
    assert set(lost) == {"two: split", "two: formatting", "two: ranking", "two: num_samples", "three"}
