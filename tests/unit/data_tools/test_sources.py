"""What a folder's files are taken for: taken and left are said, and splits are not mixed."""

import gzip
import os
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from data_tools.data_sets import SavedData
from data_tools.records import Tally, read_records
from data_tools.report import DataError
from data_tools.sources import survey

ROW = '{"prompt": "What is AOG?", "response": "Aircraft on ground."}\n'


def put(folder: Path, *names: str, text: str = ROW) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def taken(folder: Path) -> list[str]:
    return [str(source.origin).removeprefix(f"{folder}/") for source in survey([str(folder)], "auto").sources]


def test_hidden_files_and_other_kinds_are_left_and_said(tmp_path: Path) -> None:
    """Jupyter's copies, archives' leftovers, pictures and the README are no data; the line has them by reason."""
    put(tmp_path, "a.jsonl", "deep/b.jsonl", ".ipynb_checkpoints/a-checkpoint.jsonl", "__MACOSX/c.jsonl", "~$d.csv")
    put(tmp_path, "README.md", "LICENSE.txt", "plot.png")
    (tmp_path / "linked").symlink_to(tmp_path / "deep")
    assert taken(tmp_path) == ["a.jsonl", "deep/b.jsonl"]
    (note,) = survey([str(tmp_path)], "auto").notes
    assert note == (
        f"{tmp_path}/: 2 files taken (a.jsonl, deep/b.jsonl); left: 3 hidden (.ipynb_checkpoints/a-checkpoint.jsonl, "
        "__MACOSX/c.jsonl, ~$d.csv), 2 about the data (LICENSE.txt, README.md), 1 of another kind (plot.png), "
        "1 in a linked folder (linked)"
    )


@pytest.mark.parametrize(
    "names",
    [
        ("train.jsonl", "test.jsonl"),
        ("train-00000-of-00001.parquet", "validation-00000-of-00001.parquet"),
        ("Train.csv", "valid.csv"),
        ("train/a.jsonl", "dev/b.jsonl"),
        ("training_set.json", "eval.json"),
        ("train/a.txt", "test/b.txt"),
        ("train.txt", "test.txt"),
        ("gsm_train.jsonl", "gsm_test.jsonl"),
        ("replies-train.csv.gz", "replies-eval.csv.gz"),
    ],
)
def test_a_training_split_beside_another_is_refused(names: tuple[str, str], tmp_path: Path) -> None:
    """In a folder and in a glob; the message has both ways out, which work."""
    tmp_path = tmp_path / "dev"  # whose own name says nothing of the files in it
    put(tmp_path, *names)
    for path in (tmp_path, tmp_path / "**" / "*.*"):
        with pytest.raises(DataError) as caught:
            survey([str(path)], "auto")
        assert f"--data.path {tmp_path / names[0]}" in str(caught.value)
        assert f"--data.validation_path {tmp_path / names[1]}" in str(caught.value)
    assert len(survey([str(tmp_path / names[0])], "auto").sources) == 1


@pytest.mark.parametrize(
    "names", [("train.jsonl", "trains.jsonl"), ("test_a.jsonl", "test_b.jsonl"), ("train_crash.txt", "test_flight.txt")]
)
def test_names_that_are_no_splits(names: tuple[str, str], tmp_path: Path) -> None:
    """One split alone, words that only begin so, and the titles of texts are taken."""
    put(tmp_path, *names)
    assert taken(tmp_path) == sorted(names)


def test_data_sets_that_were_saved_to_disk(tmp_path: Path) -> None:
    """save_to_disk's folder is read; of several splits one must be named; a changed file changes the digest."""
    rows = [{"prompt": f"What is {i}?", "response": "A number."} for i in range(300)]
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "one"))
    (source,) = survey([str(tmp_path / "one")], "auto").sources
    tally = Tally.empty()
    records = list(read_records([source], tally))
    assert len(records) == 300
    assert records[299].source == f"{tmp_path / 'one'}:300"
    before = source.origin.digest()
    Dataset.from_list(rows[:299]).save_to_disk(str(tmp_path / "one"))
    assert SavedData(tmp_path / "one").digest() != before
    split = Dataset.from_list(rows)
    DatasetDict({"train": split}).save_to_disk(str(tmp_path / "lone"))
    assert taken(tmp_path / "lone") == ["train"]
    DatasetDict({"train": split, "test": split}).save_to_disk(str(tmp_path / "two"))
    with pytest.raises(DataError, match=rf"several splits \(test, train\); .* --data\.path {tmp_path}/two/train"):
        survey([str(tmp_path / "two")], "auto")
    (tmp_path / "one" / "state.json").write_text("{}")
    assert list(read_records(survey([str(tmp_path / "one")], "auto").sources, tally)) == []
    assert "was saved with save_to_disk, and cannot be loaded" in tally.report.lines[0]


def test_compressed_files_are_found_and_named(tmp_path: Path) -> None:
    """They count among the known kinds in folders, globs and by name; others are refused with the kinds there are."""
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(ROW)
    with gzip.open(tmp_path / "b.txt.gz", "wt") as file:
        file.write("A report.")
    assert taken(tmp_path / "a.jsonl.gz") == [str(tmp_path / "a.jsonl.gz")]
    with pytest.raises(DataError, match="contains both text and row files"):
        survey([str(tmp_path)], "auto")
    put(tmp_path, "c.zip", "d.parquet.gz")
    for name in ("c.zip", "d.parquet.gz"):
        with pytest.raises(DataError, match=r"unknown file extension; known: \.txt, .*also with \.gz"):
            survey([str(tmp_path / name)], "auto")


def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    """It is refused by name, before it ends a preparation."""
    (tmp_path / os.fsdecode(b"caf\xe9.jsonl")).write_text(ROW)
    with pytest.raises(DataError, match="its name is not UTF-8; rename it"):
        survey([str(tmp_path)], "auto")
