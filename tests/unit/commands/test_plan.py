"""`handloop plan` for the two models that the profiles name, from config.json alone."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen3_5TextConfig, Qwen3Config

from train.commands import forecast, planned_rows, probe
from train.commands.handloop import main
from train.profiles import DEMO, GLOSSARY


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A document of the GPU that is asked for alone: those of all known ones take seconds."""
    monkeypatch.setattr(forecast, "forecast_known_gpus", lambda *_: [])


def test_both_models_fit_into_4_gib(capsys: pytest.CaptureFixture, llama31_8b: Path, tinyllama_1b: Path) -> None:
    """TinyLlama with nothing streamed, an 8B by streaming; in 2 GiB the 8B is refused with 78 and TinyLlama is not."""

    def forecast(profile: str, base: Path, size: str) -> tuple[int, bool]:
        """The exit code, and whether weights are streamed because they would not fit."""
        code = main(["plan", "--profile", profile, "--model.name_or_path", str(base), "--gpu", size])
        text = " ".join(capsys.readouterr().out.split())
        return code, bool(
            re.search(r"\d+ blocks' weights are streamed from host memory(?!, which is predicted to be faster)", text)
        )

    assert forecast("4gb_tinyllama", tinyllama_1b, "4GiB") == (0, False)
    assert forecast("4gb_tinyllama", tinyllama_1b, "2GiB") == (0, False)
    assert forecast("a100", llama31_8b, "4GiB") == (0, True)
    assert forecast("a100", llama31_8b, "2GiB")[0] == 78


def qwen3(folder: Path, **settings: Any) -> Path:
    """The folder, with config.json as Qwen3's smaller checkpoints have it."""
    Qwen3Config(
        **settings,
        vocab_size=151936,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        dtype="bfloat16",
        architectures=["Qwen3ForCausalLM"],
    ).save_pretrained(folder)
    return folder


SHAPES = {
    "4gb": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
    "qwen3_4b_4gb": {
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
    },
}


@pytest.mark.usefixtures("one_gpu")
@pytest.mark.parametrize("gpu", ["4GiB", "GTX-1650", "GTX-1050-Ti", "RTX-3050-4GB"])  # fp16, fp32 and bf16
@pytest.mark.parametrize("profile", SHAPES)
def test_the_profiles_of_qwen3_fit_their_cards(
    profile: str, gpu: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both are planned within 4 GiB, and the head of 151,936 words is counted once, as it is tied."""
    base = qwen3(tmp_path / "shape", **SHAPES[profile])
    assert main(["plan", "--profile", profile, "--model.name_or_path", str(base), "--gpu", gpu, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["fits"]
    assert told["predicted_peak_gib"] < told["budget_gib"] < 4
    element = 4 if gpu == "GTX-1050-Ti" else 2
    head = 151936 * SHAPES[profile]["hidden_size"] * element / 2**30
    assert told["parts_gib"]["head"] == pytest.approx(head, abs=1e-3)
    assert told["parts_gib"]["embedding"] == 0


def test_a_hybrid_is_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Qwen3.5-9B fits a 4 GB card, streamed, and says what it runs without and what was never measured."""
    Qwen3_5TextConfig(architectures=["Qwen3_5ForCausalLM"]).save_pretrained(tmp_path)
    for gpu, words in (("4GiB", "32 blocks' weights are streamed"), ("H100", "linear attention was never measured)")):
        assert main(["plan", "--profile", "a100", "--model.name_or_path", str(tmp_path), "--gpu", gpu]) == 0
        text = " ".join(capsys.readouterr().out.split())
        assert "24 have linear attention, so there are no CUDA graphs" in text
        assert "as a CUDA graph" not in text
        assert words in text


def test_a_probe_s_json_is_all_that_is_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tinyllama_1b: Path
) -> None:
    """What a run says while it loads goes to standard error, so that a script can read standard output."""

    def measured(*_: object) -> dict[str, int]:
        print("engine    fused")
        return {"seconds": 1}

    monkeypatch.setattr(probe, "probe", measured)
    assert main(["plan", "--profile", "4gb", "--model.name_or_path", str(tinyllama_1b), "--probe", "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"seconds": 1}
    assert printed.err == "engine    fused\n"


BASE = ["--profile", "a100", "--model.name_or_path", str(DEMO / "base"), "--data.max_length", "256"]


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of 40 rows, of which three are held out, and an empty cache."""
    monkeypatch.setenv("HANDLOOP_CACHE", str(tmp_path / "cache"))
    path, text = tmp_path / "rows.jsonl", Path(GLOSSARY).read_text(encoding="utf-8")
    path.write_text("".join(text.splitlines(keepends=True)[:40]), encoding="utf-8")
    return path


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    """The document of `handloop plan` for the demo's base on one GPU."""
    base = BASE[:2] + BASE[4:] if "--model.name_or_path" in words else BASE
    assert main(["plan", *base, "--gpu", "rtx4090", "--json", *words]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_data_are_counted(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Samples, tokens and steps are those that an audit of the same options counts; the time is theirs at the speed."""
    for more in ([], ["--data.validation_fraction", "0.1"], ["--data.packing", "true"], ["--train.max_steps", "7"]):
        options = ["--data.path", str(rows), "--train.epochs", "3", *more]
        told = planned(capsys, *options)
        assert main(["audit", *BASE, *options, "--json"]) in (0, 78)
        audit = json.loads(capsys.readouterr().out)
        data = told["data"]
        for name in ("num_samples", "total_steps"):
            assert data[name] == audit[name.removeprefix("num_")], (name, more)
        trained = data["tokens_per_epoch"] * data["total_steps"] / data["steps_per_epoch"]
        assert told["predicted_seconds"] * told["predicted_tokens_per_second"] == pytest.approx(trained, rel=0.3)
        assert data["assumed_mean_length"] is None
    assert main(["plan", *BASE, "--data.path", str(rows), "--gpu", "4090"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^data      .*rows.jsonl: 40 rows, 40 samples of \d+ tokens on average", text)
    assert re.search(r"^steps     5 an epoch on one GPU, 15 in all \(3 epochs\)$", text, re.MULTILINE)
    assert re.search(r"^time      about \d+ s on one RTX-4090, ", text, re.MULTILINE)
    assert main(["plan", *BASE, "--data.path", str(rows)]) == 0
    assert re.search(r"tokens/s ┃ +time ┃", capsys.readouterr().out)


@pytest.mark.usefixtures("one_gpu")
def test_what_is_assumed_is_said(rows: Path, tinyllama_1b: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Data that are away, unnamed, bad or of a base without a tokenizer, and a mean that is given: rows and why."""
    bad = rows.with_name("bad.jsonl")
    bad.write_text("{\n")
    for words, said in (
        ((), "since no data are named: --data.path FILE"),
        (("--data.path", "gone/rows.jsonl"), "since gone/rows.jsonl is not on this machine"),
        (("--data.path", "somebody/chats"), "since somebody/chats is not on this machine"),
        (("--data.path", str(bad)), f"{bad}:1: "),
        (("--data.path", str(rows), "--model.name_or_path", str(tinyllama_1b)), "no tokenizer.json"),
        (("--data.path", str(rows), "--mean-length", "99"), "as --mean-length 99 says"),
    ):
        told = planned(capsys, *words)
        assert said in told["data"]["said"]
        assert told["data"]["assumed_mean_length"] == (99 if "--mean-length" in words else 256)
        assert (told["data"]["total_steps"], told["predicted_seconds"]) == (None, None)
        assert ("--mean-length N" in told["data"]["said"]) == ("--mean-length" not in words)


@pytest.mark.usefixtures("one_gpu")
def test_large_data_are_counted_once_they_are_prepared(
    rows: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan does not tokenise what takes longer than a plan should; what an audit has prepared costs it nothing."""
    monkeypatch.setattr(planned_rows, "MAX_BYTES", 100)
    before = planned(capsys, "--data.path", str(rows))["data"]
    assert before["total_steps"] is None
    assert "`handloop audit` with the same options" in before["said"]
    main(["audit", *BASE, "--data.path", str(rows)])
    capsys.readouterr()
    assert planned(capsys, "--data.path", str(rows))["data"]["num_samples"] == 40


def test_a_size_names_the_cards_that_have_it(capsys: pytest.CaptureFixture[str]) -> None:
    """24GiB, in any case, has no speed; the cards are named that have one."""
    for size in ("24GiB", "24gib"):
        assert main(["plan", *BASE, "--gpu", size]) == 0
        assert "cards of this size are L4, A10, RTX-4090, RTX-3090\n" in capsys.readouterr().out
    assert main(["plan", *BASE, "--gpu", "24GiB", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cards_of_this_size"] == ["L4", "A10", "RTX-4090", "RTX-3090"]
    assert planned(capsys)["cards_of_this_size"] == []


def test_fp8_products_are_planned_for_gpus_that_have_them(capsys: pytest.CaptureFixture, llama31_8b: Path) -> None:
    """A table or JSON leaves the others out; a size has what is asked for."""
    base = ("plan", "--profile", "a100", "--engine.products", "fp8", "--model.name_or_path", str(llama31_8b))
    for gpu in ("H100", "24GiB"):
        assert main([*base, "--gpu", gpu, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["gpu"], found["plan"]["products"]) == (gpu, "fp8")
        names = {each["gpu"] for each in found["gpus"]}
        assert {"H200", "H100", "L40S", "L4", "RTX-4090"} <= names
        assert not names & {"A100-80", "A10", "RTX-3090", "T4"}
    assert main([*base]) == 0
    assert "H100" in (said := capsys.readouterr().out)
    assert "A100" not in said


@pytest.mark.usefixtures("one_gpu")
def test_several_gpus(capsys: pytest.CaptureFixture, llama31_8b: Path) -> None:
    """Each of four needs a quarter of the packed weights, and two blocks' slots; together they are almost four times as
    fast; without sharding each has them all."""

    def planned(*words: str) -> dict[str, Any]:
        options = ["--gpu", "H100", "--model.name_or_path", str(llama31_8b), "--json", *words]
        assert main(["plan", "--profile", "multi_gpu", *options]) == 0
        return json.loads(capsys.readouterr().out)

    whole = ("--memory.offload", "none")
    one, four = planned(*whole), planned(*whole, "--gpus", "4")
    sharded = planned(*whole, "--gpus", "4", "--memory.shard", "true")
    assert four["parts_gib"] == one["parts_gib"]
    assert sharded["parts_gib"]["packed weights"] == pytest.approx(one["parts_gib"]["packed weights"] / 4, rel=0.01)
    assert sharded["parts_gib"]["slots for streamed weights"] > 0 == one["parts_gib"]["slots for streamed weights"]
    assert 3.9 < four["predicted_speedup"] < 4
    ratio = four["predicted_tokens_per_second"] / one["predicted_tokens_per_second"]
    assert ratio == pytest.approx(four["predicted_speedup"], rel=1e-3)
    assert (one["added_gib"], four["added_gib"]) == (0, pytest.approx(0.078, rel=0.01))  # 21 million in fp32


def test_a_group_of_gpus_shares_a_row(capsys: pytest.CaptureFixture[str], llama31_8b: Path) -> None:
    """Four GPUs with a row between them are no four times one; eight are nearly twice as fast as a group of four."""

    def planned(*words: str) -> str:
        base = ["--gpu", "H100", "--model.name_or_path", str(llama31_8b), "--batch.per_device", "1", *words]
        assert main(["plan", "--profile", "multi_gpu", *base]) == 0
        return capsys.readouterr().out

    def speed(said: str) -> float:
        return float(re.findall(r"about ([\d,]+) tokens/s", said)[0].replace(",", ""))

    four = planned("--gpus", "4", "--batch.context_parallel", "4")
    assert "GPUs      4 GPUs that share each row's tokens\n" in four
    eight = planned("--gpus", "8", "--batch.context_parallel", "4")
    told = re.search(r"GPUs      8 GPUs in 2 groups, of which each .*; ([\d.]+) times as fast as one group", eight)
    assert told is not None
    assert 1.8 < float(told[1]) < 2
    assert speed(eight) / speed(four) == pytest.approx(float(told[1]), rel=0.05)  # four also wait for their sums
    assert "times as fast as one with the same work for each" in planned("--gpus", "4")


@pytest.mark.usefixtures("one_gpu")
def test_several_machines(capsys: pytest.CaptureFixture, llama31_8b: Path) -> None:
    """Two of eight GPUs: twice the samples, and a step longer by what the network takes; each holds the same."""

    def planned(*words: str) -> dict[str, Any]:
        options = ["--gpu", "H100", "--gpus", "8", "--model.name_or_path", str(llama31_8b), "--json", *words]
        assert main(["plan", "--profile", "multi_gpu", *options]) == 0
        return json.loads(capsys.readouterr().out)

    one, two, fast = planned(), planned("--nodes", "2"), planned("--nodes", "2", "--link", "400")
    assert (one["network_gbit"], two["network_gbit"], fast["network_gbit"]) == (None, 25, 400)
    assert one["parts_gib"] == two["parts_gib"]
    assert one["host_gib"] == two["host_gib"] == pytest.approx(0.979, rel=0.01)  # the embedding, once
    waited = two["sent_gib"] * 2**30 / (0.8 * 25e9 / 8)
    computing = one["plan"]["seconds"]
    assert two["predicted_step_seconds"] == pytest.approx(computing + waited, rel=0.01)
    assert two["predicted_speedup"] == pytest.approx(16 * computing / (computing + waited), rel=0.01)
    assert two["predicted_speedup"] < 15 < fast["predicted_speedup"] < 16
    assert main(["plan", "--profile", "multi_gpu", "--gpu", "H100", "--gpus", "8", "--nodes", "2", *BASE[2:]]) == 0
    said = capsys.readouterr().out
    assert "16 GPUs (8 on each of 2 machines)" in said
    assert re.search(
        r"by what is between machines: 10 Gbit/s [\d.]+, 25 Gbit/s [\d.]+, 100 .*, 400 .*never measured", said
    )


def test_several_gpus_are_refused_where_there_is_one(capsys: pytest.CaptureFixture, llama31_8b: Path) -> None:
    """A probe runs on one, and one has nobody to share weights with."""
    base = ("plan", "--profile", "multi_gpu", "--model.name_or_path", str(llama31_8b))
    for words, reason in (
        (("--probe", "--gpus", "2"), "a probe runs on one GPU"),
        (("--probe", "--nodes", "2"), "a probe runs on one GPU"),
        (("--gpu", "H100", "--memory.shard", "true"), "one process has nobody to share weights with"),
        (
            ("--gpu", "H100", "--gpus", "4", "--nodes", "2", "--memory.shard", "true"),
            "8 processes are on several machines",
        ),
        (("--gpu", "H100", "--link", "100"), "--link 100: what is between machines, and there is one"),
        (
            ("--gpu", "H100", "--gpus", "2", "--nodes", "2", "--batch.context_parallel", "4"),
            "--gpus 2 with --batch.context_parallel 4: the GPUs that share a row are in one machine",
        ),
    ):
        assert main([*base, *words]) == 78
        assert reason in capsys.readouterr().err
