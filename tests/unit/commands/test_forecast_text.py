"""What `handloop plan` notes and chooses: weights not shared out, cards that cannot share, Blackwell, a profile."""

import json
import re
from pathlib import Path

import pytest

from tests.conftest import published_llama
from train.commands import forecast
from train.commands.handloop import main
from train.profiles import DEMO, GLOSSARY


@pytest.fixture
def llama_70b(tmp_path: Path) -> Path:
    """The published shape of Llama-3.1-70B, of which a GPU with 24 GB holds nothing."""
    return published_llama(
        tmp_path / "llama_70b",
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        max_position_embeddings=131072,
    )


def planned(capsys: pytest.CaptureFixture[str], base: Path, *words: str) -> tuple[str, list[str]]:
    """What is printed, and the notes in it."""
    assert main(["plan", "--profile", "a100", "--model.name_or_path", str(base), *words]) == 0
    said = capsys.readouterr().out
    return said, re.findall(r"^note {6}(.+)$", said, re.MULTILINE)


def test_what_is_not_shared_out_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, llama_70b: Path, llama31_8b: Path
) -> None:
    """With the reason, and how it is made to; nothing where blocks are shared out, or sharing is not asked for."""
    monkeypatch.setattr(forecast, "forecast_known_gpus", lambda *_: [])
    shard, two = ("--memory.shard", "true"), ("--gpus", "2")
    assert planned(capsys, llama_70b, "--gpu", "L40S")[1] == []
    (note,) = planned(capsys, llama_70b, "--gpu", "A10", *shard, *two)[1]
    assert "shares nothing out: parts of all blocks do not fit" in note
    (note,) = planned(capsys, llama_70b, "--gpu", "A10", *shard, "--gpus", "4")[1]
    assert "predicted to be faster; --memory.offload none shares them out all the same" in note
    assert planned(capsys, llama_70b, "--gpu", "A10", *shard, "--gpus", "4", "--memory.offload", "none")[1] == []
    (note,) = planned(capsys, llama31_8b, "--gpu", "L40S", *shard, *two, "--memory.offload", "stream")[1]
    assert "as --memory.offload stream streams all blocks" in note
    assert planned(capsys, llama31_8b, "--gpu", "L40S", *shard, *two)[1] == []


def test_cards_that_cannot_share_are_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, llama31_8b: Path
) -> None:
    """A plan that shares weights out on GeForce cards says that a run is refused; without sharing nothing is said."""
    monkeypatch.setattr(forecast, "forecast_known_gpus", lambda *_: [])
    said, (note,) = planned(capsys, llama31_8b, "--gpu", "RTX-4090", "--memory.shard", "true", "--gpus", "2")
    assert "each of 2 GPUs holds a part" in said
    command = ["plan", "--profile", "a100", "--model.name_or_path", str(llama31_8b), "--gpu", "RTX-4090"]
    assert main([*command, "--memory.shard", "true", "--gpus", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["notes"] == [note]
    assert note.startswith("GeForce drivers give RTX-4090 cards no access to each other's memory")
    assert "a run with memory.shard is refused (78)" in note
    assert planned(capsys, llama31_8b, "--gpu", "RTX-4090")[1] == []
    assert (
        "NVLink bridge"
        in planned(capsys, llama31_8b, "--gpu", "RTX-3090", "--memory.shard", "true", "--gpus", "2")[1][0]
    )


def test_blackwell_was_never_tried(capsys: pytest.CaptureFixture[str], tinyllama_1b: Path) -> None:
    """Said of a card of that generation, and below the table of all."""
    base = ["plan", "--profile", "4gb_tinyllama", "--model.name_or_path", str(tinyllama_1b)]
    assert main([*base, "--gpu", "5090"]) == 0
    assert "note      RTX-5090 is of the Blackwell generation, on which nothing here was ever tried\n" in (
        capsys.readouterr().out
    )
    assert main(base) == 0
    assert "nothing was ever tried on Blackwell: B200, RTX-5090, RTX-5080\n" in capsys.readouterr().out


def test_a_profile_is_chosen_by_the_card(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tinyllama_1b: Path
) -> None:
    """Where none is named, and said; it is the plan of that profile. Without a card one has to be named."""
    monkeypatch.setattr(forecast, "forecast_known_gpus", lambda *_: [])
    base = ("--model.name_or_path", str(tinyllama_1b))
    for words, profile in (
        (("--gpu", "4090"), "a100"),
        (("--gpu", "GTX-1650"), "4gb"),
        (("--gpu", "4GiB", "--gpus", "2"), "4gb"),
        (("--gpu", "H100", "--gpus", "2"), "multi_gpu"),
    ):
        assert main(["plan", *base, *words]) == 0
        first, _, rest = capsys.readouterr().out.partition("\n")
        assert re.match(rf"profile   {profile}, by the memory of \S+, since none is given", first)
        assert main(["plan", "--profile", profile, *base, *words]) == 0
        assert capsys.readouterr().out == rest
    assert main(["plan", *base, "--gpu", "4090", "--json"]) == 0
    told = capsys.readouterr()
    assert (json.loads(told.out)["gpu"], "a100" in told.err) == ("RTX-4090", True)
    assert main(["plan", *base]) == 78
    assert "give one profile" in capsys.readouterr().err
    assert main(["plan", *base, "--gpu", "4090", "--trian.epochs", "3"]) == 78
    assert "--train.epochs" in capsys.readouterr().err


def test_which_limit_of_the_steps_decides(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Of epochs and train.max_steps the smaller one, in the line of the steps."""
    data = tmp_path / "rows.jsonl"
    lines = Path(GLOSSARY).read_text(encoding="utf-8").splitlines(keepends=True)
    data.write_text("".join(lines[:40]), encoding="utf-8")
    command = ["plan", "--profile", "a100", "--model.name_or_path", str(DEMO / "base"), "--data.path", str(data)]
    assert main([*command, "--gpu", "4090", "--train.max_steps", "20"]) == 0
    assert "15 in all (by --train.epochs 3, which comes before --train.max_steps 20;" in capsys.readouterr().out
